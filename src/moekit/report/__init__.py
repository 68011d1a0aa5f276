"""Reports of traces: one self-contained HTML page (`page`), and the same numbers as JSON (`data`)."""

from moekit.report.data import collect
from moekit.report.page import render
from moekit.report.steering import steering_page
from moekit.report.write import read_json, write

__all__ = ["collect", "read_json", "render", "steering_page", "write"]
