"""The method: linear layers with a zero leaf Δ, projectors, the lazy refresh schedule and the optimizer that merges."""
