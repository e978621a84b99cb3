"""Thresholds, records and the judge: what a measured value means for a claim."""
