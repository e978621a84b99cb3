"""A class with the name of another one, for test_typed_json.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outer:
    """Not that of the test."""
