"""AWQ and GPTQ files, packed here from the published layouts by code of their own, load as the numbers they stand for.

No library that writes them is a dependency: AWQ's GEMM layout is that of AutoAWQ's `WQLinear_GEMM.from_linear`, GPTQ's
that of AutoGPTQ's `QuantLinear.pack`, both written out below word by word.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm import Idefics2ForConditionalGeneration as Model
from minivlm.checkpoint.names import WEIGHTS
from minivlm.quantization import apply, foreign

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def word(codes: list[int]) -> int:
    """Eight codes, the first lowest, as a signed 32-bit number."""
    value = sum(code << 4 * place for place, code in enumerate(codes))
    return value - 2**32 if value >= 2**31 else value


def pack_columns(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """(R, C) → (R, C/8) int32."""
    rows = [
        [word([row[start + place] for place in order]) for start in range(0, len(row), 8)] for row in codes.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def random_layer(shape: tuple[int, int], group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (K, N), zeros and scales (G, N), and the weight (N, K) they stand for."""
    rows, columns = shape
    groups = -(-columns // group_size)
    codes, zeros = torch.randint(16, (columns, rows)), torch.randint(1, 16, (groups, rows))
    scales = (torch.rand(groups, rows) * 0.01 + 0.001).half()
    each = torch.arange(columns) // group_size
    return codes, zeros, scales, ((codes - zeros[each]) * scales[each].float()).T


def awq(shape: tuple[int, int], group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, weight = random_layer(shape, group_size)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack_columns(codes, order), "qzeros": pack_columns(zeros, order), "scales": scales}, weight


def gptq(shape: tuple[int, int], group_size: int, less_one: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, weight = random_layer(shape, group_size)
    order = tuple(range(8))
    tensors = {
        "qweight": pack_columns(codes.T, order).T.contiguous(),
        "qzeros": pack_columns(zeros - less_one, order),
        "scales": scales,
        "g_idx": (torch.arange(shape[1]) // group_size).int(),
    }
    return tensors, weight


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose text layers have sizes that fill words of eight codes."""
    return oracle.save(oracle.random_reference(oracle.idefics2_config()), tmp_path_factory.mktemp("plain"))


def write(plain: Path, folder: Path, config: dict[str, Any], make: Callable[..., Any]) -> dict[str, Tensor]:
    """The checkpoint with its text layers' linears replaced; returns the weights they stand for."""
    torch.manual_seed(0)
    tensors, weights = load_file(plain / WEIGHTS), {}
    for name in [name for name in tensors if "text_model.layers" in name and name.endswith("_proj.weight")]:
        shape = tuple(tensors.pop(name).shape)
        layer = name.removesuffix(".weight")
        group_size = config["group_size"] if config["group_size"] != -1 else shape[1]
        made, weights[layer] = make(shape, group_size)
        tensors |= {f"{layer}.{leaf}": value for leaf, value in made.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    about = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**about, "quantization_config": config}), encoding="utf-8")
    return weights


KINDS = {
    "awq": (AWQ, awq),
    "gptq": (GPTQ, gptq),
    "gptq, one group a row": ({**GPTQ, "group_size": -1}, gptq),
    "gptq, groups of 64": ({**GPTQ, "group_size": 64}, gptq),
    "gptq v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        lambda shape, group_size: gptq(shape, group_size, less_one=0),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_loads_as_the_numbers_of_the_file(kind: str, plain: Path, tmp_path: Path) -> None:
    weights = write(plain, tmp_path, *KINDS[kind])
    model = Model.from_pretrained(tmp_path)
    layers = apply.layers(model)
    assert layers.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(layers[name].dequantize(torch.float32), weight), name
        assert all(tensor.is_contiguous() for tensor in layers[name].tensors.values())  # as the kernels want them
    inputs = oracle.random_inputs((1,), 4)
    with torch.no_grad():
        logits = model(**inputs).logits
        model.save_pretrained(tmp_path / "ours")
        assert torch.equal(Model.from_pretrained(tmp_path / "ours")(**inputs).logits, logits)
        assert Model.from_pretrained(tmp_path, dtype=torch.bfloat16)(**inputs).logits.isfinite().all()


def test_a_zero_point_of_sixteen() -> None:
    """AutoGPTQ writes 15 for a zero point of 16, and for one of 0 too, by an overflow; its kernels read 16."""
    stored = foreign.GptqFiles(32)
    tensors, _ = gptq((8, 32), 32)
    tensors["qzeros"] = torch.full((1, 1), word([15] * 8), dtype=torch.int32)
    assert (stored.read(tensors, (8, 32))["zeros"] == 16).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**AWQ, "bits": 8}, "AWQ files of bits 8 are not supported; only 4 is"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' are not supported; only 'gemm' is"),
        ({**AWQ, "group_size": 48}, "-1 or a multiple of 32, found 48"),
        ({**AWQ, "group_size": "many"}, "whole number, found 'many'"),
        ({**GPTQ, "bits": 3}, "GPTQ files of bits 3"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"bits": 4}, "quant_method None"),
        ([], "JSON object, found list"),
    ],
)
def test_configs_that_cannot_be_honoured(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foreign.from_hub(config)


def test_files_that_cannot_be_read(plain: Path, tmp_path: Path) -> None:
    write(plain, tmp_path, *KINDS["gptq"])
    tensors = load_file(tmp_path / WEIGHTS)
    name = "model.text_model.layers.0.mlp.up_proj"

    def fails(message: str, **changed: Tensor) -> None:
        save_file({**tensors, **{f"{name}.{leaf}": value for leaf, value in changed.items()}}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            Model.from_pretrained(tmp_path)

    fails("g_idx mixes the inputs .* desc_act=false", g_idx=tensors[f"{name}.g_idx"].flip(0).contiguous())
    fails("are torch.int64, expected torch.int32", qweight=tensors[f"{name}.qweight"].long())
    fails(r"of another shape:\n.*scales \[1, 96\], expected \[2, 96\]", scales=tensors[f"{name}.scales"][:1].clone())
    with pytest.raises(ValueError, match="outputs of 12 do not fill words"):
        foreign.AwqFiles(32).read({}, (12, 32))
