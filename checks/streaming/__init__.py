"""Which bytes are read, and how: plans, samples, and the pass that reads each byte once."""
