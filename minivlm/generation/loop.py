"""Text from logits, one token at a time: `prefill` the prompt, then `decode_step` after `decode_step`.

    ids (B, P) ──prefill──► logits (B, V) ──rules──► scores ──argmax or sample──► token (B,) ──decode_step──► logits …
                    └──────────── KVCache, P + N slots, allocated once ────────────┘

Everything here is a plain function over a model; it knows token ids, not text or images: whatever else the model takes
(`pixel_values`, …) goes to the prefill as it is, and never to a decode step, so that an image placeholder which the
model writes itself is just a token. `generate` collects what `stream` yields, or hands over to `beams`. On CUDA,
`CapturedStep` stands in for `decode_step`.

B rows, n copies of each (beams, or samples) that differ from the first new token on, P prompt ids, K prompt keys (P, or
the length of `inputs_embeds`), N new tokens, S ids so far, V vocabulary. The rules act on float32 scores in the order
of `logits_rules`; they follow transformers 5.23, including its oddities.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.beams import Beams, beam_search
from minivlm.generation.cuda_graph import CapturedStep
from minivlm.generation.diagnosis import explain
from minivlm.generation.request import Run, positions, prepare
from minivlm.generation.sampling import sample
from minivlm.generation.stopping import ended, finish_reasons
from minivlm.modules.cache import KVCache

# ---- The model's two steps ----


def prefill(
    model: Any,
    input_ids: Tensor | None,
    cache: KVCache | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Run ids (B, T), and the images with them, into `cache`; the last position's logits, (B, V) float32.

    `attention_mask` (B, cached + T) is True at real tokens; None if there are no pads. `position_ids` is (B, T).
    """
    if position_ids is None and attention_mask is not None:
        position_ids = positions(attention_mask)[:, 0 if cache is None else cache.length :]
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        logits_to_keep=1,
        **inputs,
    )
    return output.logits[:, -1].float()


def decode_step(
    model: Any, token: Tensor, cache: KVCache, position: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Run one more token (B,) at `position` (B,); the logits for the one after it, (B, V) float32."""
    return prefill(model, token[:, None], cache, attention_mask, position[:, None])


# ---- The loop ----


@dataclass
class GenerateOutput:
    """What `return_dict_in_generate` returns, in the reference's words; None where a call did not ask for it."""

    sequences: Tensor  # (B·R, P + M): R sequences for each row
    scores: tuple[Tensor, ...] | None = None  # for each step (B·n, V): what the tokens were chosen by
    logits: tuple[Tensor, ...] | None = None  # for each step (B·n, V)
    sequences_scores: Tensor | None = None  # (B·R,), of beams
    beam_indices: Tensor | None = None  # (B·R, M): the row of `scores` in which each token was found, −1 after the end
    past_key_values: KVCache | None = None
    finish_reasons: list[str] | None = None  # (B·R): "stop" by an eos id, a string or a rule; "length": cut at a limit


class Stream(Iterator[Tensor]):
    """The new tokens, (B·n,) a step; and why each row ended."""

    def __init__(self, model: Any, run: Run) -> None:
        self._run, self._steps = run, _steps(model, run)

    def __next__(self) -> Tensor:
        return next(self._steps)

    @property
    def finish_reasons(self) -> list[str]:
        """(B·n): "stop" by an eos id, a stop string or a rule of the caller's; "length": cut at a limit, or not yet."""
        return finish_reasons(self._run.done)


def stream(model: Any, input_ids: Tensor | None = None, **options: Any) -> Stream:
    """The new tokens as they come, (B·n,) a step; arguments and errors as in `generate`. The prompt is not repeated.

        tokens = stream(model, **inputs, max_new_tokens=100)
        for token in tokens: …
        tokens.finish_reasons       # ["length"]: the answer was cut

    Raises ValueError for beams too: which of them a token belongs to is known at the end only.
    """
    run = prepare(model, input_ids, **options)
    if run.settings.num_beams > 1 or run.settings.return_dict_in_generate:
        raise ValueError("a stream knows neither num_beams nor return_dict_in_generate; call generate")
    return Stream(model, run)


def generate(
    model: Any, input_ids: Tensor | None = None, *, streamer: Any = None, **options: Any
) -> Tensor | GenerateOutput:
    """Continue `input_ids` (B, P) by at most N tokens: (B·R, P + N) ids, ended rows filled with the pad id.

    Options are settings (the fields of `GenerationConfig`; they win over `generation_config`, which wins over the
    checkpoint's), the model's own inputs (`pixel_values`, `inputs_embeds`, …), and

    attention_mask: (B, P), 1 = real; rows of different lengths are padded on the left. Without it, pad ids are pads.
    generator, seed: what sampling draws from; without either, from torch's own generator.
    streamer: gets the prompt and then each step's tokens by `put`, and `end` at the end; not with beams.
    tokenizer: reads the answer for `stop_strings`.
    logits_processor: a list of functions (ids (B·n, S), scores (B·n, V)) → scores, called before the rules of sampling.
    stopping_criteria: a list of functions (ids (B·n, S), tuple of all scores or None) → which rows end, (B·n,) bool.

    With `inputs_embeds` and no ids only the new tokens come back; R is `num_return_sequences`. The images and the
    prompt are run once for each row, however many beams or samples continue it.

    Raises ValueError for unknown, unsupported or impossible settings, for a prompt that does not fit the model, and
    for logits that are not finite.
    """
    run = prepare(model, input_ids, **options)
    search = run.settings.num_beams > 1
    if search and streamer is not None:
        raise ValueError("a streamer cannot follow beams, which are chosen at the end; pass num_beams=1")
    sequences, best = _search(model, run) if search else (_collect(model, run, streamer), None)
    if not run.settings.return_dict_in_generate:
        return sequences
    return GenerateOutput(
        sequences=sequences,
        scores=None if run.scores is None else tuple(run.scores),
        logits=None if run.logits is None else tuple(run.logits),
        sequences_scores=None if run.scores is None or best is None else best.scores,
        beam_indices=None if best is None else best.sources,
        past_key_values=run.cache,
        finish_reasons=finish_reasons(run.done if best is None else best.done),
    )


@torch.no_grad()
def _search(model: Any, run: Run) -> tuple[Tensor, Beams]:
    """Sequences (B·R, P + M), with their scores (B·R,) and beam indices (B·R, M)."""

    def reorder(rows: Tensor) -> None:
        if run.cache is not None:
            run.cache.reorder(rows, shared=run.keys)

    next_scores = partial(_next_scores, model, run)
    limits = (run.stops, run.deadline, run.generator)
    found = beam_search(next_scores, reorder, run.ids, run.prompt, run.settings, *limits)
    _check_finite(model, run, found[0].shape[1] - run.prompt - 1)
    return found


def _collect(model: Any, run: Run, streamer: Any) -> Tensor:
    """Sequences (B·n, P + M), handed to the streamer as they grow."""
    prompts = run.ids[:, : run.prompt]
    if streamer is not None:
        streamer.put(prompts.cpu())
    tokens = []
    for token in _steps(model, run):
        tokens.append(token)
        if streamer is not None:
            streamer.put(token.cpu())
    if streamer is not None:
        streamer.end()
    return torch.cat([prompts, torch.stack(tokens, 1)], 1)


@torch.no_grad()
def _steps(model: Any, run: Run) -> Iterator[Tensor]:
    """Yield up to N tokens (B·n,), fewer once every row has ended."""
    settings, ids, done = run.settings, run.ids, run.done
    fill = bool(settings.eos_ids)  # rows that end by other rules alone go on until all have, as in the reference
    for step in range(ids.shape[1] - run.prompt):
        end = run.prompt + step
        scores = _next_scores(model, run, step)
        token = sample(scores, run.generator) if settings.do_sample else scores.argmax(-1)
        if fill:
            token = token.masked_fill(done, settings.pad_token_id)
        ids[:, end] = token
        done |= ended(run.stops, ids[:, : end + 1])
        last = step + 1 == ids.shape[1] - run.prompt or time.monotonic() > run.deadline
        last = last or bool(run.stops and done.all())
        if last or run.stops:  # where `done` has waited for the device, looking is free
            _check_finite(model, run, step)
        yield token
        if last:
            return


def _next_scores(model: Any, run: Run, step: int) -> Tensor:
    """What the token after `step` new ones is chosen by, (B·n, V): logits (log-softmax for beams) after all rules."""
    logits = _next_logits(model, run, step)
    # NaN wins both, so the two see NaN and either infinity; on a CPU `isfinite().all()` takes three times as long
    run.finite &= logits.amin(-1).isfinite() & logits.amax(-1).isfinite()
    if step == 0 or logits.device.type == "cpu":  # looking waits for the device: elsewhere `_steps` does it later
        _check_finite(model, run, step)
    else:
        logits = logits.masked_fill(~run.finite[:, None], 0)  # drawing from NaN would bring the device down
    if run.logits is not None:
        run.logits.append(logits.clone())  # a processor may write into what it is given
    scores = logits.log_softmax(-1) if run.settings.num_beams > 1 else logits
    for rule in run.rules:
        scores = rule(scores, run.ids[:, : run.prompt + step])
    if run.scores is not None:
        run.scores.append(scores)
    return scores


def _next_logits(model: Any, run: Run, step: int) -> Tensor:
    """Logits after the prompt and `step` new tokens, (B·n, V)."""
    S = run.keys + step
    if step and run.cache is not None:
        return _decode(model, run, run.ids[:, run.prompt + step - 1], run.positions[:, S - 1], S)
    differing = range(run.copies if step else 1)  # before the first new token all copies of a row are the same
    logits = torch.stack([_read(model, run, step, copy) for copy in differing], 1)  # (B, n or 1, V)
    if run.cache is not None and run.copies > 1:
        run.cache = run.cache.expand(run.copies, run.positions.shape[1])
    return logits.expand(-1, run.copies, -1).flatten(0, 1)


def _decode(model: Any, run: Run, token: Tensor, position: Tensor, S: int) -> Tensor:
    """Run one more token (B·n,) at `position` (B·n,), S keys in all: as a graph on CUDA, else by `decode_step`."""
    if run.captured is None and _can_capture(run):
        run.captured = CapturedStep(model, run.cache, run.mask)
    if run.captured is not None:
        return run.captured(token, position)
    return decode_step(model, token, run.cache, position, None if run.mask is None else run.mask[:, :S])


def _can_capture(run: Run) -> bool:
    return run.cache.data.is_cuda and not run.settings.disable_compile


def _read(model: Any, run: Run, step: int, copy: int) -> Tensor:
    """Run everything that is not in the cache, images and all, for one copy of each row: its logits, (B, V)."""
    rows, S = slice(copy, None, run.copies), run.keys + step
    start = run.cache.length if run.cache is not None else 0  # ids that an earlier call has left in the cache
    ids = None if "inputs_embeds" in run.inputs else run.ids[rows, start : run.prompt + step]
    mask = None if run.mask is None else run.mask[rows, :S]
    return prefill(model, ids, run.cache, mask, run.positions[rows, start:S], **run.inputs)


def _check_finite(model: Any, run: Run, step: int) -> None:
    """Raise ValueError if a row's logits have not been finite up to this step: which row, and why."""
    if run.finite.all():
        return
    row = int((~run.finite).nonzero()[0])
    again = partial(_read, model, replace(run, cache=None), step, row % run.copies)
    raise ValueError(
        f"the logits of row {row // run.copies} are not finite at new token {step + 1}: "
        f"{explain(model, run.inputs, again)}"
    )
