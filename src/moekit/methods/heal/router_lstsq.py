"""Router least squares: new rows for the routers, so that their logits are again what the source's were. No gradients.

    W + Delta = argmin over V of  sum over t of |V x_t - z*_t|^2  +  lambda |V - W|^2
    Delta     = (sum of (z*_t - z_t) x_t^T) (sum of x_t x_t^T + lambda 1)^-1
    lambda    = ridge * mean of the diagonal of  sum of x_t x_t^T

x_t    input of the router's linear map in the student, whose layers before are healed already
z_t    the student's logits, W x_t (plus a bias, where it has one: then x_t gets a last coordinate 1)
z*_gt  what expert g should have: with the source's logits u on the same token, over the source's experts j that g is
       made of (one, if it was only kept)
           target = max   max of u_j
           target = sum   the logit whose score is what the members had together:
                          softmax         log sum of exp u_j
                          sigmoid         log(exp(sum of softplus u_j) - 1): that one of them is wanted, if each is with
                                          probability sigmoid u_j, independently. Scores stay below 1
                          softplus-sqrt   log(exp((sum of sqrt softplus u_j)^2) - 1)

Layers are healed one after the other; the targets are of the source's own pass over the same text.

Paper: none for the whole. Least-squares repair of router rows is named as an option of merging where experts are merged
(P. Li et al., "Merge, Then Compress", arXiv 2310.01334, keeps the dominant expert's row). Deviations: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn.functional import softplus

from moekit.methods._registry import method

SMALLEST = 1e-12


@dataclass
class RowSums:
    """Sums over tokens from which rows are solved. Symbols: T tokens, D inputs (with the bias: one more), G rows.

    Attributes:
        bias: the map has one.
        ridge: lambda over the mean diagonal.
        target: "max" or "sum".
        tokens: taken in.
        gram: sum of x x^T, float64 [D, D].
        cross: sum of (z* - z) x^T, float64 [G, D].
        squares: sum of |z* - z|^2.
    """

    bias: bool
    ridge: float
    target: str
    tokens: int = 0
    gram: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    cross: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: float = 0.0

    def add(self, inputs_TD: torch.Tensor, logits_TG: torch.Tensor, targets_TG: torch.Tensor) -> None:
        """Take tokens in: what the map was given, what it gave, what it should have given."""
        x_TD, missing_TG = inputs_TD.double(), targets_TG.double() - logits_TG.double()
        if self.bias:
            x_TD = torch.cat([x_TD, x_TD.new_ones(len(x_TD), 1)], 1)
        self.tokens += len(x_TD)
        self.gram = self.gram.to(x_TD.device) + x_TD.T @ x_TD
        self.cross = self.cross.to(x_TD.device) + missing_TG.T @ x_TD
        self.squares += float(missing_TG.square().sum())

    def solve(self) -> torch.Tensor:
        """What is to be added to the rows (and, in a last column, to the bias), float64 [G, D]."""
        diagonal = self.ridge * self.gram.diagonal().mean().clamp_min(SMALLEST)
        ridged = self.gram + diagonal * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return torch.linalg.solve(ridged, self.cross.T).T

    def errors(self, change_GD: torch.Tensor) -> tuple[float, float]:
        """Mean squared error of a logit without and with a change of the rows."""
        entries = max(1, self.tokens * len(self.cross))
        gained = 2 * (change_GD * self.cross).sum() - ((change_GD @ self.gram) * change_GD).sum()
        return self.squares / entries, (self.squares - float(gained)) / entries


def together(logits_TE: torch.Tensor, groups: Sequence[Sequence[int]], score: str, target: str) -> torch.Tensor:
    """What the router should give experts that are made of several, float64 [T, G].

    Args:
        logits_TE: of the source.
        groups: for each of the student's experts, the source's that it is made of.
        score: of the router, as in `moekit.layout.Router`.
        target: "max" or "sum".
    """
    columns = [logits_TE[:, list(group)].double() for group in groups]
    return torch.stack([x[:, 0] if x.shape[1] == 1 else _one(x, score, target) for x in columns], 1)


def _one(logits_TM: torch.Tensor, score: str, target: str) -> torch.Tensor:
    if target == "max":
        return logits_TM.amax(-1)
    if score.startswith("sigmoid"):
        return _inverse_softplus(softplus(logits_TM).sum(-1))
    if score.startswith("softplus-sqrt"):
        return _inverse_softplus(softplus(logits_TM).sqrt().sum(-1).square())
    return logits_TM.logsumexp(-1)


def _inverse_softplus(y: torch.Tensor) -> torch.Tensor:
    """log(exp y - 1), for large y too."""
    return y + torch.log(-torch.expm1(-y.clamp_min(SMALLEST)))


@method("router-lstsq", kind="heal", summary="solves the routers' rows for the source's logits; no gradients")
def sums(bias: bool, *, target: Literal["max", "sum"] = "max", ridge: float = 0.01, teacher: str = "") -> RowSums:
    """Empty sums for one layer's router; `teacher` names the model whose logits are wanted, if not the source."""
    return RowSums(bias, ridge, target)
