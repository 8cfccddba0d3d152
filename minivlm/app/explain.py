"""What `minivlm explain` shows: one question, its answer, and how the model came to it, gathered as plain data.

    prompt ─► generate, nothing watched ─► the answer
    prompt and answer, one pass ─► attention, logit lens, rollout at the positions that chose the answer's tokens
    each of these positions ─► relevance (gradient × attention)
    prompt and answer, images grey ─► what they contribute
    prompt, one pass, by the clock ─► shapes and times of the stages

N answer tokens, L layers, H heads, S positions, Q latents, P patches. `page` makes the HTML of it.
"""

import base64
import html
import io
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.resources import files
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from minivlm import __version__
from minivlm.app.answer import encoded
from minivlm.families import Stage, family
from minivlm.inside import attribute, edit, latents, logit_lens, watch
from minivlm.inside.hooks import hooked
from minivlm.inside.stages import stages_of
from minivlm.inside.watch import Seen
from minivlm.parity.sides import code_at
from minivlm.text.messages import make_message

LONGEST = 960  # pixels of an image on the page
RELEVANCE = 500_000_000  # parameters: gradients of larger models take long, and much memory
WORDS = {  # what happens in a stage, by the beginning of its name
    "patch embedding": "every patch becomes a vector, and its position is added",
    "first norm": "the vectors are normalised",
    "vision layer": "patches attend to each other",
    "vision norm": "the vectors are normalised",
    "projection": "from the width of the vision tower to that of the text",
    "resampler layer": "latents gather what they need from the patches",
    "resampler attention": "latents gather what they need from the patches",
    "resampler MLP": "each latent is worked on by itself",
    "resampler norm": "the latents are normalised",
    "packed vectors": "tiles are put together as the image lies; the border goes, newlines come",
    "merged embeddings": "image vectors take the positions of the image tokens",
    "token embeddings": "ids become vectors",
    "gated block": "text attends to the image vectors; a gate scales the result",
    "decoder layer": "tokens attend to those before them",
    "final norm": "the vectors are normalised",
    "logits": "a score for every token of the vocabulary",
}


@torch.no_grad()
def gather(
    model: Any,
    processor: Any,
    images: list[Any],
    question: str,
    *,
    layers: list[int] | None = None,
    room: int = 5_000_000,
    **settings: Any,
) -> dict[str, Any]:
    """Everything the page shows, as plain data.

    images: PIL, RGB.  layers: whose heads are kept one by one; None = as many, evenly spaced, as fit in `room` bytes;
    of other layers only the mean over heads is kept.
    settings: of `generate`.  Raises ValueError for a prompt without an image and for unknown layers, and what
    `generate` raises.
    """
    if not images:
        raise ValueError("there is nothing to explain without an image")
    last = model.decoder.config.num_hidden_layers - 1
    if layers is not None and not all(0 <= number <= last for number in layers):
        raise ValueError(f"layers are numbered from 0 to {last} here, found {layers}")
    inputs = dict(encoded(processor, [make_message("user", question, images)]).to(model.device))
    start = time.perf_counter()
    ids = model.generate(**inputs, **settings)
    seconds, length = time.perf_counter() - start, inputs["input_ids"].shape[1]
    answer = ids[0, length:]
    text = _with_answer(inputs, ids)
    with _watched(model, len(answer)) as (seen, rollout):
        probabilities = model(**text, logits_to_keep=len(answer)).logits[0].float().softmax(-1)
    grey = model(**text | {"pixel_values": torch.zeros_like(text["pixel_values"])}, logits_to_keep=len(answer))
    views = _of_images(seen, processor, images, model.config)
    layers = layers or _fitting(model, length, len(answer), room)
    return {
        "version": __version__,
        "model": _about(model),
        "question": question,
        "answer": processor.decode(answer, skip_special_tokens=True).strip(),
        "seconds": round(seconds, 2),
        "images": [_image(model.config, processor, *each) for each in zip(images, views, strict=True)],
        "prompt": _tokens(processor, seen, inputs, views, length),
        "tokens": _answer(model, processor, seen, answer, probabilities, grey.logits[0].float().softmax(-1)),
        "attention": _attention(seen, rollout, len(answer), length, layers),
        "latents": _latents(seen),
        "relevance": _relevance(model, inputs, ids, length),
        "stages": _stages(model, inputs),
    }


def page(found: dict[str, Any]) -> str:
    """One HTML file that needs nothing else: no network, no library."""
    template = files("minivlm.app").joinpath("explain.html").read_text(encoding="utf-8")
    data = json.dumps(found, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(f"{found['question']} - {found['model']['name']}")
    head, between, end = re.split(r"{{title}}|{{data}}", template)
    return f"{head}{title}{between}{data}{end}"  # the question may contain such marks itself


def _fitting(model: Any, positions: int, tokens: int, room: int) -> list[int]:
    """As many layers as `room` bytes hold with all their heads, evenly spaced, the last one among them."""
    config = model.decoder.config
    rows = tokens * config.num_attention_heads
    each = 4 / 3 * positions * rows + 6 * rows  # a byte for each weight, in base64, and the largest of each row
    count = min(config.num_hidden_layers, max(1, int(room / each)))
    return sorted({round((number + 1) * config.num_hidden_layers / count) - 1 for number in range(count)})


# ---- Running


def _with_answer(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The inputs, continued by all tokens of `ids` (1, P + N) but the last."""
    more = ids.shape[1] - 1 - inputs["input_ids"].shape[1]
    text = {**inputs, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    if "image_attention_mask" in inputs:
        mask = inputs["image_attention_mask"]
        text["image_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, more, -1)], dim=1)
    return text


class _Rollout:
    """Attention rollout (Abnar & Zuidema 2020) as the layers run: half of what a position has, half of what it attends
    to. text: (S, S); vectors: (S, N·Q) of crossed models, or None."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        self.vectors: Tensor | None = None

    def layer(self, weights: Tensor) -> Tensor:
        mean = weights[0].float().mean(0)
        before = torch.eye(len(mean), device=mean.device) if self.text is None else self.text
        self.text = (before + mean @ before) / 2
        if self.vectors is not None:
            self.vectors = (self.vectors + mean @ self.vectors) / 2
        return weights

    def block(self, weights: Tensor) -> Tensor:
        mean = weights[0].float().mean(0)
        self.vectors = mean if self.vectors is None else (self.vectors + mean) / 2
        return weights


@contextmanager
def _watched(model: Any, tokens: int) -> Iterator[tuple[Seen, _Rollout]]:
    """What is kept of the pass: the last `tokens` positions, and the rollout."""
    stages, rollout = stages_of(model), _Rollout()
    weights = [stage.name for stage in stages if stage.take == "weights" and stage.rows != "patches"]
    changes = {name: rollout.block if name.startswith("gated") else rollout.layer for name in weights}
    changes = {name: change for name, change in changes.items() if not name.startswith("resampler")}
    with edit(model, changes), watch(model, "decoder layer *", *weights, last=tokens, to="cpu") as seen:
        yield seen, rollout


# ---- The model and its stages


def _about(model: Any) -> dict[str, Any]:
    return {
        "name": getattr(model, "name_or_path", "") or model.config.model_type,
        "type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "torch": torch.__version__,
    }


def _stages(model: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompt's path through the model: layers of one kind in one row, with shapes, milliseconds and code."""
    stages = [stage for stage in stages_of(model) if stage.take not in ("weights", "heads") and "," not in stage.name]
    model(**inputs)  # once before the clock counts
    shapes, seconds, total = _timed(model, inputs, stages)
    rows: dict[str, dict[str, Any]] = {}
    for stage in stages:
        kind = stage.name.rstrip("0123456789").strip()
        if stage.name not in shapes:
            continue
        row = rows.setdefault(kind, {"name": kind, "count": 0, "ms": 0.0, "what": WORDS.get(kind, "")})
        row["count"] += 1
        row["ms"] = round(row["ms"] + 1000 * seconds[stage.name], 2)
        row["shape"] = " + ".join("x".join(map(str, shape)) for shape in shapes[stage.name])
        owner = type(model.get_submodule(stage.blame or stage.ours))
        plain = owner.__module__.startswith("torch.")
        row["code"] = f"torch {owner.__name__}" if plain else code_at(owner)
    return [*rows.values(), {"name": "in all", "count": 1, "ms": round(1000 * total, 2), "what": "", "shape": ""}]


def _timed(
    model: Any, inputs: dict[str, Any], stages: list[Stage]
) -> tuple[dict[str, list[tuple[int, ...]]], dict[str, float], float]:
    """One pass: the shapes of each stage's calls, the seconds its module took, and the seconds of all."""
    shapes: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    begun, seconds = {}, defaultdict(float)

    def begin(name: str, *_: Any) -> None:
        begun[name] = time.perf_counter()

    def end(name: str, *_: Any) -> None:
        seconds[name] += time.perf_counter() - begun[name]

    def note(stage: Stage, value: Tensor) -> None:
        shapes[stage.name].append(tuple(value.shape))

    with ExitStack() as stack:
        for stage in stages:
            if stage.take == "output":
                module = model.get_submodule(stage.ours)
                stack.callback(module.register_forward_pre_hook(partial(begin, stage.name)).remove)
                stack.callback(module.register_forward_hook(partial(end, stage.name)).remove)
        stack.enter_context(hooked(model, dict.fromkeys(stages, note)))
        start = time.perf_counter()
        model(**inputs)
        return shapes, seconds, time.perf_counter() - start


# ---- Images


def _of_images(seen: Seen, processor: Any, images: list[Any], config: Any) -> list[list[int]]:
    """For each image the numbers of its views, counted over the row: Idefics2's crops are images of their own there."""
    patch, regions = config.vision_config.patch_size, processor.image_processor.regions
    counts = [len(regions(image.height, image.width, patch)) for image in images]
    found = sum(map(len, seen.views()))
    if sum(counts) != found:
        raise ValueError(f"the images make {sum(counts)} views, but the model ran {found}")
    numbers = iter(range(found))
    return [list(islice(numbers, count)) for count in counts]


def _image(config: Any, processor: Any, image: Any, views: list[int]) -> dict[str, Any]:
    record = family(config.model_type)
    regions = processor.image_processor.regions(image.height, image.width, config.vision_config.patch_size)
    shown = image.copy()
    shown.thumbnail((LONGEST, LONGEST))
    notes = record.slicing
    return {
        "width": image.width,
        "height": image.height,
        "src": _data_url(shown),
        "notes": [] if notes is None else notes(image.height, image.width, regions, processor.image_processor, config),
        "views": [
            {
                "name": region.name,
                "view": number,
                "grid": region.grid,
                "box": [region.top, region.left, region.height, region.width],
                "buckets": None if record.buckets is None else record.buckets(region.grid, config),
            }
            for region, number in zip(regions, views, strict=True)
        ],
    }


def _data_url(image: Any) -> str:
    """As PNG if that is small, as drawings are, else as JPEG."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=82)
    kind, data = ("png", png) if png.tell() < 2 * jpeg.tell() else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


# ---- Tokens


def _tokens(processor: Any, seen: Seen, inputs: dict[str, Any], views: list[list[int]], length: int) -> list[Any]:
    """The prompt's tokens: id, text, kind, and for image positions image, view, row and column (−1 = none)."""
    special = {processor.tokenizer.convert_tokens_to_ids(token) for token in processor.tokenizer.all_special_tokens}
    image_of = {view: number for number, some in enumerate(views) for view in some}
    first = list(accumulate(map(len, seen.views()), initial=0))
    cells, mask = seen.images[0].tolist(), inputs.get("image_attention_mask")
    found = []
    for position, id in enumerate(inputs["input_ids"][0].tolist()):
        image, view, row, column = cells[position]
        token: dict[str, Any] = {"id": id, "text": _piece(processor, id), "kind": "text"}
        if id == processor.image_token_id:
            number = first[image] + max(view, 0) if image >= 0 else -1
            of = image_of.get(number, -1)
            token |= {"kind": "image" if image < 0 or column >= 0 else "newline", "image": of}
            token["cell"] = [number if view >= 0 else -1, row, column]
        elif id in special:
            token["kind"] = "special"
        if mask is not None:
            token["sees"] = mask[0, position].nonzero()[:, 0].tolist()
            if token["kind"] == "image" and token["sees"]:
                token["image"] = token["sees"][-1]
        found.append(token)
    return found[:length]


def _piece(processor: Any, id: int) -> str:
    """A token as its vocabulary spells it, with a visible blank."""
    token = processor.tokenizer.convert_ids_to_tokens(int(id)) or ""
    return token.replace("▁", "·").replace("Ġ", "·").replace("Ċ", "↵").replace("<0x0A>", "↵")


def _answer(model: Any, processor: Any, seen: Seen, answer: Tensor, p: Tensor, grey: Tensor) -> list[Any]:
    """The answer's tokens: probability, runners-up, the same with grey images, and the logit lens."""
    lens = logit_lens(model, seen, answer[None], ends=list(range(len(answer))), top=3)
    found = []
    for number, id in enumerate(answer.tolist()):
        likeliest = p[number].topk(5)
        found.append(
            {
                "id": id,
                "text": _piece(processor, id),
                "p": round(float(p[number, id]), 5),
                "grey": round(float(grey[number, id]), 5),
                "top": _named(processor, likeliest.indices, likeliest.values),
                "lens": [
                    {
                        "p": round(float(lens.probability[layer, 0, number]), 5),
                        "top": _named(processor, lens.top_ids[layer, 0, number], lens.top[layer, 0, number]),
                    }
                    for layer in range(len(lens.layers))
                ],
            }
        )
    return found


def _named(processor: Any, ids: Tensor, values: Tensor) -> list[list[Any]]:
    return [[_piece(processor, id), round(value, 5)] for id, value in zip(ids.tolist(), values.tolist(), strict=True)]


# ---- Where it looks


def packed(values: Tensor) -> dict[str, Any]:
    """Values (…, n) ≥ 0 as bytes, each relative to the largest of its row. The square root is stored: it keeps small
    values apart, and 255² levels are enough for the eye."""
    values = values.float().clamp(min=0)
    most = values.amax(-1, keepdim=True)
    data = (255 * (values / most.clamp(min=1e-30)).sqrt()).round().to(torch.uint8)
    encoded = base64.b64encode(data.contiguous().numpy().tobytes()).decode()
    return {
        "shape": list(values.shape),
        "most": [float(f"{each:.4g}") for each in most.flatten().tolist()],
        "data": encoded,
    }


def _attention(seen: Seen, rollout: _Rollout, tokens: int, length: int, layers: list[int]) -> dict[str, Any]:
    """Weights over the prompt's positions, and over image vectors where these are not tokens.

    text: for each layer the mean over heads, (N, P), and if it is one of `layers` each head, (N, H, P).
    vectors: the same for the gated blocks; block: which of them each decoder layer comes after.
    """
    names = [name for name in seen if name.startswith("decoder") and "," in name]
    crossed = [name for name in seen if name.startswith("gated")]
    found = {
        "text": [_layer(seen[name][0][..., :length], number in layers) for number, name in enumerate(names)],
        "rollout": {"text": packed(rollout.text[-tokens:, :length].cpu())},
        "vectors": [],
        "block": [],
    }
    if crossed:
        interval = len(names) // len(crossed)
        found["block"] = [layer // interval for layer in range(len(names))]
        found["vectors"] = [
            _layer(seen[name][0], any(layer // interval == number for layer in layers))
            for number, name in enumerate(crossed)
        ]
        found["rollout"]["vectors"] = packed(rollout.vectors[-tokens:].cpu())
    return found


def _layer(weights: Tensor, heads: bool) -> dict[str, Any]:
    """weights: (H, N, P)."""
    found = {"mean": packed(weights.float().mean(0))}
    return found | {"heads": packed(weights.transpose(0, 1))} if heads else found


def _latents(seen: Seen) -> list[dict[str, Any]]:
    """For each view of the row where its latents look: (Q, h · w). [] without a resampler."""
    if not seen.layout.vectors:
        return []
    return [packed(grid.flatten(1).cpu()) for image in latents(seen) for grid in image]


def _relevance(model: Any, inputs: dict[str, Any], ids: Tensor, length: int) -> list[Any]:
    """For each answer token its relevance over the patches of every view; [] for large models."""
    if model.num_parameters() > RELEVANCE:
        return []
    found = []
    for end in range(length, ids.shape[1]):
        text = _with_answer(inputs, ids[:, : end + 1])
        patches = attribute(model, text, int(ids[0, end])).patches
        found.append([packed(grid.flatten()) for image in patches for grid in image])
    return found
