"""Which tokens a running forward is made of: their places in their texts, and whether the model wrote them itself.

Symbols: B rows, S columns, T = B x S tokens as routers and experts see them, row after row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

Part = Literal["all", "prompt", "generated", "span"]


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward.

    Attributes:
        positions: place in the text, from 0; -1 for padding.
        generated: whether the token was written by the model (it is at or behind the prompt's end).
        tags: a number that the caller gave the token's text, to tell requests of one batch apart; None: none given.
    """

    positions: torch.Tensor
    generated: torch.Tensor
    tags: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        rows: int,
        columns: int,
        *,
        past: int = 0,
        prompt: int | torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        tags: torch.Tensor | None = None,
    ) -> Tokens:
        """The tokens of a rectangle.

        Args:
            rows: B.
            columns: S.
            past: columns that earlier forwards have run (they lie in the cache).
            prompt: columns, counted from the text's first, that were given and not written; [B] where rows differ;
                None: all that run now.
            mask: [B, past + S], 0 where there is padding on the left; None: no padding.
            tags: a number for each row.
        """
        column_BS = torch.arange(past, past + columns).expand(rows, -1)
        ends = torch.as_tensor(past + columns if prompt is None else prompt).reshape(-1, 1)
        place_BS = column_BS
        if mask is not None and mask.dim() == 2 and mask.shape == (rows, past + columns):
            real = mask.cpu().long()
            place_BS = torch.where(real > 0, real.cumsum(-1) - 1, -1)[:, past:]
        return cls(
            place_BS.reshape(-1),
            (column_BS >= ends).reshape(-1),
            None if tags is None else tags.reshape(-1, 1).expand(-1, columns).reshape(-1),
        )

    def within(self, part: Part, start: int = 0, end: int | None = None) -> torch.Tensor | None:
        """The tokens [T] of a part of their texts; None: all."""
        if part == "all":
            return None
        if part == "span":
            inside = self.positions >= start
            return inside if end is None else inside & (self.positions < end)
        return self.generated if part == "generated" else ~self.generated


@dataclass(frozen=True)
class Reach:
    """The tokens that a change is for.

    Attributes:
        part: of their text: all of it, the prompt, what the model has written, or a span of places.
        start: first place of a span.
        end: behind the last place of a span; None: open.
        tag: only texts with this number (`Tokens.tags`); None: all.
    """

    part: Part = "all"
    start: int = 0
    end: int | None = None
    tag: int | None = None

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Which tokens are in reach, bool [T]."""
        inside = tokens.within(self.part, self.start, self.end)
        out = torch.ones(len(tokens.positions), dtype=torch.bool) if inside is None else inside
        if self.tag is None:
            return out
        return out & (tokens.tags == self.tag) if tokens.tags is not None else torch.zeros_like(out)


EVERYWHERE = Reach()


class Clock:
    """Follows a model's forwards, and so knows where in its text each of their tokens stands.

    A forward without anything in its cache begins a new text: all of it is prompt, and what comes after is generated.
    That is how `generate` calls models; who calls them otherwise says what runs (`MoEView.at`).
    """

    def __init__(self) -> None:
        self._prompt = 0

    def tick(self, args: tuple, kwargs: dict[str, Any]) -> Tokens | None:
        """The tokens of the forward that is called with these arguments; None where they do not tell."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
            return None
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        rows, columns = ids.shape[:2]
        if past == 0:
            self._prompt = columns
        return Tokens.of(rows, columns, past=past, prompt=self._prompt, mask=kwargs.get("attention_mask"))
