"""moekit steer reference: the questions that a model answers right, and how it routed them (for C3PO)."""

from __future__ import annotations

from pathlib import Path

import typer

from moekit.cli.screen import bars, console
from moekit.cli.steer import verbs


@verbs.command()
def reference(
    model: str = typer.Argument(help="A folder, a hub id, or refmoe; it is loaded into memory."),
    data: Path = typer.Option(..., help='Questions: JSON lines with "prompt" and "answer".'),
    out: Path = typer.Option(..., help="The reference set, a new folder."),
    max_tokens: int = typer.Option(64, min=1, help="Of an answer, at most."),
    stop: str = typer.Option("\\n", help='An answer ends before this text; "" for the end of the text.'),
    extract: str = typer.Option("", help="A regular expression; its last match is the answer."),
    batch_size: int = typer.Option(8, min=1, help="Questions that are answered together."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Allow code that the checkpoint brings."),
) -> None:
    """Let a model answer questions and keep those that it answers right, for `moekit decode --method c3po`."""
    import moekit
    from moekit.checkpoint.place import check_place
    from moekit.decoding.questions import Marking, load_questions, unescaped
    from moekit.decoding.references import build

    questions = load_questions(data)
    marking = Marking(unescaped(stop), extract)
    marking.check()
    check_place(out.absolute(), overwrite=False)
    opened = moekit.open(model, trust_remote_code=trust_remote_code)
    with bars() as progress:
        made = build(
            opened,
            questions,
            out,
            marking=marking,
            max_new_tokens=max_tokens,
            device=device,
            batch_size=batch_size,
            progress=progress,
        )
    console().print(f"{len(made)} of {len(questions)} questions answered right; their pathways are in {out}")
