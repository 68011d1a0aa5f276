"""Run a stock model layer by layer: one layer's weights in memory, the next being read, all batches through each.

The model's own forward runs once per batch, each in a thread of its own that stops at every decoder layer: the layer's
forward is a stub that hands its arguments over and waits. When all batches have arrived at layer i, its weights are
put in, the real layer runs on each batch's arguments in turn, and every thread goes on with its result to layer i + 1.
So whatever a family does before, between and after its layers (masks, positions, hyper-connections, pairs passed from
layer to layer) is done by the family's own code, and the result is the stock forward, bit for bit (that with
transformers' eager experts; its grouped ones round sums elsewhere). Only one thread runs at a time.

Hidden states that pass `spill_bytes` wait on disk. A checkpoint after a layer holds every batch's output; on resume
each thread walks again with all earlier stubs answering that output, which is exact where a layer's arguments depend
on the last output only. That is checked on the first batch before any checkpoint is written.

A fork is a second run of a batch that differs from some layer on (an expert is switched off there). Until then it is a
thread that is handed its batch's outputs, which costs nothing; so many changes are tried in one pass, each costing only
the layers behind it.
"""

from moekit.stream.checkpoints import Checkpoints
from moekit.stream.stream import DEFAULT_SPILL_BYTES, Fork, Stop, Stream

__all__ = ["DEFAULT_SPILL_BYTES", "Checkpoints", "Fork", "Stop", "Stream"]
