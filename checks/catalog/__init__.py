"""What is known of public models, every figure with its source; and which architectures are near to one another."""

from __future__ import annotations
