"""A compiled page as it is here, and as a processor without AVX-512 would have it."""

import functools
from types import ModuleType
from typing import Any

import pytest
from minivlm_kernels import compiled

OPTIONS = {
    "native": (),
    "AVX2": ("-mno-avx512f", "-mno-avxvnni"),
    "AVX-VNNI": ("-mno-avx512f",),
    "AVX-512": ("-mno-avx512bf16", "-mno-avx512vbmi", "-mno-avx512vnni"),
    "VNNI": ("-mno-avx512bf16", "-mno-avx512vbmi"),
}


def each_instruction_set(module: ModuleType, *names: str) -> Any:
    """A fixture that gives `module` its library, built once with each set of options, or with those named."""
    build = module._library.__wrapped__

    @functools.cache
    def built(*options: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "OPTIONS", (*compiled.OPTIONS, *options))
            return build()

    @pytest.fixture(params=names or OPTIONS)
    def library(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_library", lambda: built(*OPTIONS[request.param]))

    return library
