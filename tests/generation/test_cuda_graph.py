"""The decode step on fixed shapes against the plain one; and what a step may not do: grow with the text, or wait.

Without a GPU the same code runs without a graph. What only a graph can get wrong is for `-m gpu`.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import pytest
import torch
from tiny_chat import random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minivlm.generation import loop
from minivlm.generation.cuda_graph import CapturedStep
from minivlm.generation.loop import Decoding
from minivlm.generation.request import prepare
from minivlm.models.idefics import IdeficsForVisionText2Text
from minivlm.models.idefics2 import Idefics2ForConditionalGeneration
from minivlm.models.llava_next import LlavaNextForConditionalGeneration
from minivlm.modules.rope_scaling import RopeScaling

N = 8  # new tokens
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 24}
LONGROPE |= {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8}  # the new tokens cross from one to the other


def idefics2(window: int | None = None) -> tuple[Any, dict[str, Tensor]]:
    model = random_model(Idefics2ForConditionalGeneration, oracle.idefics2_config(window=window))
    return model, oracle.random_inputs((2, 0, 1), patch=4)


def llava_next() -> tuple[Any, dict[str, Tensor]]:
    config = oracle_llava.llava_config(text={"rope_scaling": LONGROPE})
    model = random_model(LlavaNextForConditionalGeneration, config)
    assert isinstance(model.config.text_config.rope_scaling, RopeScaling)
    return model, oracle_llava.llava_inputs([[(12, 12)], []], config)


def idefics() -> tuple[Any, dict[str, Tensor]]:
    model = random_model(IdeficsForVisionText2Text, oracle_idefics.idefics_config())
    return model, oracle_idefics.random_inputs((2, 0, 1))


MODELS = {"idefics2": idefics2, "window": lambda: idefics2(5), "llava_next": llava_next, "idefics": idefics}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Tensor]]:
    """(model, a left-padded batch with pictures); the window of 5 is shorter than every prompt."""
    return MODELS[request.param]()


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation takes the step on fixed shapes on any device."""
    monkeypatch.setattr(loop, "_can_capture", lambda *_: True)


def started(model: Any, inputs: dict[str, Tensor]) -> Decoding:
    """The prompt is in its cache, and a token waits to be run; the other slots hold NaN, as fresh memory may."""
    decoding = loop.stream(model, **inputs, max_new_tokens=N, eos_token_id=None)
    decoding.cache.data.fill_(torch.nan)
    decoding.next_logits()
    decoding.append(torch.full_like(decoding.ids[:, 0], 11))
    return decoding


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


# ---- The same answers ------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_same_steps(model: Any, inputs: dict[str, Tensor], tolerance: float) -> None:
    """Logits and caches of N steps. Slots that are not filled add exact zeros to sums, in another order."""
    plain, fixed = started(model, inputs), started(model, inputs)
    captured = CapturedStep(model, fixed.cache, fixed.run.mask)
    for step in range(1, N):
        expected = plain.next_logits()
        found = captured(*newest(plain))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
        plain.append(torch.full_like(plain.ids[:, 0], 11 + step))
    assert fixed.cache.length == plain.cache.length == fixed.run.keys + N - 1
    filled = [run.cache.data[..., : run.cache.length, :].float() for run in (fixed, plain)]
    torch.testing.assert_close(*filled, rtol=0, atol=tolerance * filled[1].abs().max().item())


def newest(decoding: Decoding) -> tuple[Tensor, Tensor]:
    """The token that waits to be run, and its position."""
    return decoding.text[:, -1], decoding.run.positions[:, decoding.run.keys + decoding.count - 1]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_steps_equal_plain_ones(case: tuple[Any, dict[str, Tensor]], backend: str, monkeypatch: Any) -> None:
    model, inputs = case
    monkeypatch.setattr(model, "attn_implementation", backend)
    assert_same_steps(model, inputs, 1e-5)


@torch.no_grad()
def test_the_kernel_is_told_on_the_device_how_much_is_filled(case: tuple[Any, dict[str, Tensor]]) -> None:
    model, inputs = case
    plain, fixed = started(model, inputs), started(model, inputs)
    captured = CapturedStep(model, fixed.cache, fixed.run.mask)
    expected = plain.next_logits()
    model.attn_implementation = "triton"
    try:
        found = captured(*newest(plain))
    finally:
        model.attn_implementation = None
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_steps_equal_plain_ones_without_padding() -> None:
    model, _ = idefics2(window=5)
    assert_same_steps(model, {"input_ids": torch.arange(1, 11)[None]}, 1e-5)


CALLS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2, "seed": 3},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


def answers(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Ids, and scores and logits of each step where they are asked for."""
    found = model.generate(**inputs, max_new_tokens=N, **options)
    return [found] if isinstance(found, Tensor) else [found.sequences, *found.scores, *found.logits]


@pytest.mark.parametrize("name", CALLS)
def test_answers_equal_plain_ones(case: tuple[Any, dict[str, Tensor]], name: str, request: Any) -> None:
    model, inputs = case
    expected = answers(model, inputs, **CALLS[name])
    request.getfixturevalue("fixed")
    for ours, plain in zip(answers(model, inputs, **CALLS[name]), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)  # ids are integers and have to be equal


@pytest.mark.usefixtures("fixed")
def test_a_cache_goes_on_in_another_call() -> None:
    """As a chat does: the cache of the first answer is cropped, and has more slots than the second one takes."""
    model, inputs = idefics2(window=5)
    inputs = {name: value[1:2, 8:] for name, value in inputs.items() if "pixel" not in name}
    cache = model.new_cache(1, 64)
    first = model.generate(**inputs, max_new_tokens=N, past_key_values=cache, eos_token_id=None)
    cache.crop(first.shape[1] - 3)
    second = model.generate(first, attention_mask=None, max_new_tokens=N, past_key_values=cache, eos_token_id=None)
    assert torch.equal(second, model.generate(first, attention_mask=None, max_new_tokens=N, eos_token_id=None))


@torch.no_grad()
def test_a_full_cache_is_an_error() -> None:
    model, _ = idefics2()
    cache = model.new_cache(1, 2)
    step = CapturedStep(model, cache)
    token = torch.tensor([5])
    for position in range(2):
        step(token, torch.tensor([position]))
    with pytest.raises(ValueError, match="is full"):
        step(token, torch.tensor([2]))


# ---- Nothing grows, nothing waits ------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do, and keeps the sizes of what is put together."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.joined: list[int] = []

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.counts[func._schema.name] += 1
        if func._schema.name in ("aten::cat", "aten::stack", "aten::copy_", "aten::clone"):
            self.joined.append(found.numel())
        return found


@torch.no_grad()
def operations(model: Any, cached: int, captured: bool) -> Operations:
    """Those of a step behind so many tokens."""
    cache = model.new_cache(2, 600)
    cache.data.normal_()
    cache.length = cached
    mask = torch.ones(2, 600, dtype=torch.bool)
    mask[0, :2] = False  # left padding
    if isinstance(model, IdeficsForVisionText2Text):
        pairs = [(torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16)) for _ in model.model.gated_cross_attn_layers]
        cache.cross, cache.cross_seen = pairs, torch.ones(2, 1, 1, dtype=torch.bool)
    token, position = torch.tensor([7, 8]), torch.tensor([cached - 2, cached])
    step = CapturedStep(model, cache, mask) if captured else None
    with Operations() as seen:
        if captured:
            step(token, position)
        else:
            loop.decode_step(model, token, cache, position, mask[:, : cached + 1])
    return seen


@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_a_step_does_not_grow_and_does_not_wait(case: tuple[Any, dict[str, Tensor]], captured: bool) -> None:
    """As many operations behind 512 tokens as behind 16; none copies the cache."""
    model, _ = case
    operations(model, 16, captured)  # frequencies are computed once
    few, many = operations(model, 16, captured), operations(model, 512, captured)
    assert few.counts == many.counts
    assert few.joined == many.joined
    waits = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}  # for the device
    assert not (waits | {"aten::lift_fresh"}) & set(many.counts)  # and none copies a tensor from the host


@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_generation_waits_once_a_token(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whether all rows have ended. On a CPU, where nothing waits, each step's logits are checked as well."""
    model, inputs = idefics2()
    monkeypatch.setattr(loop, "_can_capture", lambda *_: captured)
    monkeypatch.setattr(Decoding, "check_finite", lambda *_: None)
    reads = []
    for tokens in (4, 9):
        with Operations() as seen:
            found = model.generate(**inputs, max_new_tokens=tokens, eos_token_id=[99])
        assert found.shape[1] == inputs["input_ids"].shape[1] + tokens  # no row has met 99
        reads.append(seen.counts["aten::_local_scalar_dense"])
    assert reads[1] - reads[0] == 9 - 4


def test_a_graph_can_be_declined() -> None:
    model, inputs = idefics2()
    run = prepare(model, **inputs, disable_compile=True)
    run.cache.data = torch.empty(0, device="meta")
    assert not loop._can_capture(run.cache, run)


def test_a_step_that_cannot_be_captured_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, _ = idefics2()
    step = CapturedStep(model, model.new_cache(1, 4))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(RuntimeError, match="disable_compile=True"):
        step._capture()


class Graph:
    """A graph on a CPU: its replay runs the step, with what a fault makes of it."""

    def __init__(self, step: CapturedStep, factor: float, count: int) -> None:
        self.step, self.factor, self.count, self.replays = step, factor, count, 0

    def replay(self) -> None:
        self.replays += 1
        self.step.logits.copy_(self.step._run() * self.factor)
        self.step.static.advance(self.count)


@torch.no_grad()
@pytest.mark.parametrize(("factor", "count"), [(1.0, 0), (1.1, 0), (torch.nan, 0), (1.0, 1)])
def test_the_first_graph_is_compared_with_a_plain_step(
    factor: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that gives other numbers, or counts wrongly, is dropped with one warning, and answers stay right."""
    model, inputs = idefics2()
    plain, fixed = started(model, inputs), started(model, inputs)
    step = CapturedStep(model, fixed.cache, fixed.run.mask)
    step.captures, graph, good = True, Graph(step, factor, count), (factor, count) == (1.0, 0)
    monkeypatch.setattr(step, "_capture", lambda: setattr(step, "graph", graph))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(1, N):
            expected = plain.next_logits()
            torch.testing.assert_close(step(*newest(plain)), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
            plain.append(torch.full_like(plain.ids[:, 0], 11 + number))
    assert len([each for each in caught if "captured decode step" in str(each.message)]) == (0 if good else 1)
    assert graph.replays == (N - 2 if good else 1)
    assert (step.graph is graph) == good


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_equals_plain_steps(case: tuple[Any, dict[str, Tensor]], dtype: torch.dtype, monkeypatch: Any) -> None:
    """In bf16 another order of sums changes the last of 8 bits here and there, which a few layers carry on."""
    model, inputs = case
    monkeypatch.setattr(loop, "_can_capture", lambda *_: False)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert_same_steps(copy.deepcopy(model).to("cuda", dtype), on("cuda", inputs), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_answers_of_a_graph_equal_plain_ones(case: tuple[Any, dict[str, Tensor]], name: str) -> None:
    model, inputs = copy.deepcopy(case[0]).to("cuda"), on("cuda", case[1])
    found = answers(model, inputs, **CALLS[name])
    expected = answers(model, inputs, **CALLS[name], disable_compile=True)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_is_captured_once() -> None:
    model, inputs = idefics2()
    decoding = started(model.to("cuda"), on("cuda", inputs))
    step = CapturedStep(model, decoding.cache, decoding.run.mask)
    graphs = []
    for _ in range(1, 5):
        step(*newest(decoding))
        graphs.append(step.graph)
    assert graphs[0] is None
    assert graphs[1] is not None
    assert graphs[1] is graphs[2] is graphs[3]
