"""A compiled page as it is here, and as processors with fewer instruction sets would have it."""

import functools
from types import ModuleType
from typing import Any

import pytest
from minivlm_kernels import compiled, processor

WITHOUT = {
    "native": (),
    "AVX2": ("avx512f", "avx_vnni"),
    "AVX-VNNI": ("avx512f",),
    "AVX-512": ("avx512_bf16", "avx512vbmi", "avx512_vnni"),
    "VNNI": ("avx512_bf16", "avx512vbmi"),
}


def each_instruction_set(module: ModuleType, *names: str) -> Any:
    """A fixture that gives `module` its library, built once without each of these, or without those named."""
    build = module._library.__wrapped__

    @functools.cache
    def built(*sets: str) -> Any:
        options = (compiled.FORBIDDEN[name] for name in sets if name in processor.own_sets())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "OPTIONS", (*compiled.OPTIONS, *options))
            return build()

    @pytest.fixture(params=names or WITHOUT)
    def library(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_library", lambda: built(*WITHOUT[request.param]))

    return library
