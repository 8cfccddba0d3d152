"""Ways to multiply one vector with a four- or eight-bit weight on a CPU, beside bf16: see `quantization/products.py`.

    python scripts/bench/int4_cpu.py [--shapes 4096x4096 14336x4096] [--rows 1 4 16 64] [--threads 2] [--rounds 20]

Every way takes its turn in each round, on its own copies of the weight, together larger than the caches; the best time
counts. Results are compared with fp32 first. ratio: bfloat16 F.linear / this.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from minivlm.quantization.affine import Affine, unpack
from minivlm.quantization.codebook import Codebook
from minivlm.quantization.int8 import Int8
from minivlm.quantization.linear import QuantizedLinear

SHAPES = ["4096x4096", "1024x4096", "14336x4096", "4096x14336", "32003x4096"]
FORMATS = {
    "int4, groups of 128": Affine(128),
    "int4, groups of 32": Affine(32),
    "int8": Int8(),
    "nf4": Codebook("nf4"),
    "nf4, doubly quantised": Codebook("nf4", nested=True),
}
COPIES = 128 * 2**20  # bytes of copies of one weight, so that none is found in the cache


def ways(weight: torch.Tensor, x: torch.Tensor) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """Name → the same product over several copies. weight (N, K) and x (M, K) are bf16."""
    rows, columns = weight.shape

    def copies(nbytes: int) -> range:
        return range(max(1, -(-COPIES // nbytes)))

    found = {}
    for dtype in (torch.bfloat16, torch.float16) if len(x) == 1 else (torch.bfloat16,):
        plain = [weight.to(dtype, copy=True) for _ in copies(weight.nbytes)]
        name = f"{str(dtype).removeprefix('torch.')} F.linear"
        found[name] = [lambda w=w: F.linear(x.to(w.dtype), w) for w in plain]
    for name, form in FORMATS.items():
        tensors = form.quantize(weight)
        layers = [QuantizedLinear(columns, rows, None, form) for _ in copies(form.nbytes((rows, columns)))]
        for layer in layers:
            layer.restore({leaf: value.clone() for leaf, value in tensors.items()}, torch.bfloat16)
        expected = x.float() @ layers[0].dequantize(torch.float32).T
        assert (layers[0](x) - expected).abs().max() <= 0.02 * expected.abs().max(), name
        found[name] = [lambda layer=layer: layer(x) for layer in layers]
        found[f"{name}: dequantised whole"] = [
            lambda layer=layer: F.linear(x, layer.dequantize(torch.bfloat16)) for layer in layers
        ]
        if isinstance(form, Affine):
            found[f"{name}: torch's operator"] = operators(form, tensors, x, len(layers))
    return found


def operators(form: Affine, tensors: dict[str, torch.Tensor], x: torch.Tensor, count: int) -> list[Callable[[], Any]]:
    """`_weight_int4pack_mm_for_cpu`, which wants outputs by 64: those beyond are left out."""
    columns, whole = x.shape[1], len(tensors["qweight"]) // 64 * 64
    codes, scales = unpack(tensors["qweight"][:whole], columns).int(), tensors["scales"][:whole].float()
    shifts = (8 - tensors["zeros"][:whole].float()) * scales
    steps = torch.stack([scales, shifts], dim=2).transpose(0, 1).bfloat16().contiguous()  # (G, N, 2)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return [lambda p=part: product(x, p, form.group_size, steps) for part in [packed.clone() for _ in range(count)]]


@torch.no_grad()
def best(found: dict[str, list[Callable[[], torch.Tensor]]], rounds: int) -> dict[str, float]:
    """The shortest time of each way in seconds."""
    turns = {name: itertools.cycle(calls) for name, calls in found.items()}
    times = dict.fromkeys(found, float("inf"))
    for _ in range(rounds):
        for name, calls in turns.items():
            call = next(calls)
            begun = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - begun)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16], help="of x")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads; milliseconds")
    for shape, rows in itertools.product(args.shapes, args.rows):
        outputs, inputs = map(int, shape.split("x"))
        weight = (torch.randn(outputs, inputs) * 0.02).bfloat16()
        times = best(ways(weight, torch.randn(rows, inputs).bfloat16()), args.rounds)
        print(f"\n| {shape}, {rows} rows | ms | ratio |\n|---|---:|---:|")
        for name, seconds in times.items():
            print(f"| {name} | {1e3 * seconds:.3f} | {times['bfloat16 F.linear'] / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
