"""Exports of a trained model for other programs."""
