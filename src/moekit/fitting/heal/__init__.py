"""The passes of healing: sums for router rows, layers tuned one by one, the whole model tuned, alone or by several.

Each takes a `moekit.fitting.Fit` and returns a plan whose `Values` are the new numbers.
"""
