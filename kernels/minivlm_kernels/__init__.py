"""Triton kernels of minivlm; imports only torch and triton, nothing of `minivlm`.

Importing this package, and reading its references, needs neither a GPU nor triton.
"""

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed, found without importing it."""
    return importlib.util.find_spec("triton") is not None
