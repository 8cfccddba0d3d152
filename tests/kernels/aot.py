"""Compile Triton kernels ahead of time, without a GPU: shared memory, registers, spills and PTX.

The interpreter (TRITON_INTERPRET=1) turns every `@triton.jit` function of a process into plain Python, which cannot be
compiled. So compilation happens in one child process without that variable, for a whole list of jobs:

    jobs = [job(launch, arch=90) for launch in launches]  # tensors may be on the meta device
    assert_fit(jobs)
    info = compile_kernels(jobs)[0]  # info.registers, info.shared, …

Types in a signature are written as in `triton.tools.compile`: "*bf16:16" (a pointer divisible by 16), "i32", "i32:16",
"fp32", "1" for an integer that happens to be one, which Triton makes a constant, and tuples of these. `specialise`
writes them from the arguments of a launch.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import processes

# Bytes a program may have: CUDA programming guide, "shared memory per thread block"; 64 KiB of LDS on AMD.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
TYPES = {
    **{"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float64": "fp64"},
    **{"torch.bool": "i1", "torch.uint8": "u8", "torch.int8": "i8", "torch.int32": "i32", "torch.int64": "i64"},
}


@dataclass(frozen=True)
class Job:
    """One kernel ("module:name") with its types and constants, for one chip: 80, 90, 100 (CUDA) or "gfx942" (AMD)."""

    kernel: str
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str, Any] = field(default_factory=dict)
    arch: int | str = 90
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a job. `error` is the last line of its complaint, and then the rest is empty."""

    shared: int = 0  # bytes of shared memory a program
    registers: int = 0  # a thread
    spill_bytes: int = 0  # stack a thread: Triton's kernels have none, but for registers that did not fit
    ptx: str = ""  # GCN assembly on AMD
    error: str | None = None


def specialise(kernel: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(signature, constexprs) that Triton would compile for these arguments; tensors may be on the meta device."""
    constants = {
        name for name, p in inspect.signature(kernel.fn).parameters.items() if "constexpr" in str(p.annotation)
    }
    signature = {name: _type(value) for name, value in arguments.items() if name not in constants and value is not None}
    return signature, {name: value for name, value in arguments.items() if name not in signature}


def _type(value: Any) -> str | tuple[str, ...]:
    if value is None:
        return "None"
    if isinstance(value, tuple):
        return tuple(_type(part) for part in value)
    if hasattr(value, "data_ptr"):
        return f"*{TYPES[str(value.dtype)]}" + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "1"
    return ("i32" if -(2**31) <= value < 2**31 else "i64") + (":16" if value % 16 == 0 else "")


def job(launch: Any, arch: int | str, num_stages: int | None = None) -> Job:
    """What a `Launch` would compile on a chip."""
    kernel, _, arguments, options = launch
    name = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    stages = options.get("num_stages", 2) if num_stages is None else num_stages
    return Job(name, *specialise(kernel, arguments), arch, options["num_warps"], stages)


def assert_fit(jobs: list[Job]) -> None:
    """Every kernel compiles, spills no registers, and fits into shared memory: what 99 KiB hold runs on all sm_8x."""
    failures = []
    for job, info in zip(jobs, compile_kernels(jobs, timeout=3600), strict=True):
        if info.error or info.spill_bytes or info.shared > (99 * 1024 if job.arch == 80 else SHARED_LIMIT[job.arch]):
            failures.append(f"{job.arch} {job.kernel} {job.signature} {job.constexprs}: {info}")
    assert not failures, "\n".join(failures)


def compile_kernels(jobs: list[Job], *, ptx: bool = False, timeout: float = 600) -> list[Compiled]:
    """Compile `jobs` in one child process. Without `ptx` the assembly, which may be megabytes, stays there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    request = json.dumps({"jobs": [asdict(job) for job in jobs], "ptx": ptx})
    code = f"import sys; sys.path[:0] = {list(map(str, Path(__file__).parents[:2]))}; import aot; aot.main()"
    child = processes.run(code, input=request, env=environment, timeout=timeout)
    assert child.returncode == 0, child.stderr[-4000:]
    return [Compiled(**answer) for answer in json.loads(child.stdout.splitlines()[-1])]


def _compile(job: Job) -> Compiled:
    """Runs in the child, as everything below."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature, attributes = {}, {}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in job.constexprs.items()}

    def kind(type_: str | list[str], path: tuple[int, ...], plain: bool) -> str | tuple[str, ...]:
        if isinstance(type_, list):
            return tuple(kind(part, (*path, index), plain) for index, part in enumerate(type_))
        type_, _, divisor = type_.partition(":")
        if divisor and not plain:
            attributes[path] = [["tt.divisibility", int(divisor)]]
        if type_ == "None" or (type_ == "1" and not plain):
            constexprs[path] = None if type_ == "None" else 1
            return "constexpr"
        return "i32" if type_ == "1" else type_

    for index, parameter in enumerate(kernel.params):
        type_ = job.signature.get(parameter.name, "constexpr")
        signature[parameter.name] = kind(type_, (index,), parameter.do_not_specialize)
    target = GPUTarget("cuda", job.arch, 32) if isinstance(job.arch, int) else GPUTarget("hip", job.arch, 64)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(ASTSource(kernel, signature, constexprs, attributes), target=target, options=options)
    except Exception as error:
        return Compiled(error=f"{type(error).__name__}: {error}"[-2000:])
    if target.backend == "hip":
        return _amd_usage(compiled)
    registers, stack = _cuda_usage(compiled.asm["cubin"])
    return Compiled(compiled.metadata.shared, registers, stack, compiled.asm["ptx"])


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) a thread, as `cuobjdump` reads them from the machine code."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def _amd_usage(compiled: Any) -> Compiled:
    assembly = compiled.asm["amdgcn"]
    registers, scratch = (
        int(re.search(rf"\.{word}:\s*(\d+)", assembly)[1]) for word in ("vgpr_count", "private_segment_fixed_size")
    )
    return Compiled(compiled.metadata.shared, registers, scratch, assembly)


def main() -> None:
    request = json.loads(sys.stdin.read())
    answers = [asdict(_compile(Job(**job))) for job in request["jobs"]]
    if not request["ptx"]:
        answers = [answer | {"ptx": ""} for answer in answers]
    print(json.dumps(answers))
