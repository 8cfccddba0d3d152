"""A model on several devices. There are none here: tensors carry the name of the device where they would be, and any
operation on tensors of two devices fails, as it would."""

import contextlib
import dataclasses
import functools
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import minivlm
from minivlm.auto import PRESETS, family
from minivlm.checkpoint import loading
from minivlm.devices import placement
from minivlm.devices.placement import CPU

ZERO, ONE, TWO = (torch.device("cuda", index) for index in range(3))
NAMES = ("shapes-idefics2", "shapes-llava-next", "shapes-idefics")


class Placed(Tensor):
    """A tensor that is said to be on `place`."""

    place: torch.device
    mixed: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Placed)]
        with torch._C.DisableTorchFunctionSubclass():
            places = {value.place for value in values if value.ndim and hasattr(value, "place")}
        if len(places) > 1:
            raise RuntimeError(f"{function.__name__} of tensors on {places}")
        result = super().__torch_function__(function, types, args, kwargs or {})
        return tree_map(lambda value: _mark(value, *places) if isinstance(value, Placed) and places else value, result)


def _mark(tensor: Tensor, place: torch.device) -> Placed:
    tensor.place = place
    return tensor


def on(tensor: Tensor, place: torch.device) -> Placed:
    """A view of the tensor that is said to be there."""
    with torch._C.DisableTorchFunctionSubclass():
        return _mark(tensor.detach().as_subclass(Placed), place)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.device]]:
    """Moving a tensor renames its place; → what was moved: bytes and where to."""
    found = []

    def move(tensor: Tensor, device: torch.device) -> Placed:
        if not isinstance(tensor, Placed) or tensor.place != device:
            found.append((tensor.nbytes, device))
        return on(tensor, device)

    def cache(*sizes: int, device: Any, dtype: Any) -> Any:
        made = plain(*sizes, device="cpu", dtype=dtype)
        made.data = on(made.data, device)
        return made

    plain = placement.KVCache
    monkeypatch.setattr(placement, "to_device", move)
    monkeypatch.setattr(placement, "device_of", lambda tensor: getattr(tensor, "place", ZERO))
    monkeypatch.setattr(placement, "KVCache", cache)
    monkeypatch.setattr(placement, "replace", lambda mask, device, **parts: dataclasses.replace(mask, **parts))
    return found


def place(model: nn.Module, places: placement.Placement) -> nn.Module:
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        tagged = on(parameter, places.of(name))
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tagged, requires_grad=False)
        model.get_submodule(owner)._parameters[leaf].place = places.of(name)
    return placement.connect(model, places)


def blocks_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if placement.BLOCK.fullmatch(name)]


def loaded(name: str) -> tuple[nn.Module, Any]:
    model = minivlm.AutoModelForImageTextToText.from_pretrained(name, fast_cpu=False, attn_implementation="eager")
    processor = minivlm.AutoProcessor.from_pretrained(name)
    image, text = {"type": "image", "image": "docs/shapes.png"}, {"type": "text", "text": "What number is written?"}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [image, text]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model, inputs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_the_same_answers(name: str, options: dict[str, Any], moves: list, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = loaded(name)
    wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    names = blocks_of(model)
    devices = [ZERO, ONE, ONE, TWO]
    blocks = {block: devices[index * len(devices) // len(names)] for index, block in enumerate(names)}
    place(model, placement.Placement(ZERO, blocks))
    moves.clear()
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(torch.as_tensor(found), wanted)
    assert {device for _, device in moves} == {ZERO, ONE, TWO}
    assert model.hf_device_map[""] == 0
    with pytest.raises(ValueError, match="several devices"):
        model.to("cpu")


def test_mixing_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="add"):
        on(torch.ones(2), ZERO) + on(torch.ones(2), ONE)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_that_wait_on_the_cpu(name: str, moves: list) -> None:
    """Their weights are copied for each pass and dropped afterwards, after an error too."""
    model, inputs = loaded(name)
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    names = blocks_of(model)
    places = placement.Placement(ZERO, {block: CPU if index % 2 else ZERO for index, block in enumerate(names)})
    place(model, places)
    moves.clear()
    assert torch.equal(torch.as_tensor(model.generate(**inputs, max_new_tokens=4, do_sample=False)), wanted)
    waiting = [block for block in names if places.blocks[block] == CPU]
    size = sum(p.nbytes for block in waiting for p in model.get_submodule(block).parameters())
    assert sum(count for count, device in moves if device == ZERO) >= 4 * size
    with contextlib.suppress(TypeError):
        model.get_submodule(waiting[0])(None)
    assert all(p.place == CPU for block in waiting for p in model.get_submodule(block).parameters())
    model.train()
    with pytest.raises(ValueError, match="cannot be trained"):
        model(**inputs)


def test_what_is_in_its_place_is_not_kept() -> None:
    moves, x, elsewhere = placement._Moves(), torch.ones(2), torch.device("meta")
    assert moves._one(x, CPU) is x
    assert not moves.moved
    assert moves._one(x, elsewhere) is moves._one(x, elsewhere)
    assert len(moves.moved) == 1


# ---- What goes where ----


@functools.cache
def meta(name: str) -> nn.Module:
    """A released checkpoint's model without values. Nobody changes it."""
    config = PRESETS[name]
    with loading.shapes_only():
        return family(config.to_hub()["model_type"], name).model_class(config)


def planned(name: str, room: dict, device_map: str = "auto") -> tuple[placement.Placement, dict[torch.device, int]]:
    model = meta(name)
    sizes = {name: 2 * parameter.numel() for name, parameter in model.named_parameters()}
    places = placement.place(model, device_map, room, sizes)
    used: dict[torch.device, int] = {}
    for tensor, size in sizes.items():
        used[places.of(tensor)] = used.get(places.of(tensor), 0) + size
    return places, used


def test_34b_on_two_cards_evenly() -> None:
    places, used = planned("llava-hf/llava-v1.6-34b-hf", {0: "80GB", 1: "80GB", "cpu": "100GB"}, "balanced")
    assert set(used) == {ZERO, ONE}
    assert abs(used[ZERO] - used[ONE]) < 2.5e9
    assert list(places.blocks.values()) == sorted(places.blocks.values(), key=lambda device: device.index)


def test_one_card_is_enough() -> None:
    places, _ = planned("HuggingFaceM4/idefics2-8b", {0: "80GB", 1: "80GB"})
    assert places.is_single
    assert not planned("HuggingFaceM4/idefics2-8b", {0: "80GB", 1: "80GB"}, "balanced")[0].is_single


def test_in_order_and_the_rest_on_the_cpu() -> None:
    places, used = planned("llava-hf/llava-v1.6-34b-hf", {0: "30GB", 1: "20GB", "cpu": "100GB"}, "sequential")
    assert used[ZERO] <= 30e9
    assert used[ONE] <= 20e9
    assert used[CPU] == sum(used.values()) - used[ZERO] - used[ONE]
    assert places.works_on(list(places.blocks)[-1]) == ZERO


def test_gated_blocks_stand_beside_those_that_follow() -> None:
    places, _ = planned("HuggingFaceM4/idefics-80b", dict.fromkeys(range(4), "60GB"), "balanced")
    for name, device in places.blocks.items():
        if "gated" in name:
            index = int(name.rpartition(".")[2])
            assert device == places.of(f"model.text_model.layers.{4 * index}.mlp.up_proj.weight") or (
                device == places.of(f"model.text_model.layers.{max(0, 4 * index - 1)}.mlp.up_proj.weight")
            )


@pytest.mark.parametrize(
    ("room", "words"),
    [
        ({0: "10GB"}, "found room for cuda:0"),
        ({0: "1GB", "cpu": "900GB"}, "beside its blocks"),
        ({0: "many"}, '"20GiB"'),
        ({"nosuch": "1GB"}, "not a device"),
        ("20GB", "should be a dict"),
    ],
)
def test_what_does_not_fit(room: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        planned("llava-hf/llava-v1.6-34b-hf", room)


@pytest.mark.parametrize(
    "form", ["model.text_model.layers", "model.language_model.layers", "language_model.model.layers"]
)
def test_a_map_of_transformers(form: str) -> None:
    model = meta("HuggingFaceM4/idefics2-8b")
    given = {"": 0, f"{form}.1": 1, f"{form}.30": "cpu", f"{form}.31": "cuda:1"}
    places = placement.place(model, given, None, {})
    found = {int(name.rpartition(".")[2]): device for name, device in places.blocks.items() if device != ZERO}
    assert found == {1: ONE, 30: CPU, 31: ONE}
    assert places.home == ZERO


def test_a_map_without_values() -> None:
    with pytest.raises(ValueError, match="names meta"):
        placement.place(meta("HuggingFaceM4/idefics2-8b"), {"": "cpu", "model.text_model.layers.0": "meta"}, None, {})


def test_a_map_with_a_hole() -> None:
    with pytest.raises(ValueError, match="does not say where"):
        placement.place(meta("HuggingFaceM4/idefics2-8b"), {"model.vision_model": 0}, None, {})


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("HuggingFaceM4/idefics2-8b", "model.text_model.layer.3", "did you mean 'model.text_model.layers"),
        ("HuggingFaceM4/idefics2-8b", "model.text_model.layers.99", "'model.text_model.layers.99'"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "model.connector", "'model.connector'"),
        ("HuggingFaceM4/idefics-9b", 3, "names '3'"),
    ],
)
def test_a_map_with_names_of_no_part(name: str, key: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        placement.place(meta(name), {"": 0, key: 1}, None, {})
    assert "not a part of this model" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("HuggingFaceM4/idefics2-8b", "model.vision_model model.connector model.text_model.rotary_emb lm_head"),
        ("HuggingFaceM4/idefics-9b", "model.embed_tokens model.layers model.gated_cross_attn_layers.0 model.norm"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "vision_tower.vision_model multi_modal_projector image_newline"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "language_model.lm_head language_model.model.norm model.vision_tower"),
    ],
)
def test_a_map_with_the_names_of_checkpoints(name: str, keys: str) -> None:
    places = placement.place(meta(name), {"": 0} | dict.fromkeys(keys.split(), 0), None, {})
    assert places.home == ZERO


def test_loading_by_a_map() -> None:
    """All on the one device that is here."""
    model = minivlm.AutoModelForImageTextToText.from_pretrained(
        "shapes-idefics2", device_map={"": "cpu"}, max_memory={"cpu": "1GB"}
    )
    assert {parameter.device for parameter in model.parameters()} == {CPU}
    assert minivlm.AutoModelForImageTextToText.from_pretrained("shapes-idefics2", device_map="auto") is not None


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_one_gpu_and_the_cpu(name: str) -> None:
    """Real copies: every second block waits on the CPU."""
    model, inputs = loaded(name)
    names = blocks_of(model)
    given = {"": 0, **dict.fromkeys(names[1::2], "cpu")}
    model = model.to("cuda")
    wanted = model.generate(**inputs.to("cuda"), max_new_tokens=6, do_sample=False)
    split = type(model).from_pretrained(name, device_map=given, attn_implementation="eager")
    assert {parameter.device.type for parameter in split.parameters()} == {"cuda", "cpu"}
    assert torch.equal(split.generate(**inputs.to("cuda"), max_new_tokens=6, do_sample=False), wanted)
