"""What training code calls around a model: activation checkpointing, accelerate, collators in TRL's manner."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import oracle
import oracle_peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.checkpoint import hub
from minivlm.modules.stacks import stacked_layers

FAMILIES = oracle_peft.FAMILIES
SHAPES = Path(__file__).parents[2] / "docs" / "shapes.png"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    """(ours, a labelled batch)."""
    ours = oracle_peft.ours(oracle_peft.reference(request.param), tmp_path_factory.mktemp("model"))
    inputs = oracle_peft.inputs(request.param)
    return ours, {**inputs, "labels": oracle.labels(inputs)}


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


# ---- Activation checkpointing ----------------------------------------------------------------------------------------


class Passes:
    """Counts how often each layer runs."""

    def __init__(self, model: Any) -> None:
        self.layers = list(stacked_layers(model))
        self.counts = [0] * len(self.layers)

    def __enter__(self) -> list[int]:
        def counted(index: int, plain: Any) -> Any:
            def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
                self.counts[self.layers.index(layer)] += 1
                return plain(layer, *args, **kwargs)

            return forward

        self.plain = {kind: kind.forward for kind in {type(layer) for layer in self.layers}}
        for index, (kind, plain) in enumerate(self.plain.items()):
            kind.forward = counted(index, plain)
        return self.counts

    def __exit__(self, *_: Any) -> None:
        for kind, plain in self.plain.items():
            kind.forward = plain


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_gives_the_same_gradients(model: Any, every: int) -> None:
    """Those of towers and resamplers too, whose layers run twice; and none runs twice afterwards."""
    ours, inputs = model[0].train(), model[1]
    expected = gradients(ours, inputs)
    assert not ours.is_gradient_checkpointing
    ours.activation_checkpointing_enable(every_n_layers=every)
    assert ours.is_gradient_checkpointing
    with Passes(ours) as plain:
        with torch.no_grad():
            ours(**inputs)
        once = list(plain)
        found = gradients(ours, inputs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    again = [count - before for count, before in zip(plain, once, strict=True)]
    wanted = [before * (2 if index % every == 0 else 1) for index, before in enumerate(once)]
    assert again == wanted
    ours.gradient_checkpointing_disable()
    assert not ours.is_activation_checkpointing


def test_checkpointing_leaves_generation_alone(model: Any) -> None:
    ours, inputs = model[0].eval(), {name: value for name, value in model[1].items() if name != "labels"}
    expected = ours.generate(**inputs, max_new_tokens=5)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(ours.generate(**inputs, max_new_tokens=5), expected)
    ours.gradient_checkpointing_disable()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "non-reentrant"),
        ({"offload": True}, "offload"),
    ],
)
def test_checkpointing_that_is_refused(model: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model[0].gradient_checkpointing_enable(**options)
    assert not model[0].is_gradient_checkpointing


def test_gradients_of_a_frozen_table(model: Any) -> None:
    """`enable_input_require_grads`: the embeddings' output has a gradient, and after disabling has none."""
    ours, inputs = copy.deepcopy(model[0]), model[1]
    ours.requires_grad_(False)
    ours.enable_input_require_grads()
    assert ours(**inputs).loss.requires_grad
    ours.disable_input_require_grads()
    assert not ours(**inputs).loss.requires_grad


# ---- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(model: Any, precision: str, tmp_path: Path) -> None:
    """Prepared, a step, unwrapped and saved; with "no" the numbers of the plain loop."""
    ours, inputs = copy.deepcopy(model[0]).train(), model[1]
    plain = copy.deepcopy(ours)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    expected = plain(**inputs).loss
    expected.backward()
    optimizer.step()

    AcceleratorState._reset_state(reset_partial_state=True)  # there is one a process
    helper = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    data = torch.utils.data.DataLoader([0], collate_fn=lambda _: inputs)
    prepared, optimizer, loader = helper.prepare(ours, torch.optim.SGD(ours.parameters(), lr=0.01), data)
    for batch in loader:
        output = prepared(**batch)
        assert output.logits.dtype == torch.float32
        helper.backward(output.loss)
        helper.clip_grad_norm_(prepared.parameters(), 1e9)
        optimizer.step()
    torch.testing.assert_close(output["loss"], expected, rtol=1e-6 if precision == "no" else 0.05, atol=0)
    bare = helper.unwrap_model(prepared)
    assert bare is ours
    bare.save_pretrained(
        tmp_path,
        is_main_process=helper.is_main_process,
        save_function=helper.save,
        state_dict=helper.get_state_dict(prepared),
    )
    again = type(ours).from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
        if precision == "no":
            torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-6, atol=1e-7)


# ---- Collators -------------------------------------------------------------------------------------------------------


def examples() -> list[dict[str, Any]]:
    """Conversations and their images, of unequal lengths: two turns, several images, none."""

    def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}

    picture = Image.open(SHAPES).convert("RGB")
    long = [turn("user", "What number is written?", 1), turn("assistant", "47."), turn("user", "And what else?")]
    return [
        {"messages": [*long, turn("assistant", "A star, a circle and a triangle.")], "images": [picture]},
        {"messages": [turn("user", "Compare.", 2), turn("assistant", "Equal.")], "images": [picture, picture]},
        {"messages": [turn("user", "Hello."), turn("assistant", "Hello to you.")], "images": []},
    ]


def collate(processor: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    """As TRL's collator for images: chat template to text, all rows padded on the right, pads are not learned."""
    texts = processor.apply_chat_template([row["messages"] for row in rows], tokenize=False)
    settings = {"padding": True, "padding_side": "right", "return_tensors": "pt", "add_special_tokens": False}
    output = processor(images=[row["images"] for row in rows], text=texts, **settings, **options)
    labels = output["input_ids"].clone()
    labels[output["attention_mask"] == 0] = -100
    output["labels"] = labels
    return output


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 32}, {"truncation": True, "max_length": 2048}], ids=str)
@pytest.mark.parametrize("name", ["shapes-idefics2", "shapes-llava-next"])
@torch.no_grad()
def test_collators(name: str, options: dict[str, Any]) -> None:
    """The ids, labels and loss of the reference's processor and model; IDEFICS takes texts and images in turn."""
    processor, model = AutoProcessor.from_pretrained(name), AutoModelForImageTextToText.from_pretrained(name)
    theirs = transformers.AutoProcessor.from_pretrained(hub.BUILT_IN / name)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(hub.BUILT_IN / name)
    found, expected = collate(processor, examples(), **options), collate(theirs, examples(), **options)
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(found[key], expected[key]), key
    assert not found["input_ids"].shape[1] % options.get("pad_to_multiple_of", 1)
    eager, sdpa = oracle.both(reference, lambda side: side(**found).loss)
    oracle.assert_close(model(**found).loss, eager, sdpa, "loss")
    singles = [collate(processor, [row]) for row in examples()]
    counts = [(row["labels"][:, 1:] != -100).sum() for row in singles]
    mean = sum(model(**row, num_items_in_batch=sum(counts)).loss for row in singles)
    torch.testing.assert_close(model(**found).loss, mean, rtol=1e-5, atol=0)
