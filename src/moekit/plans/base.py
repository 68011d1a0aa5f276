"""What all ops are."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Op(BaseModel):
    """One change to one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
