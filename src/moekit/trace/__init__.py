"""Traces: what the routers did on a text, on disk (`store`) and as tables of statistics (`tables`)."""

from moekit.trace.store import LayerTrace, Trace
from moekit.trace.table import Table

__all__ = ["LayerTrace", "Table", "Trace"]
