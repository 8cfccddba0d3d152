"""Loads checkpoints, one a line of stdin, and answers with a line of JSON each: a process with a limit of memory.

What it prints: {"answer": …} if the checkpoint could be loaded and asked, {"error": [type, its bases …], "message": …}
if not. Whatever else happens (a crash, silence) happens to this process alone.
"""

import json
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.app import inspection

ROOM = 512 * 2**20  # bytes that a case may need beside what the process has


def answer(folder: str) -> Any:
    """Ids that the checkpoint answers to a picture, and the sum of its logits."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    picture = Image.fromarray(np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3))
    if model.config.model_type == "idefics":
        inputs = processor([[picture, "ok"]])
    else:
        inputs = processor(text="<image>ok", images=[picture], return_tensors="pt")
    output = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    return [output.sequences.tolist(), sum(logits.double().sum().item() for logits in output.logits)]


ACTIONS = {"answer": answer, "check": lambda folder: inspection.check(folder)}


def main() -> None:
    torch.set_num_threads(1)
    answers = sys.stdout
    sys.stdout = sys.stderr
    answer(sys.argv[1])  # what is loaded once for all
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        action, folder = json.loads(line)
        try:
            result = {"answer": ACTIONS[action](folder)}
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            bases = [base.__name__ for base in type(error).__mro__]
            result = {"error": bases, "message": str(error), "where": f"{where.filename}:{where.lineno}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
