"""Steering: find the experts behind a difference between texts, test what changing them does, and what else it does.

`find` makes a plan of two kinds of text, `assess` measures it beside controls, `label_answers` labels what a model
says.
"""

from moekit.steering.answers import answered, label_answers
from moekit.steering.assessment import Assessment, assess
from moekit.steering.finding import find
from moekit.steering.texts import load_kinds, load_texts

__all__ = ["Assessment", "answered", "assess", "find", "label_answers", "load_kinds", "load_texts"]
