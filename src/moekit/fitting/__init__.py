"""Decide what to do to a model: from statistics where they are enough, by passes over text with weights where not.

    plan = decide("router-lstsq", Fit(model, source, stats, data, folder), keep=..., ...)

What a fitted method computes beyond statistics (rounded weights, router rows, ...) lies in the plan's tensors, a file a
layer, so that an interrupted fit goes on where it stopped. The mathematics is the method's, in `moekit.methods`; the
passes are here, a file a kind of fit, named in `FITTED`.
"""

from moekit.fitting.decide import FITTED, Fit, decide, needs_model

__all__ = ["FITTED", "Fit", "decide", "needs_model"]
