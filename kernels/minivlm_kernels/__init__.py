"""Triton kernels of minivlm: imports torch and triton only, and nothing of `minivlm`.

Importing this package, and reading its references, needs neither a GPU nor triton.
"""

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None
