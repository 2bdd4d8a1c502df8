"""The layer-major step: every micro-batch goes through one block before the next block begins."""
