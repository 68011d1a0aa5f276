"""A matrix as the product of two thin ones and a sparse rest: how it is found, kept and read back.

    W  ~  L R + S        L = U sqrt(D_r)   R = sqrt(D_r) V'   S = the largest entries of W - L R

U D V' is the singular value decomposition of W, D_r its r largest values. L R is the best matrix of rank r, S the best
correction of it with so many entries, both in the sense of least squares.

Where the entries of S lie is kept as one bit for each place of the matrix, or as the column of each entry and their
number in each row, whichever is smaller. Both are 16-bit words as a rule, like the numbers beside them: files are laid
out by the width of dtypes, and what is computed together is then written together.

Symbols: O output rows, I input columns, r rank, n entries of S.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moekit.errors import CheckpointError
from moekit.plans.factoring import COLUMNS, COUNTS, LEFT, MASK, RIGHT, VALUES, WORD, index_shapes


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L [..., O, r] and R [..., r, I] of matrices [..., O, I], float32; r is at most the smaller of O and I."""
    weight = weight.float()
    rows, columns = weight.shape[-2:]
    if rows > columns:
        left, right = low_rank(weight.mT, rank)
        return right.mT, left.mT
    values, vectors = torch.linalg.eigh(weight @ weight.mT)  # ascending: squares of D, and U
    basis = vectors[..., -min(rank, rows) :].flip(-1)
    roots = values[..., -min(rank, rows) :].flip(-1).clamp_min(0).sqrt().sqrt()  # sqrt of D
    safe = torch.where(roots > 0, roots, torch.ones_like(roots))
    return basis * roots[..., None, :], (basis.mT @ weight) * (roots > 0)[..., :, None] / safe[..., :, None]


def largest(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Whether an entry is among the `count` largest ones of its matrix [..., O, I], by magnitude; bool."""
    flat = matrix.abs().flatten(-2)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.scatter_(-1, flat.topk(count, dim=-1).indices, True).view(matrix.shape)


def pack_sparse(sparse: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """S as it is kept.

    Args:
        sparse: [O, I].
        chosen: bool [O, I], the entries that are kept; all others count as zero.

    Returns:
        By suffix: the entries in the order of rows, in the dtype of `sparse`, and where they lie.
    """
    rows, columns = sparse.shape
    count = int(chosen.sum())
    if not count:
        return {}
    out = {VALUES: sparse[chosen]}
    if MASK in index_shapes(rows, columns, count):
        bits = torch.nn.functional.pad(chosen, (0, -columns % WORD)).view(rows, -1, WORD)
        words = (bits << torch.arange(WORD, device=bits.device)).sum(-1)
        return out | {MASK: (words - (words >> (WORD - 1) << WORD)).to(torch.int16)}
    dtype = torch.int16 if columns < 2**15 else torch.int32
    return out | {COLUMNS: chosen.nonzero()[:, 1].to(dtype), COUNTS: chosen.sum(1).to(dtype)}


def unpack_sparse(parts: Mapping[str, torch.Tensor], rows: int, columns: int, name: str = "") -> torch.Tensor:
    """S, float32 [O, I], from what `pack_sparse` made.

    Raises:
        CheckpointError: the parts do not fit each other.
    """
    sparse = torch.zeros(rows, columns)
    if VALUES not in parts:
        return sparse
    values = parts[VALUES]
    if MASK in parts and parts[MASK].shape == (rows, -(-columns // WORD)):
        bits = parts[MASK][:, :, None].int() >> torch.arange(WORD) & 1
        chosen = bits.view(rows, -1)[:, :columns].bool()
        if int(chosen.sum()) == len(values):
            return sparse.masked_scatter_(chosen, values.float())
    elif COLUMNS in parts and COUNTS in parts:
        column, count = parts[COLUMNS].long(), parts[COUNTS].long()
        fits = len(column) == len(values) == int(count.sum()) and count.shape == (rows,)
        if fits and int(count.min()) >= 0 and int(column.min()) >= 0 and int(column.max()) < columns:
            sparse[torch.arange(rows).repeat_interleave(count), column] = values.float()
            return sparse
    raise CheckpointError(
        "the sparse part of a weight is damaged",
        where=name,
        got=f"{len(values)} entries for a matrix of {[rows, columns]}",
        fix="copy the checkpoint again",
    )


def read_back(parts: Mapping[str, torch.Tensor], name: str = "") -> torch.Tensor:
    """W, float32 [O, I], from its parts by suffix.

    Raises:
        CheckpointError: the parts do not fit each other.
    """
    left, right = parts[LEFT], parts[RIGHT]
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise CheckpointError(
            "the factors of a weight do not fit each other",
            where=name,
            expected="[O, r] and [r, I]",
            got=f"{list(left.shape)} and {list(right.shape)}",
        )
    return left.float() @ right.float() + unpack_sparse(parts, left.shape[0], right.shape[1], name)
