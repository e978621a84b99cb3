"""Candidate and reference side by side: what is paired, what is measured of both, and who measures it once for all."""
