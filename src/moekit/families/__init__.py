"""Families of MoE models: one general implementation on the experts contract of transformers 5, a file per true exception."""
