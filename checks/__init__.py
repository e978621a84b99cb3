"""Tests of the statement "this model was trained from scratch": one module per family of checks."""
