"""Triton kernels of minivlm: imports torch and triton only, and nothing of `minivlm`."""
