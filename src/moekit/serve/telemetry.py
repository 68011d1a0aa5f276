"""What an engine has done so far: where the time went, how long tokens took, what was found in memory.

Time splits so: a forward's time is what it computed plus what it stalled, waiting for experts from the disk. Reading is
the time that readers were busy, several at once and mostly while experts in memory computed; only what of it could not
be hidden is a stall.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

QUANTILES = (0.5, 0.95, 0.99)
LAST = 4096  # times that quantiles are taken of


def quantile(times: Iterable[float], share: float) -> float:
    """The smallest of the times that at least this share of them do not exceed; nan of none."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass
class Times:
    """Times of one kind, s: their number and sum, and the last ones for quantiles."""

    count: int = 0
    sum_s: float = 0.0
    last_s: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.sum_s += seconds
        self.last_s.append(seconds)

    def quantiles(self) -> dict[float, float]:
        """p50, p95 and p99 of the last ones, s."""
        last = list(self.last_s)
        return {share: quantile(last, share) for share in QUANTILES}


@dataclass
class Telemetry:
    """Sums since the start.

    Attributes:
        forward_s: in forwards, by what ran: "prefill" or "decode".
        stall_s: of it, waiting for the disk.
        read_bytes: from the disk meanwhile.
        tokens: that forwards have run, by the same kinds (of decoding: tokens written).
        forwards: their number, by kind.
        first: from a request's arrival to its first token, queue included.
        token: between a request's tokens.
        finished: requests, by how they ended.
    """

    forward_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    stall_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    read_bytes: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    forwards: Counter[str] = field(default_factory=Counter)
    first: Times = field(default_factory=Times)
    token: Times = field(default_factory=Times)
    finished: Counter[str] = field(default_factory=Counter)

    def forward(self, kind: str, tokens: int, seconds: float, stall_s: float, read_bytes: int) -> None:
        """Note a forward."""
        self.forwards[kind] += 1
        self.tokens[kind] += tokens
        self.forward_s[kind] += seconds
        self.stall_s[kind] += stall_s
        self.read_bytes[kind] += read_bytes

    @property
    def total_s(self) -> float:
        """In forwards."""
        return sum(self.forward_s.values())

    @property
    def compute_s(self) -> float:
        """In forwards, without waiting for the disk."""
        return self.total_s - sum(self.stall_s.values())
