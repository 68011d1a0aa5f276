"""Decoding by experts: other next-token distributions made of several passes of one model, or of several models."""
