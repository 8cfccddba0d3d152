"""A conversation that keeps its KV cache: a turn runs only what is new in it.

    turn 1   <s> User: image, question ─► answer
    turn 2   <s> User: image, question, Assistant: answer, User: question ─► answer
             └──────────── already in the KV cache ─────┘ └─ run now ──┘

Every turn renders the whole conversation with the checkpoint's chat template and compares its ids with those in the
cache. The common beginning stays; the rest is cropped and run again, so answers equal those of a conversation that is
recomputed from its beginning. This file needs no knowledge of how a template joins turns, and `Chat.messages` may be
edited freely. An answer whose text encodes to other tokens than were generated costs these tokens once more.

P ids of the prompt, N images in it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from minivlm.app.answer import Answer, encoded, setting_of
from minivlm.families import family
from minivlm.generation import loop
from minivlm.generation.settings import check, is_whole
from minivlm.generation.speculation import alike
from minivlm.modules.cache import KVCache
from minivlm.modules.config import text_config
from minivlm.processing.common import fetch_image
from minivlm.text.messages import make_message, normalise

NEW_TOKENS = 256  # of an answer, where max_new_tokens is not set


@dataclass
class Prompt:
    """A rendered conversation."""

    ids: list[int]  # P
    images: list[Any]  # N, in order of appearance
    spans: list[tuple[int, int]]  # of each image: the position of its first id, and one after its last
    inputs: dict[str, Any]  # what the processor returned for all of it

    def images_in(self, length: int) -> int:
        """How many images begin within the first `length` ids."""
        return sum(first < length for first, _ in self.spans)


class Chat:
    """Questions and answers about images, with the KV cache kept from turn to turn.

        chat = Chat(model, processor, max_new_tokens=100)
        chat.ask("What is this?", [image])
        chat.ask("And what colour is it?")     # costs the tokens of this question alone

    `settings` are those of `generate`, for all turns. An image goes through the vision tower once, in the turn that
    brings it; the processor handles all images in every turn. A conversation is run again from its beginning with
    IDEFICS, if the part to forget holds an image, and in every turn with models whose rotary frequencies depend on the
    length of the text (dynamic, longrope).

    An answer has at most `max_new_tokens` (256 by default), and fewer where the model's positions end.

    messages: the conversation so far, in the form of `apply_chat_template`. A turn is added when its answer is
    complete, or stopped by `stop`.
    last: the latest answer, with why it ended (`last.finish_reason`), how many tokens and seconds it took; None before.

    Raises ValueError for a checkpoint without a chat template.
    """

    def __init__(self, model: Any, processor: Any, *, system: str | None = None, **settings: Any) -> None:
        if processor.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template (it is not tuned for chat); set processor.chat_template, or "
                "write the prompt yourself and call generate"
            )
        self.model, self.processor, self.system, self.settings = model, processor, system, settings
        self.last: Answer | None = None
        self._family = family(model.config.model_type, "the model")
        self._begun = self._stopped = False  # of the answer that is being read
        self._answer: Iterator[str] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self._end_answer()
        self.messages = [] if self.system is None else [make_message("system", self.system)]
        self._forget()

    def ask(self, text: str, images: Any = (), **settings: Any) -> str:
        """The answer to `text` about `images` (one or a list, as `load_image` takes them) and the conversation so far.

        `settings` of `generate` win over those of the conversation in this turn.

        Raises ValueError if the conversation no longer fits the model's positions, and what `load_image`,
        `apply_chat_template` and `generate` raise; the conversation is then as it was before.
        """
        return "".join(self.stream(text, images, **settings)).strip()

    def stream(self, text: str, images: Any = (), **settings: Any) -> Iterator[str]:
        """`ask`, in pieces as they come.

        Not reading to the end, or beginning another turn, ends the answer: its turn then does not enter `messages`.
        """
        self._end_answer()
        sources = images if isinstance(images, list | tuple) else [] if images is None else [images]
        fetched = [fetch_image(self.processor, source) for source in sources]
        messages = [*self.messages, make_message("user", text, fetched)]
        self._answer = self._turn(messages, {"tokenizer": self.processor.tokenizer, **self.settings, **settings})
        return self._answer

    def stop(self) -> bool:
        """End the answer that is being read after its next token and keep what there is of it.

        Return False if it has not begun: then there is nothing to keep. Signal handlers may call it.
        """
        self._stopped = self._begun
        return self._stopped

    # ---- One turn

    def _turn(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[str]:
        """Errors in the conversation or its length are raised at once, all others while the answer is read."""
        begin = time.perf_counter()
        prompt = self._render(messages)
        settings["max_new_tokens"] = new = self._new_tokens(settings, len(prompt.ids))
        kept = self._kept(prompt)
        given = self._new_images(prompt, kept)
        if given is None:
            kept, given = 0, (0, self._new_images(prompt, 0)[1])
        self._make_room(kept, len(prompt.ids) + new)
        self._ids, self._prompt = list(prompt.ids), replace(prompt, inputs={})  # pixels are large
        return self._read(messages, self._tokens(*given, settings), settings, begin)

    def _render(self, messages: list[dict[str, Any]]) -> Prompt:
        inputs = encoded(self.processor, messages)
        images, ids = normalise(messages)[1], inputs["input_ids"][0].tolist()
        positions = [position for position, id in enumerate(ids) if id == self.processor.image_token_id]
        counts = self._family.image_lengths(self.processor, inputs, len(positions), len(images))
        spans, begin = [], 0
        for count in counts:
            spans.append((positions[begin], positions[begin + count - 1] + 1))
            begin += count
        return Prompt(ids, images, spans, inputs)

    def _new_tokens(self, settings: dict[str, Any], length: int) -> int:
        """The most tokens of the answer: the setting, or fewer where the model's positions end."""
        limit = text_config(self.model.config).max_position_embeddings
        if length >= limit:
            raise ValueError(
                f"the conversation has {length} tokens with this question, but this model has positions for {limit} "
                "with the answer; begin a new one (reset), or ask with fewer or smaller images"
            )
        if settings.get("max_length") is not None:
            raise ValueError("max_length would count the whole conversation; pass max_new_tokens, which counts answers")
        wanted = setting_of(self.model, settings, "max_new_tokens")
        wanted = NEW_TOKENS if wanted is None else wanted
        check("max_new_tokens", wanted, is_whole(wanted, 1), "an integer > 0")
        return min(wanted, limit - length)

    def _read(
        self, messages: list[dict[str, Any]], tokens: Iterator[int], settings: dict[str, Any], begin: float
    ) -> Iterator[str]:
        """Decode the answer; at its end the turn enters the conversation."""
        prompt, cached, first = len(self._ids), self._cache.length, 0.0
        self._begun = self._stopped = False

        def timed() -> Iterator[int]:
            nonlocal first
            for token in tokens:
                first = first or time.perf_counter() - begin
                self._begun = True
                yield token
                if self._stopped:
                    return

        try:
            yield from incremental_text(self._decode, timed())
        except GeneratorExit:  # between two tokens: the cache is whole
            raise
        except BaseException:  # perhaps in the middle of a forward pass
            self._forget()
            raise
        finally:
            self._begun = False
        new, seconds = self._ids[prompt:], time.perf_counter() - begin
        text, reason = self._decode(new).strip(), self._reason
        reason = "interrupted" if self._stopped and reason != "stop" else reason
        self.last = Answer(text, reason, prompt, len(new), settings["max_new_tokens"], seconds, first, cached)
        self.messages = [*messages, make_message("assistant", text)]

    def _decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def _tokens(self, blind: int, images: dict[str, Any], settings: dict[str, Any]) -> Iterator[int]:
        """The answer's ids. The first `blind` ids of the prompt are run before those that go with `images`."""
        ids = torch.tensor([self._ids], device=self.model.device)
        if blind > self._cache.length:
            loop.forward(self.model, ids[:, self._cache.length : blind], self._cache)
        inputs = {"attention_mask": torch.ones_like(ids), "past_key_values": self._cache, **images}
        if (setting_of(self.model, settings, "num_beams") or 1) > 1:
            # the answer is known at the end of the search; this cache keeps the prompt, beams go on in copies of it
            found = loop.generate(self.model, ids, **inputs, **settings | {"return_dict_in_generate": True})
            steps, ended = iter(found.sequences[:, ids.shape[1] :].T), found
        else:
            steps = ended = loop.stream(self.model, ids, **inputs, **settings)
        for token in steps:
            if len(token) != 1:
                raise ValueError(
                    f"a conversation goes on with one answer; pass num_return_sequences=1, not {len(token)}"
                )
            self._ids.append(int(token))
            self._reason = ended.finish_reasons[0]
            yield self._ids[-1]

    def _end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _new_images(self, prompt: Prompt, kept: int) -> tuple[int, dict[str, Any]] | None:
        """`Family.new_images` for the images after the first `kept` ids."""
        return self._family.new_images(prompt.inputs, kept, prompt.images_in(kept), len(prompt.images))

    # ---- The cache. Its `length` says how many of `_ids` it holds: the last token of an answer was never run

    def _forget(self) -> None:
        self._cache: KVCache | None = None
        self._ids: list[int] = []
        self._prompt = Prompt([], [], [], {})

    def _kept(self, prompt: Prompt) -> int:
        """How many ids of the prompt can stay in the cache. At least one is run, and no image is cut."""
        scaling = text_config(self.model.config).rope_scaling
        if self._cache is None or (scaling is not None and scaling.rope_type in ("dynamic", "longrope")):
            return 0
        known = self._ids[: self._cache.length]
        kept = alike(known, prompt.ids[:-1])
        for number, (first, end) in enumerate(prompt.spans):
            if kept < end or prompt.images[number] is not (self._prompt.images[number : number + 1] or [None])[0]:
                kept = min(kept, first)
                break
        crossed = self._prompt.images_in(len(known)) != prompt.images_in(kept)
        return 0 if self._cache.cross and crossed else kept  # `cross` holds what the last token attends to, no more

    def _make_room(self, kept: int, slots: int) -> None:
        """A cache of `kept` ids with `slots` slots. Growing copies as much as a decode step reads."""
        if not kept:
            self._cache = self.model.new_cache(1, slots)
            return
        self._cache.crop(kept)
        if self._cache.slots < slots:
            self._cache = self._cache.expand(1, slots)


# ---- Text as it comes ----


def incremental_text(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """Pieces of text as ids arrive; together they are `decode` of all ids, if that has no U+FFFD.

    All ids are decoded again at each step, because the text of a token depends on its neighbours. U+FFFD at the end is
    held back: it stands for a character whose bytes are not all there yet. Where bytes turn out to form no character,
    SentencePiece replaces the whole run of bytes; text already yielded is not taken back.
    """
    seen, sent = [], ""
    for id in ids:
        seen.append(id)
        text = decode(seen).rstrip("\ufffd")
        if len(text) > len(sent) and text.startswith(sent):
            yield text[len(sent) :]
            sent = text
    rest = decode(seen)[len(sent) :]
    if rest:
        yield rest
