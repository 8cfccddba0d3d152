"""Quantised while loading, saved and loaded again; transformers with bitsandbytes reads our files, and we read its."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import oracle
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minivlm import BitsAndBytesConfig, Idefics2ForConditionalGeneration, Int4Config
from minivlm.app import cli
from minivlm.checkpoint.names import WEIGHTS
from minivlm.quantization import apply

Model = Idefics2ForConditionalGeneration
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
DOUBLE = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
FP4 = BitsAndBytesConfig(load_in_4bit=True)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
CONFIGS = {"nf4": NF4, "nf4 double": DOUBLE, "fp4": FP4, "int8": INT8, "int4": Int4Config(32)}


@pytest.fixture(scope="module")
def reference() -> Any:
    """Widths are multiples of 64, where bitsandbytes' CPU build dequantises correctly (see test_codebook.py)."""
    config = oracle.idefics2_config().to_dict()
    config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128}
    config["text_config"] |= {"intermediate_size": 128, "head_dim": 16}
    config["perceiver_config"] |= {"resampler_head_dim": 16}
    return oracle.random_reference(transformers.Idefics2Config(**config))


@pytest.fixture(scope="module")
def saved(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.save(reference, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def quantised(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantised("nf4")`: the checkpoint loaded in this format and saved again."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("quantised")
            Model.from_pretrained(saved, quantization_config=CONFIGS[name]).save_pretrained(made[name])
        return made[name]

    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    inputs = oracle.random_inputs((1, 2), 4)
    return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_again_without_flags(name: str, saved: Path, quantised: Callable[[str], Path]) -> None:
    model = Model.from_pretrained(saved, quantization_config=CONFIGS[name])
    again = Model.from_pretrained(quantised(name))
    assert again.quantization_config.format == CONFIGS[name].format
    assert torch.equal(logits(again), logits(model))
    sharded = quantised(name).parent / f"sharded {name}"
    again.save_pretrained(sharded, max_shard_size="100KB")
    assert torch.equal(logits(Model.from_pretrained(sharded)), logits(model))
    plain = logits(Model.from_pretrained(saved))
    error = (logits(model) - plain).norm() / plain.norm()
    assert 0.001 < error < 0.5  # it is quantised, and still the same model: random weights err more than trained ones


def theirs(folder: Path, **options: Any) -> Any:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # a kernel that computes in bf16 whatever the input
    return model


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "fp4"])
def test_transformers_with_bitsandbytes_agrees(name: str, saved: Path, quantised: Callable[[str], Path]) -> None:
    """It loads what we saved, and quantises to the same by itself; the floor is that of fp32 logits anywhere here."""
    config = CONFIGS[name]
    asked = transformers.BitsAndBytesConfig(**{k: v for k, v in vars(config).items() if not k.startswith("llm")})
    loaded, made = theirs(quantised(name)), theirs(saved, quantization_config=asked)
    eager, sdpa = oracle.both(loaded, logits)
    for model in (Model.from_pretrained(saved, quantization_config=config), Model.from_pretrained(quantised(name))):
        oracle.assert_close(logits(model), eager, sdpa, name)
    assert torch.equal(logits(made), sdpa)


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "fp4", "int8"])
def test_files_that_bitsandbytes_wrote(
    name: str, saved: Path, quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    config = CONFIGS[name]
    options = vars(config) if name != "int8" else {"load_in_8bit": True}
    model = theirs(saved, quantization_config=transformers.BitsAndBytesConfig(**options))
    model.save_pretrained(tmp_path)
    ours = Model.from_pretrained(tmp_path)
    assert torch.equal(logits(ours), logits(Model.from_pretrained(quantised(name))))
    written, found = load_file(quantised(name) / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert written.keys() == found.keys()
    for key, value in written.items():
        if "quant_state" not in key:  # JSON, whose keys have no order
            assert torch.equal(value.view(found[key].shape), found[key]), key


def test_int8_weights_are_those_of_bitsandbytes(quantised: Callable[[str], Path]) -> None:
    """Not the logits: bitsandbytes rounds activations to eight bits too."""
    ours, reference = Model.from_pretrained(quantised("int8")), theirs(quantised("int8"))
    modules = dict(reference.named_modules())
    for name, layer in apply.layers(ours).items():
        assert isinstance(modules[name], bitsandbytes.nn.Linear8bitLt)
        assert torch.equal(layer.tensors["qweight"], modules[name].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights are cast before they are quantised, scales are not cast; what is saved loads in the same dtype."""
    for name, config in CONFIGS.items():
        model = Model.from_pretrained(saved, quantization_config=config, dtype=dtype)
        assert model.dtype == dtype
        model.save_pretrained(tmp_path / name)
        again = Model.from_pretrained(tmp_path / name)
        assert again.dtype == dtype
        assert torch.equal(logits(again), logits(model)), name


def test_skipped_modules_are_saved_so_that_both_know(saved: Path, tmp_path: Path, capsys: Any) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_model", "q_proj"])
    model = Model.from_pretrained(saved, quantization_config=config)
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert apply.layers(again).keys() == apply.layers(model).keys()
    assert not [name for name in apply.layers(model) if "vision" in name or "q_proj" in name]
    reference = theirs(tmp_path)
    found = {name for name, module in reference.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert found == apply.layers(model).keys()
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["quantised"]
    assert entry["parameters"] == sum(layer.in_features * layer.out_features for layer in apply.layers(model).values())


def test_generation_and_training_through_quantised_layers(saved: Path) -> None:
    inputs = oracle.random_inputs((1,), 4)
    for config in CONFIGS.values():
        model = Model.from_pretrained(saved, quantization_config=config)
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert model.model.text_model.embed_tokens.weight.grad.isfinite().all()


# ---- What cannot be loaded ----


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        about["quantization_config"] |= values
        (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


LAYER = "model.text_model.layers.0.mlp.up_proj"
MAP = f"{LAYER}.weight.quant_map"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def cut(name: str) -> Callable[[Path], None]:
    return edit_weights(lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))


def restate(**values: Any) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        about = json.loads(bytes(tensors[STATE].tolist())) | values
        tensors[STATE] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)

    return edit_weights(change)


BROKEN = {
    "unknown method": ("nf4", edit_config(quant_method="aqlm"), "quant_method 'aqlm' is not supported"),
    "unknown type": ("nf4", edit_config(bnb_4bit_quant_type="nf3"), "found 'nf3'"),
    "another type": ("nf4", edit_config(bnb_4bit_quant_type="fp4"), "missing:(.|\n)*bitsandbytes__fp4"),
    "cut codes": ("nf4", cut(f"{LAYER}.weight"), f"{LAYER}: its weight is .4095.*expected .4096"),
    "cut scales": ("nf4", cut(f"{LAYER}.weight.absmax"), r"its weight.absmax is \[127\].*expected \[128\]"),
    "cut nested": ("nf4 double", cut(f"{LAYER}.weight.nested_absmax"), r"nested_absmax is \[0\]"),
    "another shape": ("nf4", restate(shape=[64, 128]), r"quant_state has shape \[64, 128\], expected \[128, 64\]"),
    "another block": ("nf4", restate(blocksize=32), "blocksize 32, expected 64"),
    "no offset": ("nf4 double", restate(nested_offset=None), "nested_offset None, expected a number"),
    "half a table": (
        "nf4",
        edit_weights(lambda tensors: tensors.update({MAP: tensors[MAP].half()})),
        r"quant_map is \[16\] of torch.float16, expected \[16\] of torch.float32",
    ),
    "whole scales": (
        "int4",
        edit_weights(lambda tensors: tensors.update({f"{LAYER}.scales": tensors[f"{LAYER}.scales"].int()})),
        "its scales are of torch.int32, expected one of float32",
    ),
    "no JSON": ("nf4", cut(STATE), "quant_state is not valid JSON"),
    "lost scales": (
        "nf4",
        edit_weights(lambda tensors: tensors.pop(f"{LAYER}.weight.quant_map")),
        "1 tensors missing:\n +model.text_model.layers.0.mlp.up_proj.weight.quant_map",
    ),
    "nothing quantised": (
        "int4",
        edit_weights(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".qweight")]),
        "the files hold no tensor",
    ),
    "mismatched scales": ("int4", edit_config(group_size=64), r"of another shape:\n.*scales \[\d+, \d\], expected"),
    "odd group": ("int4", edit_config(group_size=48), "32, 64, 128, found 48"),
    "float codes": (
        "int4",
        edit_weights(lambda tensors: tensors.update({f"{LAYER}.zeros": tensors[f"{LAYER}.zeros"].float()})),
        "its zeros is .* of torch.float32, expected .* of torch.uint8",
    ),
    "column order": (
        "int8",
        edit_weights(lambda tensors: tensors.update({f"{LAYER}.weight_format": torch.tensor(1, dtype=torch.uint8)})),
        "weight_format is 1, expected 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(case: str, quantised: Callable[[str], Path], tmp_path: Path) -> None:
    name, damage, message = BROKEN[case]
    folder = Path(shutil.copytree(quantised(name), tmp_path / "copy"))
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(folder)


def test_asking_for_another_format_than_the_files_have(quantised: Callable[[str], Path], saved: Path) -> None:
    with pytest.raises(ValueError, match="is quantised already, as nf4"):
        Model.from_pretrained(quantised("nf4"), quantization_config=INT8)
    assert Model.from_pretrained(quantised("nf4"), quantization_config=NF4)
    with pytest.raises(ValueError, match="minivlm's BitsAndBytesConfig or Int4Config, found dict"):
        Model.from_pretrained(saved, quantization_config={"load_in_4bit": True})


# ---- Memory ----

PEAK = """
import sys
import torch
from private_memory import Watched
from minivlm import BitsAndBytesConfig, Idefics2ForConditionalGeneration as Model
torch.set_num_threads(1)

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
Model.from_pretrained(sys.argv[1], quantization_config=config)  # imports and tables
with Watched() as watched:
    model = Model.from_pretrained(sys.argv[2], quantization_config=config, dtype=torch.bfloat16)
from minivlm.quantization import apply
size = sum(layer.nbytes for layer in apply.layers(model).values())
size += sum(parameter.nbytes for parameter in model.parameters())
print(watched.highest - watched.before, size)
"""


def test_peak_memory_while_loading(saved: Path, tmp_path: Path) -> None:
    """Private memory stays below the quantised size and two of the largest tensors, as files hold them (fp32).

    glibc's malloc learns from the first large block that is freed to keep such blocks for later, up to 32 MB of them,
    and which it keeps differs from run to run; with a fixed threshold a freed block goes back at once.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see private memory")
    config = oracle.idefics2_config().to_dict()
    config["text_config"] |= {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "head_dim": 128}
    torch.manual_seed(0)
    model = transformers.Idefics2ForConditionalGeneration(transformers.Idefics2Config(**config))
    oracle.save(model, tmp_path)
    largest = max(parameter.nbytes for parameter in model.parameters())
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(saved), str(tmp_path)],
        capture_output=True,
        check=True,
        encoding="utf-8",
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    peak, size = map(int, found.stdout.split())
    assert peak <= size + 2 * largest, f"{peak:,} bytes, of which {size:,} are the model; largest tensor {largest:,}"


# ---- The command line ----


def test_quantize_and_inspect(saved: Path, checkpoint: Callable[[str], Path], tmp_path: Path, capsys: Any) -> None:
    source = Path(shutil.copytree(saved, tmp_path / "source"))
    shutil.copy(checkpoint("idefics2-8b") / "tokenizer.json", source)
    for form in ("nf4", "fp4", "int4", "int8"):
        out = tmp_path / form
        assert cli.main(["quantize", str(source), str(out), "--format", form, "--group-size", "32"]) == 0
        assert "parameters as" in capsys.readouterr().out
        assert (out / "tokenizer.json").is_file()
        model = Model.from_pretrained(out)
        assert model.dtype == torch.bfloat16
        assert cli.main(["inspect", str(out), "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["quantised"]
        layers = apply.layers(model).values()
        assert found["parameters"] == sum(layer.in_features * layer.out_features for layer in layers)
        tensors = [tensor.nbytes for layer in layers for tensor in layer.tensors.values()]
        assert found["bytes"] == sum(tensors)
    assert cli.main(["quantize", str(source), str(tmp_path / "nf4")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["quantize", str(tmp_path / "nf4"), str(tmp_path / "twice")]) == 1
    assert "quantised already" in capsys.readouterr().err


def test_inspect_says_what_released_checkpoints_would_take(capsys: Any) -> None:
    assert cli.main(["inspect", "HuggingFaceM4/idefics2-8b", "--json"]) == 0
    nf4, int4, int8 = json.loads(capsys.readouterr().out)["quantised"]
    assert nf4["bytes_per_parameter"] < 0.56
    assert int4["bytes_per_parameter"] < 0.56
    assert int8["bytes_per_parameter"] < 1.01
    assert nf4["total_bytes"] < 5 * 10**9
