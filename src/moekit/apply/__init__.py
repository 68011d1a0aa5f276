"""Carrying out plans: on disk (bake) and on a live model (live)."""
