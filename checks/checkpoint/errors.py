"""Why a checkpoint could not be read."""

from __future__ import annotations


class CheckpointUnavailable(Exception):
    """Evidence could not be had: weights missing, gated, corrupt or in a format that is not read.

    Never an accusation: the case is an error, or skipped as unavailable with --allow-missing. The text names the file
    or tensor, what was expected, and what to do.
    """
