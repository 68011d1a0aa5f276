"""Checkpoints on disk: lazy reading by tensor and by expert, streamed atomic writing."""
