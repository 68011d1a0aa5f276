"""refmoe, the small trained MoE language model that moekit carries with it, and text to measure it on.

The model card is `model/README.md`; where the texts come from and under which licences is in `NOTICE`.
"""

from importlib.resources import files
from pathlib import Path

_HERE = Path(str(files(__name__)))


def model_path() -> Path:
    """The folder of the checkpoint: a stock `Qwen3MoeForCausalLM` in bfloat16 with its tokenizer."""
    return _HERE / "model"


def texts() -> dict[str, Path]:
    """Domain -> file of held-out text (UTF-8, 50 to 100 kB): documents of which the model saw no part in training."""
    return _by_domain("texts")


def calibration() -> dict[str, Path]:
    """Domain -> file of calibration text (UTF-8, 60 to 125 kB): blocks of the training text, apart from `texts()`."""
    return _by_domain("calibration")


def _by_domain(folder: str) -> dict[str, Path]:
    return {path.stem: path for path in sorted((_HERE / folder).glob("*.txt"))}
