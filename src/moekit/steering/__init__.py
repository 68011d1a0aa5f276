"""Steering: find the experts behind a difference between texts, test what changing them does, and to what else.

`find` makes a plan of two kinds of text, `test` measures it beside controls, `label_answers` labels what a model says.
"""

from moekit.steering.finding import find
from moekit.steering.texts import load_kinds, load_texts

__all__ = ["find", "load_kinds", "load_texts"]
