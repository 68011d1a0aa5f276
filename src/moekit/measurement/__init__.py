"""Statistics of a model on text, taken in one streamed pass."""

from moekit.measurement.gatherer import Gatherer
from moekit.measurement.origin import manifest_of, versions
from moekit.measurement.run import gather, measure

__all__ = ["Gatherer", "gather", "manifest_of", "measure", "versions"]
