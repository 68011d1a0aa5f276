"""docs/families.md: the lines that the proofs return, and what they mean."""

from pathlib import Path

import transformers

from family_rows import PROOFS

NO_CONTRACT = ("doge", "jetmoe", "longcat_flash")  # routed experts of their own kind
DOCS = Path(__file__).parents[1] / "docs" / "families.md"
HEAD = """# Families

One line for each family of transformers {version} that carries the experts contract, and for Llama 4; after them models
that hold one of these beside vision or audio. The line is written by the test that proves it (`tests/test_families.py`
on tiny random models; `MOEKIT_WRITE_DOCS=1 pytest tests/test_families.py` writes this page), so it says what was
measured, not what was hoped for. Everything was run on text alone, on a CPU. Routers are described for the default
settings of the family's config.

Of {total} lines, {reads} are read, {writes} written back, {permutes} permuted, {ids} watched, {drops} cut,
{streams} streamed, {steers} steered, {runs} run from a store.

- **reads**: layers, experts, k, groups, biases, shared experts and sizes are those of the stock model, and the tensors
  found on disk with their expert axes are exactly those that change when the config asks for more experts.
- **writes back**: a plan that changes nothing gives the same tensors under the same names, byte for byte.
- **permutes**: experts put into another order (within their groups) together with router rows, biases and tables, on
  disk, leave the stock model's logits alike to 1e-5.
- **ids**: chosen experts and weights that an observer sees are those that the stock router returned; every chosen pair
  is shown once; the weighted outputs sum to the layer's output; watched logits are bit-identical to unwatched ones in
  fp32.
- **drops**: half of the experts banned in the live model (no token ever chooses them; afterwards the model is the same
  bit for bit) and the checkpoint baked with half of the experts, in stock transformers, give the same logits to 1e-4.
- **streams**: one layer at a time equals the stock forward with eager experts bit for bit, in fp32 and in bf16; in fp32
  also with all hidden states on disk and after an interrupt. moekit's own experts function, which is used to show
  outputs and is faster, is bit-identical to eager in fp32; in bf16 a layer's routed sum differs by at most 1/64 of its
  largest value.
- **steers**: an expert that is forced is among every token's experts; one that is banned from a place on is used by no
  token from there, and what comes before is as it was; a bias makes its expert chosen more often; swapping experts is
  what renumbering their weights is; tokens that an edit is not for are routed as without it, bit for bit.
- **runs**: packed in bf16 and run from the store in chunks with a cache of keys and values, the logits are those of
  stock eager experts in the same chunks, bit for bit (Llama 4: to 2%, for stock multiplies all tokens with all experts
  at once).

"refused" is a clear error that gives the reason in the last column. Families whose experts do not follow the contract
are refused as a whole, among them {refused}.

"""
COLUMNS = ["family", "class", "router", "experts on disk", *PROOFS, "notes"]


def page(rows: list[str], version: str = transformers.__version__) -> str:
    """docs/families.md, as proven with a version of transformers."""
    verdicts = [line.strip("| ").split(" | ")[4:] for line in rows]
    count = [sum(x[i] == "yes" for x in verdicts) for i in range(len(PROOFS))]
    names = ("reads", "writes", "permutes", "ids", "drops", "streams", "steers", "runs")
    numbers = dict(zip(names, count, strict=True))
    refused = ", ".join(NO_CONTRACT)
    head = HEAD.format(refused=refused, total=len(rows), version=".".join(version.split(".")[:2]), **numbers)
    return "\n".join([head + f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS), *rows, ""])


def rows_of(text: str) -> list[str]:
    """The families' lines of the page."""
    return [line for line in text.splitlines() if line.startswith("| ")][2:]
