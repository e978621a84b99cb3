"""Asking models: local checkpoints and OpenAI-compatible endpoints, always greedily, every answer bounded and kept."""
