"""Verdicts and evidence for people and machines."""
