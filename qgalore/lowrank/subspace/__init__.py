"""The subspace that a gradient is projected into: finding it, when to look again, and what moves with it."""
