"""The parity table of the README: families × dtypes × backends, beside `transformers`, in one run.

    python scripts/parity_table.py                        built-in checkpoints, and a random model of each family
    python scripts/parity_table.py --only idefics2        one family
    python scripts/parity_table.py --dtype float32        one dtype

Pixels and ids are those of the two processors, for a drawn picture. Logits: the largest difference anywhere in the
prompt, and the first stage that diverges, if one does (see `minivlm.parity`). Gradients: the largest relative
difference of any parameter's gradient. Greedy: 16 tokens. Random models are small, and asked with random inputs: no
processor has made these, so pixels and ids are left out.
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

from minivlm import hub
from minivlm.loading import DTYPES, local_name
from minivlm.parity import Question, Report, Side, against, drawn_picture, record
from minivlm.parity.sides import config_of, load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tests' tiny random models

BACKENDS = ("sdpa", "eager")


@dataclass(frozen=True)
class Case:
    """A checkpoint and what it is asked."""

    name: str
    family: str
    folder: str | Path
    question: Question


def built_in() -> Iterator[Case]:
    """The checkpoints that ship."""
    for name in hub.built_in():
        yield Case(name, config_of(Side(name)).model_type, name, Question((drawn_picture(),)))


def random_models(folder: Path) -> Iterator[Case]:
    """One tiny random model a family, with a left-padded batch of several pictures, one and none."""
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


def rows(case: Case, dtype: str, folder: Path) -> Iterator[list[str]]:
    """A line of the table for each of our backends; the reference is recorded once."""
    recording = record(Side(case.folder, "transformers", dtype=dtype), folder / "ref.safetensors", case.question)
    for backend in BACKENDS:
        side = Side(case.folder, dtype=dtype, attn=backend)
        report = against(recording, side, case.question)
        yield [case.family, case.name, dtype, backend, *_cells(report), gradients(case, side)]


def _cells(report: Report) -> list[str]:
    found = {finding.stage: finding for finding in report.findings}
    exact = ["equal" if not found[name].diverges else "differ" for name in ("pixels", "token ids") if name in found]
    logits, greedy = found["logits"], found["greedy tokens"]
    first = "none" if report.first is None else report.first.stage
    tokens = "differ" if greedy.diverges else "equal up to a tie" if greedy.note else "equal"
    return [*(exact or ["", ""]), f"{logits.largest:.1e} ({logits.allowed:.1e})", first, tokens]


def gradients(case: Case, side: Side) -> str:
    """The largest relative difference of a gradient, float32 only: in half precision a gradient is mostly rounding."""
    if side.dtype != "float32":
        return ""
    reference, ours = load(Side(case.folder, "transformers", dtype=side.dtype, attn=side.attn)), load(side)
    inputs = case.question.encoded(side)
    theirs = {local_name(name, ours.hub_prefixes): grad for name, grad in _gradients(reference, inputs).items()}
    found = _gradients(ours, inputs)
    whole = max(grad.norm() for grad in theirs.values())
    # A bias of keys moves all scores of a query alike: its gradient is nothing but rounding, as is one of no size.
    counted = [name for name, grad in theirs.items() if "k_proj.bias" not in name and grad.norm() > 1e-6 * whole]
    return f"{max(((found[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in counted):.1e}"


def _gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the mean squared logit at real tokens: a loss that both sides have, with added tokens too."""
    logits = model(**inputs).logits
    logits[inputs["attention_mask"].bool()].square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one family")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    args = parser.parse_args()

    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "Pillow": PIL.__version__}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), f"on {platform.machine()}\n")
    header = [
        "family",
        "model",
        "dtype",
        "ours",
        "pixels",
        "ids",
        "logits: largest difference (allowed)",
        "first divergence",
    ]
    header += ["greedy", "gradients"]
    print("|", " | ".join(header), "|")
    print("|", " | ".join("---" for _ in header), "|")
    with tempfile.TemporaryDirectory() as folder:
        for case in [*built_in(), *random_models(Path(folder))]:
            for dtype in args.dtype if args.only in (None, case.family) else ():
                for cells in rows(case, dtype, Path(folder)):
                    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
