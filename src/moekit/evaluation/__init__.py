"""How good is a model, and how far from another: perplexity, KL divergence and top-1 agreement by domain."""

from moekit.evaluation.compare import DomainScore, Evaluation, Subject, evaluate

__all__ = ["DomainScore", "Evaluation", "Subject", "evaluate"]
