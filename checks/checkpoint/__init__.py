"""One checkpoint, from disk or hub: its index, the roles of its tensors, its weights in canonical form."""
