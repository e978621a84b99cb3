"""From a claim file to pytest cases and back to a verdict."""
