"""Trained tensors: a weight with all that belongs to it, from where its gradient arrives to how it is written back."""
