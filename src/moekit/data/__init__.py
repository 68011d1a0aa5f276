"""Text input: sources of documents (`sources`) and their batches of token ids (`dataset`)."""

from moekit.data.dataset import Batch, Dataset, load_tokenizer
from moekit.data.sources import ROLES, Document, Source, load_documents, parse_data

__all__ = ["ROLES", "Batch", "Dataset", "Document", "Source", "load_documents", "load_tokenizer", "parse_data"]
