"""A matrix as two thin ones and a sparse rest: the best of its kind, kept small, read back as it was."""

from __future__ import annotations

import pytest
import torch

from moekit.checkpoint.reader import DTYPES
from moekit.errors import CheckpointError
from moekit.families.factors import largest, low_rank, pack_sparse, read_back, unpack_sparse
from moekit.plans.factoring import COLUMNS, COUNTS, LEFT, MASK, RIGHT, VALUES, entries, factored_bytes, index_shapes


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (3, 16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 100])
def test_the_product_is_the_best_of_its_rank(shape, rank):
    weight = drawn(*shape)
    left, right = low_rank(weight, rank)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    r = min(rank, *shape[-2:])
    best = u[..., :r] * s[..., None, :r] @ v[..., :r, :]
    assert left.shape == (*shape[:-1], r)
    assert right.shape == (*shape[:-2], r, shape[-1])
    assert torch.allclose((left @ right).double(), best, atol=1e-5)
    # both factors are as large as the other: sqrt of the singular values on either side
    assert torch.allclose((left.mT @ left).diagonal(dim1=-2, dim2=-1), s[..., :r].float(), atol=1e-4)
    assert torch.allclose((right @ right.mT).diagonal(dim1=-2, dim2=-1), s[..., :r].float(), atol=1e-4)


def test_matrices_of_low_rank_and_zeros_are_no_trouble():
    weight = drawn(12, 3) @ drawn(3, 30, seed=1)
    left, right = low_rank(weight, 6)
    assert left.isfinite().all()
    assert right.isfinite().all()
    assert torch.allclose(left @ right, weight, atol=1e-4)
    assert not torch.cat([x.flatten() for x in low_rank(torch.zeros(4, 9), 2)]).any()


def test_the_largest_entries_are_exactly_as_many_as_asked_for():
    matrix = drawn(2, 7, 9).round(decimals=1)  # with ties
    for count in (0, 1, 13, 63):
        chosen = largest(matrix, count)
        assert chosen.flatten(1).sum(1).tolist() == [count, count]
        for one, kept in zip(matrix.abs(), chosen, strict=True):
            assert not count or count == 63 or one[kept].min() >= one[~kept].max()


@pytest.mark.parametrize(("rows", "columns"), [(9, 33), (16, 16), (5, 300)])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_back(rows, columns, density, dtype):
    sparse = drawn(rows, columns).to(dtype)
    count = entries(rows, columns, density)
    chosen = largest(sparse, count)
    parts = pack_sparse(sparse, chosen)
    shapes = index_shapes(rows, columns, count)
    assert {x: (DTYPES[d], s) for x, (d, s) in shapes.items()} == {
        x: (y.dtype, tuple(y.shape)) for x, y in parts.items() if x != VALUES
    }
    assert torch.equal(unpack_sparse(parts, rows, columns), sparse.float() * chosen)
    left, right = low_rank(sparse, 4)
    parts |= {LEFT: left.to(dtype), RIGHT: right.to(dtype)}
    whole = read_back(parts)
    assert torch.equal(whole, left.to(dtype).float() @ right.to(dtype).float() + sparse.float() * chosen)
    held = sum(x.numel() * x.element_size() for x in parts.values())
    assert held == factored_bytes(rows, columns, 4, density, dtype.itemsize)


def test_the_smaller_index_is_taken():
    assert index_shapes(64, 256, 1638).keys() == {MASK}  # a bit for each place: 2048 bytes against 3404
    assert index_shapes(64, 256, 200).keys() == {COLUMNS, COUNTS}  # 528 bytes
    assert index_shapes(8, 40_000, 100)[COLUMNS] == ("I32", (100,))
    assert index_shapes(8, 8, 0) == {}


def test_damage_is_refused():
    sparse = drawn(6, 40)
    good = pack_sparse(sparse, largest(sparse, 24))
    listed = pack_sparse(sparse, largest(sparse, 3))
    assert COLUMNS in listed
    bad = [
        good | {VALUES: good[VALUES][:-1]},
        good | {MASK: good[MASK][:, :-1]},
        {VALUES: good[VALUES]},
        listed | {COUNTS: listed[COUNTS] + 1},
        listed | {COLUMNS: listed[COLUMNS] + 40},
        listed | {COLUMNS: listed[COLUMNS] - 40},
    ]
    for parts in bad:
        with pytest.raises(CheckpointError, match="damaged"):
            unpack_sparse(parts, 6, 40, "some.weight")
    with pytest.raises(CheckpointError, match="do not fit"):
        read_back({LEFT: torch.zeros(4, 2), RIGHT: torch.zeros(3, 4)})
