"""Measuring a model: held-out loss, multiple-choice questions, metrics of classifiers."""
