"""Building or loading a model, converting its linear layers, and the loss."""
