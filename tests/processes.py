"""Scripts that torchrun starts as several real processes: no test leaves one of them behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(script: Path, folder: Path, size: int, limit: float, **environment: str) -> str:
    """What `script FOLDER` printed in `size` processes; however they end, none is left. One thread each, the project's
    packages and the tests' own modules in reach."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests", script.parent)))
    process = subprocess.Popen(
        [*command, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
    return output
