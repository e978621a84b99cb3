"""Checkpoints on disk: index, tensor roles, and the pass that compares two of them."""
