"""The inner optimizers, which step Δ from zero: our own, and any of PyTorch's that passes a check."""
