"""Trains a byte-level BPE tokenizer on the training texts of a corpus.

python train_tokenizer.py corpus tokenizer
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL = [END, PAD, "<|im_start|>", "<|im_end|>"]  # the last two are for chat templates; the model never saw them

# Qwen's pattern: contractions, words with one leading sign, single digits, runs of signs, line ends, white space.
WORDS = Regex(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHARACTERS_A_DOMAIN = 1_000_000


def train(texts: list[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains on the first million characters of each text, so that every domain counts alike.

    Args:
        texts: UTF-8 files.
        vocabulary: number of tokens, special ones and the 256 bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=2048
    )


def pieces(texts: list[Path], size: int = 4000) -> Iterator[str]:
    """Pieces small enough for the trainer to count in parallel."""
    for path in texts:
        text = path.read_text("utf-8")[:CHARACTERS_A_DOMAIN]
        yield from (text[start : start + size] for start in range(0, len(text), size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that prepare_corpus.py wrote")
    parser.add_argument("out", type=Path, help="folder for the tokenizer")
    parser.add_argument("--vocabulary", type=int, default=4096, metavar="N")
    args = parser.parse_args()
    texts = sorted((args.corpus / "train").glob("*.txt"))
    if not texts:
        parser.error(f"no {args.corpus / 'train'}/*.txt: run prepare_corpus.py {args.corpus} first")
    tokenizer = train(texts, args.vocabulary)
    tokenizer.save_pretrained(args.out)
    for path in sorted((args.corpus / "heldout").glob("*.txt")):
        text = path.read_text("utf-8")
        print(f"{path.stem:8} {len(text.encode()) / len(tokenizer.encode(text, verbose=False)):.2f} bytes a token")


if __name__ == "__main__":
    main()
