"""Families of MoE models: one general implementation on the experts contract, one small file an exception."""
