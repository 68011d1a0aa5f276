"""Telemetry in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

from moekit.serve.scheduler import Scheduler
from moekit.serve.telemetry import Times


class Metrics:
    """Collects from a scheduler and its engine whenever it is asked.

    Args:
        scheduler: whose work it is.
        answers: error answers so far, by HTTP status.
    """

    def __init__(self, scheduler: Scheduler, answers: Mapping[int, int]):
        self.scheduler, self.answers = scheduler, answers
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """Every family of numbers; prometheus_client calls it."""
        engine = self.scheduler.batcher.engine
        told, counts, memory = engine.telemetry, engine.cache.counts, asdict(engine.memory)
        layers = engine.cache.indices
        yield _gauge("requests_running", "texts that are read or written now", self.scheduler.running)
        yield _gauge("requests_waiting", "texts in the queue", self.scheduler.waiting)
        yield _counter("requests", "texts that have ended, by how", told.finished, "finish")
        yield _counter("errors", "answers other than 200, by HTTP status", self.answers, "code")
        yield _counter("tokens", "tokens run, of prompts (prefill) and written (decode)", told.tokens, "kind")
        yield _counter("forwards", "forwards of the model", told.forwards, "kind")
        yield _counter("forward_seconds", "time in forwards, computing and stalling", told.forward_s, "kind")
        yield _counter("stall_seconds", "time in forwards, waiting for experts from the disk", told.stall_s, "kind")
        yield _counter("expert_read_seconds", "time that readers were busy, several at once", counts.read_s)
        yield _counter("expert_read_bytes", "bytes of experts from the disk", told.read_bytes, "kind")
        yield _counter("expert_hits", "experts found in memory", dict(zip(layers, counts.hits, strict=True)), "layer")
        yield _counter("expert_misses", "experts read", dict(zip(layers, counts.misses, strict=True)), "layer")
        yield _summary("time_to_first_token_seconds", "from a request's arrival to its first token", told.first)
        yield _summary("time_per_token_seconds", "between a request's tokens", told.token)
        yield _gauge("expert_slots", "experts that fit in memory", memory.pop("slots"))
        yield _gauge("memory_budget_bytes", "of the whole process", memory.pop("budget"))
        yield _gauge("memory_bytes", "how the budget is divided", memory, "part")


def _gauge(name: str, words: str, value: float | Mapping[Any, float], label: str = "") -> Any:
    return _filled(GaugeMetricFamily("moekit_" + name, words, labels=[label] if label else []), value)


def _counter(name: str, words: str, value: float | Mapping[Any, float], label: str = "") -> Any:
    return _filled(CounterMetricFamily("moekit_" + name, words, labels=[label] if label else []), value)


def _filled(family: Any, value: float | Mapping[Any, float]) -> Any:
    if not isinstance(value, Mapping):
        family.add_metric([], value)
        return family
    for key, number in list(value.items()):
        family.add_metric([str(key)], number)
    return family


def _summary(name: str, words: str, times: Times) -> Any:
    """All times' number and sum, and quantiles of the last ones."""
    family = SummaryMetricFamily("moekit_" + name, words, count_value=times.count, sum_value=times.sum_s)
    for share, seconds in times.quantiles().items():
        family.add_sample(family.name, {"quantile": str(share)}, seconds)
    return family
