"""What the compiler makes of the main configurations, without a GPU: the table in kernels/README.md.

    PYTHONPATH=.:kernels:tests python tests/kernels/inspect_kernels.py [--arch 90]

Registers, spills and shared memory are read from the machine code. Loops are counted in PTX: all instructions of the
first innermost loop (tiles that need no comparison), and among them comparisons and selections; then those of the next
(tiles at an edge), where there is one. "a weight" divides by the weights that a thread decodes in one turn.
"""

import argparse
import re

import aot
import test_decode_attention
import test_flash_attention
import test_int4_compiled
import torch
from minivlm_kernels.int4_matmul import launches

KINDS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync",
    "cp.async": r"cp\.async\.cg",  # 16 bytes
    "16-byte loads, evicted first": r"ld\.global\S*evict_first\S*\.v4\.b32",
}


def configurations(arch: int) -> dict[str, aot.Job]:
    """Names and jobs, all in bf16."""
    found = {}
    for D, kind in ((128, "causal"), (72, "full"), (80, "full"), (64, "full")):
        jobs = test_flash_attention.jobs(arch, torch.bfloat16, D, kind)
        found |= {f"{name}, {D}, {kind}": job for name, job in zip(("forward", "dq", "dk+dv"), jobs, strict=True)}
    found["decode, 128"] = test_decode_attention.jobs(arch, torch.bfloat16, 128, 4, T=1, described=False)[0]
    for N, M in ((14336, 1), (8192, 16), (8192, 128)):
        x, out = (test_int4_compiled.meta(M, columns, dtype=torch.bfloat16) for columns in (4096, N))
        for kind, weight in test_int4_compiled.weights(N).items():
            if M == 1 or kind == "nested":
                found[f"{kind}, M = {M}"] = aot.job(launches(out, x, weight, None)[0], arch)
    return found


def loops(ptx: str) -> list[list[str]]:
    """The operations of each innermost loop, in order."""
    lines = ptx.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\$L\w+):", line))}
    jumps = [
        (labels.get(m[1], len(lines)), n)
        for n, line in enumerate(lines)
        if (m := re.search(r"bra\S*\s+(\$L\w+)", line))
    ]
    spans = [(first, last) for first, last in jumps if first < last]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    operation = re.compile(r"\s+(?:@!?%\w+\s+)?([a-z][\w.:]*)")
    return [[m[1] for line in lines[first:last] if (m := operation.match(line))] for first, last in sorted(inner)]


def described(job: aot.Job, info: aot.Compiled) -> str:
    kinds = ", ".join(name for name, pattern in KINDS.items() if re.search(pattern, info.ptx))
    counts = []
    for operations in loops(info.ptx)[:2]:
        compared = sum(operation.startswith(("setp", "selp")) for operation in operations)
        counts.append(f"{len(operations)} ({compared})")
    tile = " × ".join(str(job.constexprs[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in job.constexprs)
    if "matvec" in job.kernel and counts:
        weights = job.constexprs["BLOCK_N"] * job.constexprs["BLOCK_K"] / (32 * job.num_warps)
        counts[0] += f", {len(loops(info.ptx)[0]) / weights:.1f} a weight"
    warps = f"{job.num_warps} warp{'s' * (job.num_warps > 1)}"
    usage = f"{info.registers} | {info.spill_bytes} | {info.shared / 1024:.1f} KiB"
    return f"{tile}, {warps} | {usage} | {kinds} | {'; '.join(counts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    arch = parser.parse_args().arch
    import triton

    wanted = configurations(arch)
    print(f"sm_{arch}, bf16, triton {triton.__version__}\n")
    print("| kernel, width or format | tile | registers | spills | shared | instructions | loop: all (comparisons) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, job), info in zip(wanted.items(), aot.compile_kernels(list(wanted.values()), ptx=True), strict=True):
        print(f"| {name} | {info.error or described(job, info)} |")


if __name__ == "__main__":
    main()
