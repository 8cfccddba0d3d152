"""The parity table of docs/parity.md: families × dtypes × backends, beside `transformers`, in one run.

    python scripts/parity_table.py                        built-in checkpoints, and a random model of each family
    python scripts/parity_table.py --only idefics2        one family
    python scripts/parity_table.py --dtype float32        one dtype
    python scripts/parity_table.py --compact              a line for each model, the worst over backends

Pixels and ids are those of the two processors, for a drawn image. Logits: the largest difference anywhere in the
prompt, and the first stage that diverges, if any (see `minivlm.parity`). Gradients: the largest relative
difference of any parameter's gradient. Greedy: 16 tokens. Random models are small and get random inputs without a
processor, so they have no pixels and ids to compare.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import nn

from minivlm.checkpoint import hub
from minivlm.checkpoint.loading import DTYPES
from minivlm.checkpoint.names import local_name
from minivlm.parity import Question, Side, against, drawn_image, record
from minivlm.parity.findings import Finding
from minivlm.parity.sides import config_of, load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tests' tiny random models


@dataclass(frozen=True, eq=False)
class Case:
    """A checkpoint and its question."""

    name: str
    family: str
    folder: str | Path
    question: Question


def built_in() -> Iterator[Case]:
    """The checkpoints that ship."""
    for name in hub.built_in():
        yield Case(name, config_of(Side(name)).model_type, name, Question((drawn_image(),)))


def random_models(folder: Path) -> Iterator[Case]:
    """A tiny random model of each family, with a left-padded batch of rows with several images, one and none."""
    import oracle
    import oracle_idefics
    import oracle_llava

    llava = oracle_llava.llava_config()
    made = {
        "idefics2": (oracle.random_reference(oracle.idefics2_config()), oracle.random_inputs((2, 0, 3, 1), 4)),
        "llava_next": (
            oracle_llava.random_llava(llava),
            oracle_llava.llava_inputs([[(30, 50), (100, 33)], [], [(7, 90)]], llava),
        ),
        "idefics": (
            oracle_idefics.random_reference(oracle_idefics.idefics_config()),
            oracle_idefics.random_inputs((2, 0, 3, 1)),
        ),
    }
    for family, (reference, inputs) in made.items():
        path = oracle.save(reference, folder / family)
        yield Case("random", family, path, Question(inputs=inputs))


@dataclass(frozen=True)
class Row:
    """The findings for one case, dtype and backend; gradient: the largest relative difference, in float32 only."""

    case: Case
    dtype: str
    backend: str
    found: dict[str, Finding]
    gradient: float | None

    def exact(self, *stages: str) -> str:
        known = [self.found[stage] for stage in stages if stage in self.found]
        return "" if not known else "differ" if any(stage.diverges for stage in known) else "equal"

    @property
    def first(self) -> str:
        return next((stage for stage, finding in self.found.items() if finding.diverges), "none")

    @property
    def greedy(self) -> str:
        found = self.found["greedy tokens"]
        return "differ" if found.diverges else "equal up to a tie" if found.note else "equal"


def rows(case: Case, dtype: str, folder: Path) -> Iterator[Row]:
    """One for each of our backends; the reference is recorded once."""
    recording = record(Side(case.folder, "transformers", dtype=dtype), folder / "ref.safetensors", case.question)
    for backend in ("sdpa", "eager", "triton") if torch.cuda.is_available() else ("sdpa", "eager"):
        side = Side(case.folder, dtype=dtype, attn=backend)
        report = against(recording, side, case.question)
        found = {finding.stage: finding for finding in report.findings}
        yield Row(case, dtype, backend, found, gradient(case, side) if dtype == "float32" else None)


def full(made: list[Row]) -> list[list[str]]:
    """A line for each row."""
    head = "family,model,dtype,ours,pixels,ids,logits: largest difference (allowed),first divergence,greedy,gradients"
    lines = [head.split(",")]
    for row in made:
        cells = [row.case.family, row.case.name, row.dtype, row.backend, row.exact("pixels"), row.exact("token ids")]
        lines.append([*cells, _logits([row]), row.first, row.greedy, _gradient([row])])
    return lines


def compact(made: list[Row]) -> list[list[str]]:
    """A line for each model: the worst of its rows."""
    dtypes = list(dict.fromkeys(row.dtype for row in made))
    head = [
        "model",
        "pixels, ids",
        *(f"logits, {dtype}" for dtype in dtypes),
        "first divergence",
        "greedy",
        "gradients",
    ]
    lines = [head]
    for case in dict.fromkeys(row.case for row in made):
        mine = [row for row in made if row.case is case]
        logits = [_logits([row for row in mine if row.dtype == dtype]) for dtype in dtypes]
        name = case.name if case.name != "random" else f"random {case.family}"
        exact = max(row.exact("pixels", "token ids") for row in mine)
        first = [row.first for row in mine if row.first != "none"] or ["none"]
        greedy = min((row.greedy for row in mine), key=["differ", "equal up to a tie", "equal"].index)
        lines.append([name, exact, *logits, first[0], greedy, _gradient(mine)])
    return lines


def _logits(made: list[Row]) -> str:
    worst = max((row.found["logits"] for row in made), key=lambda finding: finding.excess)
    return f"{worst.largest:.1e} ({worst.allowed:.1e})"


def _gradient(made: list[Row]) -> str:
    known = [row.gradient for row in made if row.gradient is not None]
    return f"{max(known):.1e}" if known else ""


def gradient(case: Case, side: Side) -> float:
    """The largest relative difference of a gradient. (In half precision a gradient is mostly rounding.)"""
    reference, ours = load(Side(case.folder, "transformers", dtype=side.dtype, attn=side.attn)), load(side)
    inputs = case.question.encoded(side)
    theirs = {local_name(name, ours.hub_prefixes): grad for name, grad in _gradients(reference, inputs).items()}
    found = _gradients(ours, inputs)
    whole = max(grad.norm() for grad in theirs.values())
    # A key bias shifts all scores of a query equally, so its gradient is only rounding, as is one of negligible size.
    counted = [name for name, grad in theirs.items() if "k_proj.bias" not in name and grad.norm() > 1e-6 * whole]
    return max(((found[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in counted)


def _gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of the mean squared logit at real tokens: a loss that both sides have, with added tokens too."""
    logits = model(**inputs).logits
    logits[inputs["attention_mask"].bool()].square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one family")
    parser.add_argument("--compact", action="store_true", help="a line for each model, the worst of dtype and backend")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    args = parser.parse_args()

    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "Pillow": PIL.__version__}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), f"on {platform.machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        made = [
            row
            for case in [*built_in(), *random_models(Path(folder))]
            for dtype in (args.dtype if args.only in (None, case.family) else ())
            for row in rows(case, dtype, Path(folder))
        ]
    head, *lines = (compact if args.compact else full)(made)
    for cells in (head, ["---"] * len(head), *lines):
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
