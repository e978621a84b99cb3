"""Tensors in, numbers out: pure functions without files, pytest or global state."""
