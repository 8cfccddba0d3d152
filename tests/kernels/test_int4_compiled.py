"""The four-bit kernels compile for real chips, fit their shared memory and keep their numbers in registers."""

import math
from collections.abc import Iterator

import pytest
import torch
from aot import assert_fit, job
from minivlm_kernels.int4_dequant import Launch, Packed, affine, table
from minivlm_kernels.int4_matmul import MATMUL, MATMUL_FP32, MATVEC, launches

K = 4096
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def weights(N: int, K: int = K) -> dict[str, Packed]:
    blocks, groups = math.ceil(N * K / 64), (N, math.ceil(K / 64))
    flat, rows = meta(math.ceil(N * K / 2), dtype=torch.uint8), meta(N, math.ceil(K / 2), dtype=torch.uint8)
    code = meta(16)
    nested = (meta(256), meta(math.ceil(blocks / 256)), meta(1))
    return {
        "nf4": table(flat, meta(blocks), code, (N, K)),
        "nested": table(flat, meta(blocks, dtype=torch.uint8), code, (N, K), nested=nested),
        "int4": affine(rows, meta(*groups, dtype=torch.float16), meta(*groups, dtype=torch.uint8), 64, (N, K)),
    }


def shipped() -> Iterator[tuple[str, Launch]]:
    """(name, launch) of every kernel and tile that may be chosen, for every format and dtype."""
    for dtype in DTYPES:
        tiles = MATMUL_FP32 if dtype == torch.float32 else MATMUL
        for N, M in [(max(least, 1024), 1) for least in MATVEC] + [(8192, most) for most in tiles]:
            x, bias, out = meta(M, K, dtype=dtype), meta(N, dtype=dtype), meta(M, N, dtype=dtype)
            for kind, weight in weights(N).items():
                yield f"{kind} {M}×{N} {dtype}", launches(out, x, weight, bias)[0]
        for M in (1, 16):
            x, out = meta(M, 4304, dtype=dtype), meta(M, 1152, dtype=dtype)
            for kind, weight in weights(1152, 4304).items():  # blocks straddle rows
                yield f"{kind} {M}×1152×4304 {dtype}", launches(out, x, weight, None)[0]
        for odd in (4096, 4304, 4303):
            for kind, weight in weights(1152, odd).items():
                yield f"{kind} dequantize 1152×{odd} {dtype}", weight.dequantize_launch(meta(1152, odd, dtype=dtype))
        x, bias, out = meta(16, K, dtype=dtype), meta(1024, dtype=dtype), meta(16, 1024, dtype=dtype)
        yield f"reduce {dtype}", launches(out, x, weights(1024)["nf4"], bias)[1]


@pytest.mark.parametrize("arch", [80, 90])
def test_what_decoding_and_training_run(arch: int) -> None:
    """The doubly quantised format in bf16: what QLoRA's users have."""
    wanted = [x for name, x in shipped() if "nested" in name and "bfloat16" in name and "1152×43" not in name]
    assert_fit([job(launch, arch) for launch in wanted])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
def test_everything(arch: int | str) -> None:
    assert_fit([job(launch, arch) for _, launch in shipped()])
