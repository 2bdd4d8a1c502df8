"""Layers whose weights are stored, not trained, beside zero leaves that receive the gradients."""
