"""Recording traces: a model reads a text (`trace`) or writes one (`trace_generation`), and its routers are watched."""

from moekit.recording.generation import trace_generation
from moekit.recording.reading import trace

__all__ = ["trace", "trace_generation"]
