"""Runs a chat template on a conversation and records where every text ends up.

A template turns messages into one string, in which a typed "<image>" looks like the template's own, and an assistant's
words like the text around them. So the template runs twice, on the messages as they are and on *marked* ones:

    {"text": " Is <b> a tag? "}   →   {"text": " MIs <Gb> a tag?M "}

M and G stand for private-use characters of Unicode that occur in no text. Each text has its own M around its words (a
template may strip the blanks outside). G, the *guard*, follows every character that could begin a special token, so a
special token that is whole in the result was written by the template. Without marks and guards the second string must
equal the first; then the marks delimit each text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from minivlm.text.shown import short
from minivlm.text.template_sandbox import GENERATION, is_known, render
from minivlm.text.tokenizer import Span, Tokenizer

PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
TextKey = tuple[int, int]  # (message, item)


@dataclass(frozen=True)
class Rendered:
    """A template's output for one conversation. Spans are (begin, end) characters of `guarded`."""

    text: str
    guarded: str | None  # `text` with a guard inside every typed special token; None if these cannot be found
    guard: str
    spans: dict[TextKey, list[Span]] = field(default_factory=dict)  # of each text; none for a blank one
    generation: list[Span] = field(default_factory=list)  # of {% generation %} blocks


def render_conversation(
    template: str,
    messages: list[dict[str, Any]],
    processor: Any,
    variables: dict[str, Any],
    *,
    continue_final_message: bool = False,
    for_ids: bool = True,
    with_spans: bool = False,
) -> Rendered:
    """Run a template on messages in the form of `normalise`.

    `variables` are the caller's; the special tokens' names are added here. With `continue_final_message`, the prompt
    ends with the last text of the last message. Guards are needed `for_ids`, spans `with_spans`; other calls may return
    them too. ValueError for a template that fails, or that leaves out an image, a text or a part of a text.
    """
    tokenizer = processor.tokenizer
    plain = tokenizer.special_tokens_map | variables | {"messages": messages}
    marks_needed = with_spans or continue_final_message or not (is_known(template) and _all_arrives(messages))
    if not for_ids and not marks_needed:
        return Rendered(render(template, [plain])[0], None, "")
    texts = _texts(messages)
    guard, *marks = _unused_characters([template, *texts.values(), *_strings(variables)], 3 + len(texts))
    typed = plain | _guarded(variables, guard, tokenizer)
    if not marks_needed:
        typed["messages"] = _changed(messages, lambda _, words: tokenizer.guard(words, guard))
        (guarded,) = render(template, [typed])
        return Rendered(guarded.replace(guard, ""), guarded, guard)
    begin, end, *marks = marks
    mark_of = dict(zip(texts, marks, strict=True))
    tracked = typed | dict(zip(GENERATION, (begin, end), strict=True))
    tracked["messages"] = _changed(messages, lambda key, words: _marked(words, mark_of[key], guard, tokenizer))
    text, written = render(template, [plain, tracked])
    if re.sub(f"[{begin}{end}{''.join(marks)}]", "", written).replace(guard, "") != text:
        return _untracked(text, messages, guard, continue_final_message, processor.image_token)
    if continue_final_message:
        written = _cut(written, messages, mark_of, guard, tokenizer)
    guarded, positions = _without_marks(written, [begin, end, *marks])
    spans = {key: _spans(key, words, guarded, positions[mark_of[key]]) for key, words in texts.items()}
    _check_images(guarded.count(processor.image_token), messages, processor.image_token)
    generation = list(zip(positions[begin], positions[end], strict=False))
    return Rendered(guarded.replace(guard, ""), guarded, guard, spans, generation)


def _texts(messages: list[dict[str, Any]]) -> dict[TextKey, str]:
    """Every text of the messages."""
    return {
        (number, index): item["text"]
        for number, message in enumerate(messages)
        for index, item in enumerate(message["content"])
        if item["type"] == "text"
    }


def _all_arrives(messages: list[dict[str, Any]]) -> bool:
    """Whether every known template writes all texts: of user messages it does, of others only the first item."""
    return all(message["role"] == "user" or len(message["content"]) == 1 for message in messages)


def learned_spans(rendered: Rendered, messages: list[dict[str, Any]], processor: Any) -> list[Span]:
    """The spans of a prompt that a model learns to write: the assistant's words and the token that ends them.

    They are the template's {% generation %} blocks, if it has any. Otherwise each text of an assistant's message, with
    the special token directly after it (`<end_of_utterance>`, `</s>`, `<|im_end|>`), or with blanks and the eos token.
    Templates without such a token (LLaVA's for vicuna) teach no end.
    """
    if rendered.generation:
        return rendered.generation
    tokenizer = processor.tokenizer
    ends = {token.content for token in tokenizer.control_tokens} - {processor.image_token, tokenizer.bos_token}
    patterns = [re.escape(token) for token in sorted(ends, key=len, reverse=True)]  # as in `tokenizers`
    if tokenizer.eos_token:
        patterns.append(r"\s+" + re.escape(tokenizer.eos_token))
    end_mark = re.compile("|".join(patterns) or "(?!)")
    learned = []
    for (number, _), spans in rendered.spans.items():
        for begin, end in spans if messages[number]["role"] == "assistant" else []:
            mark = end_mark.match(rendered.guarded, end)
            learned.append((begin, mark.end() if mark else end))
    return learned


# ---- Marks and guards


def _unused_characters(texts: list[str], count: int) -> list[str]:
    """Private-use characters that occur in none of the texts."""
    used = {character for text in texts if not text.isascii() for character in PRIVATE.findall(text)}
    free = (character for character in map(chr, range(0xF0000, 0x10FFFE)) if character not in used)
    found = list(islice(free, count))
    if len(found) < count:
        raise ValueError("the messages use every private character of Unicode, so none is free to mark them with")
    return found


def _changed(messages: list[dict[str, Any]], change: Callable[[TextKey, str], str]) -> list[dict[str, Any]]:
    """A copy of the messages with changed texts."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": change((number, index), item["text"])} if item["type"] == "text" else item
                for index, item in enumerate(message["content"])
            ],
        }
        for number, message in enumerate(messages)
    ]


def _marked(text: str, mark: str, guard: str, tokenizer: Tokenizer) -> str:
    lead, words, tail = (tokenizer.guard(part, guard) for part in _parts(text))
    return lead + mark + words + mark + tail if words else tail


def _without_marks(written: str, marks: list[str]) -> tuple[str, dict[str, list[int]]]:
    """A marked prompt without its marks, and where each mark stood in it."""
    pieces = re.split(f"([{''.join(marks)}])", written)  # text, mark, text, …, mark, text
    positions: dict[str, list[int]] = {mark: [] for mark in marks}
    position = 0
    for piece, mark in zip(pieces[:-1:2], pieces[1::2], strict=True):
        position += len(piece)
        positions[mark].append(position)
    return "".join(pieces[::2]), positions


def _spans(key: TextKey, words: str, guarded: str, positions: list[int]) -> list[Span]:
    """The spans of a text from the positions of its marks, in pairs. ValueError if the template has left it out."""
    if words.strip() and (not positions or len(positions) % 2):
        raise _left_out(key, words)
    pairs = zip(positions[::2], positions[1::2], strict=True)
    return [_with_blanks(words, guarded, *pair) for pair in pairs]


def _parts(text: str) -> tuple[str, str, str]:
    """The blanks before a text's words, the words, the blanks after them."""
    words = text.strip()
    begin = text.index(words)
    return text[:begin], words, text[begin + len(words) :]


def _with_blanks(text: str, written: str, begin: int, end: int) -> Span:
    """The span of a text's words with the blanks around them, if the template has kept these."""
    lead, _, tail = _parts(text)
    begins = begin - len(lead) if written[:begin].endswith(lead) else begin
    return begins, end + len(tail) if written.startswith(tail, end) else end


def _strings(value: Any) -> list[str]:
    """All strings in a variable, keys included."""
    if isinstance(value, dict):
        return [*value, *_strings(list(value.values()))]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _guarded(value: Any, guard: str, tokenizer: Tokenizer) -> Any:
    """A variable with guards in all its strings: tools and documents contain typed text too."""
    if isinstance(value, dict):
        return {key: _guarded(item, guard, tokenizer) for key, item in value.items()}
    if isinstance(value, list):
        return [_guarded(item, guard, tokenizer) for item in value]
    return tokenizer.guard(value, guard) if isinstance(value, str) else value


def _cut(
    written: str, messages: list[dict[str, Any]], mark_of: dict[TextKey, str], guard: str, tokenizer: Tokenizer
) -> str:
    """Cut a marked prompt after the last text of the last message."""
    key = max(mark_of, default=(-1, 0))
    last = messages[-1]["content"][key[1]] if key[0] == len(messages) - 1 else {"text": ""}
    if not last["text"].strip():
        raise ValueError(
            "continue_final_message: the last message has no words to continue; for a new answer, "
            "leave it out and set add_generation_prompt=True"
        )
    if (at := written.rfind(mark_of[key])) < 0:
        raise _left_out(key, last["text"])
    tail = tokenizer.guard(_parts(last["text"])[2], guard)
    return written[: at + 1] + (tail if written.startswith(tail, at + 1) else "")


# ---- Templates that drop or change texts


def _left_out(key: TextKey, text: str) -> ValueError:
    return ValueError(
        f"the chat template leaves out message {key[0]}, item {key[1]} ({short(text)}), or a part of it; put the "
        "texts of a message into one item, or pass another chat_template="
    )


def _check_images(found: int, messages: list[dict[str, Any]], image_token: str) -> None:
    """ValueError unless the template has written an image token for every image item."""
    expected = sum(item["type"] == "image" for message in messages for item in message["content"])
    if found != expected:
        raise ValueError(
            f"the chat template writes {image_token} {found} times for {expected} image items; pass another "
            "chat_template=, or leave out the images that it does not write"
        )


def _untracked(
    text: str, messages: list[dict[str, Any]], guard: str, continue_final_message: bool, image_token: str
) -> Rendered:
    """The prompt of a template whose output changes with the marks, because it tests how a text begins or ends."""
    texts = _texts(messages)
    for key, words in texts.items():
        if words.strip() not in text:
            raise _left_out(key, words)
    typed = sum(words.count(image_token) for words in texts.values())
    _check_images(text.count(image_token) - typed, messages, image_token)
    if continue_final_message:
        raise ValueError("continue_final_message: this chat template changes its texts, so their end cannot be found")
    return Rendered(text, None, guard)
