"""Generates text one token at a time: the prompt runs once, then each new token by itself, until every row has ended.

    ids (B, P) ──prefill──► logits (B, V) ──rules──► scores ──argmax or sample──► token (B,) ──decode step──► logits …
                    └──────────── KVCache, P + N slots, allocated once ────────────┘

The files in the order of a call: `generate` here → request.py joins arguments and settings.py into a `Run` → `Decoding`
here repeats: run the model (steps.py), choose a token (sampling.py; or beams.py, which follows several continuations),
end rows (stopping.py). These files handle token ids, not text or images: the model's other inputs (`pixel_values`, …)
enter with the prompt and never with a later token, so an image token that the model itself writes is an ordinary token.

B rows, n copies of each (beams, or samples) that differ from the first new token on, P prompt ids, K prompt keys (P, or
the length of `inputs_embeds`), N new tokens, S ids so far, V vocabulary. The rules act on float32 scores in the order
of `logits_rules`; they follow transformers 5.23, including its oddities.
"""

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.generation.beams import beam_search
from minivlm.generation.cuda_graph import CapturedStep
from minivlm.generation.diagnosis import explain
from minivlm.generation.output import GenerateOutput
from minivlm.generation.request import Run, prepare
from minivlm.generation.sampling import sample
from minivlm.generation.speculation import SpeculativeStep
from minivlm.generation.steps import decode_step, forward
from minivlm.generation.stopping import ended, finish_reasons
from minivlm.modules.cache import KVCache


@overload
def generate(
    model: Any, input_ids: Tensor | None = None, *, return_dict_in_generate: Literal[True], **options: Any
) -> GenerateOutput: ...


@overload
def generate(model: Any, input_ids: Tensor | None = None, **options: Any) -> Tensor: ...


def generate(
    model: Any, input_ids: Tensor | None = None, *, streamer: Any = None, **options: Any
) -> Tensor | GenerateOutput:
    """Continue `input_ids` (B, P) by at most N tokens: (B·R, P + N) ids, ended rows filled with the pad id.

    Options are settings (the fields of `GenerationConfig`; they win over `generation_config`, which wins over the
    checkpoint's), the model's own inputs (`pixel_values`, `inputs_embeds`, …), and

    attention_mask: (B, P), 1 = real; pad rows of different lengths on the left. By default, pad ids are padding.
    past_key_values: a cache from `model.new_cache`, empty or holding the first ids; it is extended.
    generator, seed: the random source of sampling; by default torch's own generator.
    streamer: receives the prompt and then each step's tokens by `put`, then `end`; not with beams.
    tokenizer: decodes the answer for `stop_strings`.
    logits_processor: a list of functions (ids (B·n, S), scores (B·n, V)) → scores, called before the rules of sampling.
    stopping_criteria: a list of functions (ids (B·n, S), tuple of all scores or None) → which rows end, (B·n,) bool.
    prefix_allowed_tokens_fn: a function (row, its ids (S,)) → the ids that may come next.
    assistant_model: a smaller model with the same vocabulary that guesses tokens ahead: same answer, faster.

    With `inputs_embeds` instead of ids, only the new tokens are returned; R is `num_return_sequences`. The images and
    the prompt run once per row, however many beams or samples continue it.

    Raises ValueError for unknown, unsupported or impossible settings, for a prompt that does not fit the model, and
    for logits that are not finite.
    """
    decoding = Decoding(model, prepare(model, input_ids, **options))
    settings, best = decoding.run.settings, None
    if settings.num_beams > 1:
        if streamer is not None:
            raise ValueError("a streamer cannot follow beams, which are chosen at the end; pass num_beams=1")
        sequences, best = beam_search(decoding)
    else:
        sequences = _collect(decoding, streamer)
    if not settings.return_dict_in_generate:
        return sequences
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=best.scores if best is not None and "scores" in decoding.kept else None,
        beam_indices=None if best is None else best.sources,
        past_key_values=decoding.cache,
        finish_reasons=finish_reasons(decoding.done if best is None else best.done, decoding.limit),
        **{name: tuple(steps) for name, steps in decoding.kept.items()},
    )


def stream(model: Any, input_ids: Tensor | None = None, **options: Any) -> "Decoding":
    """An iterator over the new tokens, (B·n,) per step, without the prompt; arguments and errors as in `generate`.

        tokens = stream(model, **inputs, max_new_tokens=100)
        for token in tokens: …
        tokens.finish_reasons       # ["length"]: the answer was cut

    Raises ValueError for beams too, because the best beam is known only at the end.
    """
    run = prepare(model, input_ids, **options)
    if run.settings.num_beams > 1 or run.settings.return_dict_in_generate:
        raise ValueError("a stream has neither num_beams nor return_dict_in_generate; call generate")
    return Decoding(model, run)


def _collect(decoding: "Decoding", streamer: Any) -> Tensor:
    """Sequences (B·n, P + M), handed to the streamer as they grow."""
    if streamer is None:
        for _ in decoding:
            pass
        return decoding.text
    streamer.put(decoding.text.cpu())
    for token in decoding:
        streamer.put(token.cpu())
    streamer.end()
    return decoding.text


class Decoding(Iterator[Tensor]):
    """A running request: each `next` chooses one token for every row. Holds everything that changes between steps."""

    def __init__(self, model: Any, run: Run) -> None:
        self.model, self.run = model, run
        self.ids = F.pad(run.ids, (0, run.new_tokens))  # (B·n, P + N)
        self.count, self.over = 0, False  # of new tokens
        self.cache = run.cache  # B rows until the prompt is in it, then B·n
        self.step: CapturedStep | SpeculativeStep | None = None  # replaces the plain decode step
        self.done = torch.zeros(len(run.ids), dtype=torch.bool, device=run.ids.device)  # a rule has ended the row
        self.finite = ~self.done  # all logits of the row have been finite so far
        self.limit = "length"  # cuts the other rows, or "time"
        self.kept = {name: [] for name in run.outputs}  # of every step
        self.layers = [name for name in ("attentions", "hidden_states") if name in self.kept]
        self.wanted = {f"output_{name}": True for name in self.layers}

    @torch.no_grad()
    def __next__(self) -> Tensor:
        """One more token (B·n,): at most N, fewer once every row has ended."""
        if self.over:
            raise StopIteration
        scores, run = self.next_scores(), self.run
        token = sample(scores, run.generator) if run.settings.do_sample else scores.argmax(-1)
        if run.settings.eos_ids:  # without them, ended rows continue until all have ended, as in the reference
            token = token.masked_fill(self.done, run.settings.pad_token_id)
        self.over = self.is_last_step()
        self.append(token)
        self.done |= self.ended(self.text)
        self.over = self.over or bool(run.stops and self.done.all())
        if self.over or run.stops:  # the device is synchronised at this point anyway
            self.check_finite(self.count - 1)
        return token

    # ---- The text ----

    @property
    def text(self) -> Tensor:
        """The ids so far, (B·n, S)."""
        return self.ids[:, : self.run.ids.shape[1] + self.count]

    def append(self, token: Tensor, rows: Tensor | None = None) -> None:
        """Append a token (B·n,) to every row; with beams, row i first becomes a copy of row rows[i]."""
        if rows is not None:
            self.text.copy_(self.text[rows])
            if self.cache is not None:
                self.cache.reorder(rows, shared=self.run.keys)
        self.ids[:, self.run.ids.shape[1] + self.count] = token
        self.count += 1

    def ended(self, ids: Tensor) -> Tensor:
        """The rows of ids (R, S) that a rule ends, (R,) bool."""
        return ended(self.run.stops, ids, tuple(self.kept["scores"]) if "scores" in self.kept else None)

    @property
    def finish_reasons(self) -> list[str]:
        """(B·n): "stop" by an eos id, a stop string or a criterion; else the limit that cuts it, "length" or "time"."""
        return finish_reasons(self.done, self.limit)

    def is_last_step(self) -> bool:
        """Whether a limit ends all rows after the next token."""
        if self.count + 1 < self.run.new_tokens and self.run.deadline < math.inf:
            late = time.monotonic() > self.run.deadline
            if self.model.agreed(late) if hasattr(self.model, "agreed") else late:  # each process has its own clock
                self.limit = "time"
        return self.count + 1 == self.run.new_tokens or self.limit == "time"

    # ---- The model ----

    def next_scores(self) -> Tensor:
        """Scores (B·n, V) of the next token: logits (log-softmax for beams) after all rules."""
        logits = self.next_logits()
        if not self.run.settings.remove_invalid_values:
            logits = self._watched(logits)
        if "logits" in self.kept:
            self.kept["logits"].append(logits.clone())  # a processor may modify its argument
        scores = logits.log_softmax(-1) if self.run.settings.num_beams > 1 else logits
        for rule in self.run.rules:
            scores = rule(scores, self.text)
        if "scores" in self.kept:
            self.kept["scores"].append(scores)
        return scores

    def next_logits(self) -> Tensor:
        """The model's logits (B·n, V) after the ids so far."""
        if self.count and self.cache is not None:
            return self._decode(self.text[:, -1], self.run.keys + self.count)
        differing = range(self.run.copies if self.count else 1)  # before the first token, copies of a row are equal
        outputs = [self._prefill(self.count, copy, self.cache, **self.wanted) for copy in differing]
        self._keep(outputs)
        if self.cache is not None and self.run.copies > 1:
            self.cache = self.cache.expand(self.run.copies, self.run.positions.shape[1])
        return self._rows([output.logits[:, -1].float() for output in outputs])

    def _prefill(self, count: int, copy: int, cache: KVCache | None, **wanted: Any) -> Any:
        """Run everything not yet in the cache, images too, for one copy of each row with `count` new tokens."""
        run, rows, S = self.run, slice(copy, None, self.run.copies), self.run.keys + count
        start = 0 if cache is None else cache.length  # ids that an earlier call has cached
        ids = None if "inputs_embeds" in run.inputs else self.ids[rows, start : run.ids.shape[1] + count]
        mask = None if run.mask is None else run.mask[rows, :S]
        return forward(self.model, ids, cache, mask, run.positions[rows, start:S], **run.inputs, **wanted)

    def _decode(self, token: Tensor, S: int) -> Tensor:
        """Run the newest token (B·n,), the S-th of the sequence: (B·n, V)."""
        run, position = self.run, self.run.positions[:, S - 1]
        if self.step is None and run.guess is not None:
            prompt = run.ids[0].tolist()
            self.step = SpeculativeStep(self.model, self.cache, run.guess, prompt, run.positions, run.mask)
        if self.step is None and not self.wanted and _can_capture(self.cache, run) and not _is_hooked(self.model):
            self.step = CapturedStep(self.model, self.cache, run.mask)
        if self.step is not None:
            return self.step(token, position)
        mask = None if run.mask is None else run.mask[:, :S]
        output = decode_step(self.model, token, self.cache, position, mask, **self.wanted)
        if self.layers:
            self._keep([output])
        return output.logits[:, -1].float()

    def _keep(self, outputs: Sequence[Any]) -> None:
        """Keep what is wanted of the layers, from the output for each copy of the rows, or for one."""
        for name in self.layers:
            layers = zip(*(getattr(output, name) for output in outputs), strict=True)
            self.kept[name].append(tuple(self._rows(copies) for copies in layers))

    def _rows(self, copies: Sequence[Tensor]) -> Tensor:
        """All B·n rows (B·n, …), from (B, …) for each copy or for one copy of each row; or unchanged."""
        x = torch.stack(list(copies), 1)
        return x.repeat_interleave(len(self.ids) // x.shape[0] // x.shape[1], 1).flatten(0, 1)

    # ---- Logits that are not finite ----

    def _watched(self, logits: Tensor) -> Tensor:
        """Note which rows have finite logits, and return them."""
        # amin and amax propagate NaN and find both infinities; on a CPU `isfinite().all()` takes three times as long
        self.finite &= logits.amin(-1).isfinite() & logits.amax(-1).isfinite()
        if self.count == 0 or logits.device.type == "cpu":  # checking waits for the device, so later `__next__` does it
            self.check_finite(self.count)
            return logits
        return logits.masked_fill(~self.finite[:, None], 0)  # sampling from NaN would crash the device

    def check_finite(self, count: int) -> None:
        """Raise ValueError, with the row and the cause, if logits are not finite, up to those after `count` tokens."""
        if self.finite.all():
            return
        row = int((~self.finite).nonzero()[0])
        raise ValueError(
            f"the logits of row {row // self.run.copies} are not finite at new token {count + 1}: "
            f"{explain(self.model, self.run.inputs, partial(self._prefill, count, row % self.run.copies, None))}"
        )


def _can_capture(cache: KVCache, run: Run) -> bool:
    return cache.data.is_cuda and not run.settings.disable_compile


def _is_hooked(model: Any) -> bool:
    """Whether the model has hooks, which a captured graph would not run: then every step runs as written."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
