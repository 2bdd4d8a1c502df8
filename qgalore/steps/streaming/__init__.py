"""Blocks whose weights live in host memory, and come to the device for their turn in a walk."""
