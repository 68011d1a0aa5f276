"""Writes the questions of this folder from refmoe's held-out texts, the same ones every time. Two seconds.

python examples/tasks/make_tasks.py [FOLDER]     # this folder if left out
"""

import json
import random
import re
import sys
from pathlib import Path

from moekit import refmoe

QUESTIONS, CHOICES = 200, 4
CONTEXT, WORDS = 240, 4  # characters before the gap; words that fill it


def arithmetic(lines: list[str], rng: random.Random) -> dict:
    """Three solved exercises, then one whose result is to be chosen among numbers near it."""
    start = rng.randrange(len(lines) - 4)
    question, result = lines[start + 3].rsplit(" ", 1)
    right = int(result)
    wrong = {right + step for step in (-10, -2, -1, 1, 2, 10)} - {right}
    context = "\n".join([*lines[start : start + 3], question])
    return shuffled(context, str(right), [str(x) for x in rng.sample(sorted(wrong), CHOICES - 1)], rng)


def next_words(text: str, rng: random.Random) -> dict:
    """A passage that breaks off, then the words that follow among words from other places of the same text."""
    places = rng.sample([x.start() for x in re.finditer(r"(?<=\w) (?=\w)", text) if x.start() > CONTEXT], CHOICES)
    follows = [re.match(rf" \S+(?:\s+\S+){{{WORDS - 1}}}", text[place:]) for place in places]
    if not all(follows):
        return next_words(text, rng)
    right, *wrong = (x.group()[1:] for x in follows)
    return shuffled(text[places[0] - CONTEXT : places[0]], right, wrong, rng)


def shuffled(context: str, right: str, wrong: list[str], rng: random.Random) -> dict:
    """A question whose right answer stands anywhere."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def main(folder: str = str(Path(__file__).parent)) -> None:
    """Write one file a task."""
    texts = {name: path.read_text("utf-8") for name, path in refmoe.texts().items()}
    exercises = [line for line in texts["math"].splitlines() if re.search(r" -?\d+$", line)]
    for name in ("arithmetic", "python", "kjv"):
        rng = random.Random(0)
        rows = [
            arithmetic(exercises, rng) if name == "arithmetic" else next_words(texts[name], rng)
            for _ in range(QUESTIONS)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (Path(folder) / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
