"""Number formats as pure functions: the int8 weight grid, packed 4-bit bases, counter-based random bits, rounding.

Everything here is plain PyTorch and is the specification that faster kernels are tested against.
"""
