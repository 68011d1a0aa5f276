"""All proofs of a family, and its line in docs/families.md."""

from __future__ import annotations

from family_proofs import NOTES, Specimen, disk_form, drops, ids_agree, permutes, reads, streams, writes_back
from serve_proofs import runs
from steer_proofs import steers

PROOFS = {
    "reads": reads,
    "writes back": writes_back,
    "permutes": permutes,
    "ids": ids_agree,
    "drops": drops,
    "streams": streams,
    "steers": steers,
    "runs": runs,
}


def row(specimen: Specimen) -> str:
    """Prove everything of one family; its line of the table."""
    layout = specimen.layout
    results = [proof(specimen) for proof in PROOFS.values()]
    notes = [x for x in (NOTES.get(specimen.name, specimen.entry.notes), layout.cannot_drop) if x]
    routers = "; ".join(dict.fromkeys(x.router.describe() for x in layout.routed))
    cells = [specimen.name, f"`{layout.architecture}`", routers, disk_form(layout), *results, "; ".join(notes)]
    return f"| {' | '.join(cells)} |"
