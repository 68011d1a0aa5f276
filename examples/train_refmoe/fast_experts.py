"""A fast experts function for training on a CPU, for every gated MoE of transformers 5 with SiLU and plain weights.

Stock eager experts are slow to train: each `weights[expert]` in the graph makes a zero gradient of the size of all
experts. Here all experts of a layer are one autograd node. Rows are sorted by expert, and each expert's rows are padded
to a multiple of 64, because oneDNN compiles a kernel for every row count that it has not met (costly in bfloat16).

Importing this file registers the function as `padded`: `model.set_experts_implementation("padded")`.

Letters: T tokens, K experts chosen a token, E experts, D hidden size, I inner size, J = 2 I (gate and up), R rows with
padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROW_MULTIPLE = 64


def sort_by_expert(index_TK: Tensor, experts: int) -> tuple[list[int], Tensor, Tensor]:
    """Lays the (token, choice) pairs out by expert, each expert's rows padded to a multiple of `ROW_MULTIPLE`.

    Args:
        index_TK: chosen experts, int64.
        experts: their number E.

    Returns:
        Rows of each expert; the row of each pair, (T, K); the token of each row, (R,), where padding rows have token 0.
    """
    expert_of_pair = index_TK.reshape(-1)
    pairs = torch.arange(len(expert_of_pair))
    order = expert_of_pair.argsort(stable=True)
    pairs_E = torch.bincount(expert_of_pair, minlength=experts)
    rows_E = (pairs_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    padding_before_E = (rows_E - pairs_E).cumsum(0) - (rows_E - pairs_E)
    row_of_pair = torch.empty_like(pairs)
    row_of_pair[order] = pairs + padding_before_E[expert_of_pair[order]]
    token_R = torch.zeros(int(rows_E.sum()), dtype=torch.long)
    token_R[row_of_pair] = pairs // index_TK.shape[1]
    return rows_E.tolist(), row_of_pair.view_as(index_TK), token_R


def matmul_by_expert(rows_E: list[int], a_RX: Tensor, b_EXY: Tensor) -> Tensor:
    """Multiplies each expert's rows by its own matrix: (R, X), (E, X, Y) -> (R, Y)."""
    out_RY = a_RX.new_empty(a_RX.shape[0], b_EXY.shape[2])
    for a, b, out in zip(a_RX.split(rows_E), b_EXY, out_RY.split(rows_E), strict=True):
        if len(a):
            torch.mm(a, b, out=out)
    return out_RY


def outer_by_expert(rows_E: list[int], a_RX: Tensor, b_RY: Tensor) -> Tensor:
    """Sums the outer products of each expert's rows: (R, X), (R, Y) -> (E, X, Y), zero for an expert without rows."""
    out_EXY = a_RX.new_zeros(len(rows_E), a_RX.shape[1], b_RY.shape[1])
    for a, b, out in zip(a_RX.split(rows_E), b_RY.split(rows_E), out_EXY, strict=True):
        if len(a):
            torch.mm(a.t(), b, out=out)
    return out_EXY


class PaddedExperts(torch.autograd.Function):
    """y_t = sum over chosen e of w_te down_e (silu(gate_e x_t) * up_e x_t), forward and backward as one node each."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        rows_E, row_TK, token_R = sort_by_expert(index_TK, len(down_EDI))
        x_RD = x_TD[token_R]
        gate_up_RJ = matmul_by_expert(rows_E, x_RD, gate_up_EJD.transpose(1, 2))
        gate_RI, up_RI = gate_up_RJ.chunk(2, dim=1)
        inner_RI = nn.functional.silu(gate_RI) * up_RI
        out_RD = matmul_by_expert(rows_E, inner_RI, down_EDI.transpose(1, 2))
        ctx.rows_E = rows_E
        ctx.save_for_backward(x_RD, gate_up_RJ, inner_RI, out_RD, row_TK, token_R, weights_TK, gate_up_EJD, down_EDI)
        return (weights_TK.unsqueeze(1) @ out_RD[row_TK]).squeeze(1)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gate_up_RJ, inner_RI, out_RD, row_TK, token_R, weights_TK, gate_up_EJD, down_EDI = ctx.saved_tensors
        rows_E = ctx.rows_E
        d_weights_TK = (out_RD[row_TK] @ dy_TD.unsqueeze(2)).squeeze(2)
        weight_R = weights_TK.new_zeros(len(token_R))  # padding rows keep weight 0: no gradient flows through them
        weight_R[row_TK.reshape(-1)] = weights_TK.reshape(-1)
        d_out_RD = dy_TD[token_R] * weight_R[:, None]
        d_down_EDI = outer_by_expert(rows_E, d_out_RD, inner_RI)
        d_inner_RI = matmul_by_expert(rows_E, d_out_RD, down_EDI)
        gate_RI, up_RI = gate_up_RJ.chunk(2, dim=1)
        sigmoid_RI = gate_RI.sigmoid()
        silu_RI = gate_RI * sigmoid_RI
        d_gate_RI = d_inner_RI * up_RI * (sigmoid_RI + silu_RI * (1 - sigmoid_RI))
        d_gate_up_RJ = torch.cat((d_gate_RI, d_inner_RI * silu_RI), dim=1)
        d_gate_up_EJD = outer_by_expert(rows_E, d_gate_up_RJ, x_RD)
        d_x_RD = matmul_by_expert(rows_E, d_gate_up_RJ, gate_up_EJD)
        return d_x_RD[row_TK].sum(1), None, d_weights_TK, d_gate_up_EJD, d_down_EDI


def padded_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts contract of transformers 5: (T, D), (T, K), (T, K) -> (T, D)."""
    weights_TK = top_k_weights.to(hidden_states.dtype)
    return PaddedExperts.apply(hidden_states, top_k_index, weights_TK, self.gate_up_proj, self.down_proj)


ALL_EXPERTS_FUNCTIONS.register("padded", padded_experts_forward)
