"""Conversations to prompts: the checkpoint's own jinja template, run in a sandbox, with what users typed kept as text.

A template turns messages into one string, and in that string a typed "<image>" looks like a real one. So, where ids
are wanted, every character in a user's text with which a special token could begin is followed by a *guard*, a private
character that occurs in no message. The template runs on the guarded texts; the prompt is cut at the special tokens
that are whole, which only the template can have written; then the guards go, and what lies between is encoded as
plain text. Ordinary conversations get exactly the ids of their rendered string.
"""

import json
import math
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivlm import hub
from minivlm.processing.inputs import Inputs

ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "url", "path", "image_url")
TIME_LIMIT = 5.0  # seconds for one prompt; real templates take well under a millisecond
MAX_PROMPT = 2**24  # characters; also the longest text that a template may build with * or %


def find_template(source: hub.Source, processor_config: dict[str, Any], tokenizer_config: dict[str, Any]) -> str | None:
    """The template where any generation of transformers has put it; None if there is none."""
    path = source.file("chat_template.jinja", required=False)
    if path is not None:
        return hub.read_text(path)
    for config in (source.json("chat_template.json", required=False) or {}, processor_config, tokenizer_config):
        template = config.get("chat_template")
        if isinstance(template, list):  # several named ones
            named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
            template = next(named, {}).get("template")
        if isinstance(template, dict):
            template = template.get("default")
        if template is not None and not isinstance(template, str):
            raise hub.CheckpointError(f"{source.name}: chat_template should be text, found {type(template).__name__}")
        if template is not None:
            return template
    return None


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The prompt of normalised messages. ValueError if the template is broken, refuses them, or writes without end."""
    pieces, length = [], 0
    try:
        compiled = _compile(template)
        compiled.environment.deadline = time.monotonic() + TIME_LIMIT
        for piece in compiled.generate(messages=messages, **variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_PROMPT:
                raise ValueError(f"it writes more than {MAX_PROMPT:,} characters")
    except Exception as error:  # a template can fail like any program
        raise ValueError(f"the chat template fails on these messages: {error}") from error
    return "".join(pieces)


def normalise(messages: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages in the one form that templates get, and the images in them (None where only a place is given).

    A message is {"role": …, "content": …}; content is a list of {"type": "text", "text": …} and {"type": "image"}
    items, the latter with the picture under "image", "url" or "path", or as {"type": "image_url", "image_url": {"url":
    …}}. A plain string as content counts as one text item (Idefics2's template would drop it). Only these two keys of
    a message reach the template.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError('a conversation is a list of {"role": …, "content": …}, found ' + repr(messages)[:80])
    normal, images = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "content" not in message:
            raise ValueError(f'message {number} should be {{"role": …, "content": …}}, found {message!r:.80}')
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number}: the role is one of {', '.join(ROLES)}, found {message.get('role')!r}")
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list | tuple) or not items:
            raise ValueError(f"message {number}: content is a string or a list of items, found {content!r:.80}")
        normal.append({"role": message["role"], "content": [_item(item, number, images) for item in items]})
    return normal, images


def _item(item: Any, number: int, images: list[Any]) -> dict[str, str]:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f'message {number}: an item is {{"type": "text", "text": "…"}} or {{"type": "image"}}, found {item!r:.80}'
        )
    picture = next((item[key] for key in IMAGE_KEYS if item.get(key) is not None), None)
    images.append(picture["url"] if isinstance(picture, dict) and "url" in picture else picture)
    return {"type": "image"}


def apply(
    processor: Any,
    conversation: Sequence[Any],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    tokenize: bool = False,
    return_dict: bool = False,
    images: Any = None,
    **options: Any,
) -> str | list[str] | list[list[int]] | Inputs:
    """`apply_chat_template` of every processor here; `options` are those of its call (padding, return_tensors, …).

    One conversation or a list of them. Without `tokenize`, the prompt string(s), in which typed special tokens are not
    told apart. With it, the ids, or with `return_dict` all inputs of the model, pictures in the messages included;
    pictures may instead be passed as `images` when the messages only say where they go.
    """
    template = chat_template or processor.chat_template
    if template is None:
        raise ValueError(
            "this checkpoint has no chat template (it is not tuned for chat); write the prompt yourself, with <image> "
            "where a picture goes, or pass chat_template="
        )
    batched = isinstance(conversation, list | tuple) and any(isinstance(one, list | tuple) for one in conversation)
    normal, pictures = zip(*(normalise(one) for one in (conversation if batched else [conversation])), strict=True)
    tokenizer = processor.tokenizer
    variables = tokenizer.special_tokens_map | {"add_generation_prompt": add_generation_prompt}
    if not tokenize:
        prompts = [render(template, messages, **variables) for messages in normal]
        return prompts if batched else prompts[0]
    guard = _unused_character(normal, template)
    for message in (message for messages in normal for message in messages):
        for item in message["content"]:
            if item["type"] == "text":
                item["text"] = tokenizer.guard(item["text"], guard)
    prompts = [render(template, messages, **variables) for messages in normal]
    given = [picture for row in pictures for picture in row if picture is not None]
    places = sum(len(row) for row in pictures)
    if images is None and len(given) == places:
        images = list(pictures)
    elif given or images is None:
        raise ValueError(
            f"the messages have {places} image items, {len(given)} of them with a picture"
            f"{', and images= is given too' if images is not None else ''}; put every picture into its item "
            '({"type": "image", "image": …}) or pass all of them as images='
        )
    # a template that writes the bos token itself must not get a second one
    add_bos = not (tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token))
    inputs = processor.encode_prompts(prompts, images, guard=guard, add_special_tokens=add_bos, **options)
    return inputs if return_dict else inputs["input_ids"]


def _unused_character(conversations: Sequence[list[dict[str, Any]]], template: str) -> str:
    """A private-use character that occurs neither in the messages nor in the template."""
    used = set(template)
    for messages in conversations:
        for message in messages:
            for item in message["content"]:
                used.update(item.get("text", ""))
    # planes 15 and 16 hold 131,068 private characters
    return next(c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks an assistant's words for training; it prints what is inside."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Templates are other people's code. They reach no Python internals, change nothing, stop after TIME_LIMIT, and
    build no huge texts with `*`, `**` or `%`. (By doubling a text again and again they can still fill the memory.)"""

    intercepted_binops = frozenset({"*", "**", "%"})
    deadline = math.inf

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Each turn of a loop and each call of a macro first looks at the clock."""
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            look = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(look).set_lineno(node.lineno))
        return tree

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateError(f"it takes longer than {TIME_LIMIT:.0f} seconds")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(v) if isinstance(v, str | list | tuple) else abs(v) for v in (left, right)]
        text = not isinstance(left, int | float)
        if sizes[0] * sizes[1] > MAX_PROMPT or (operator == "**" and sizes[1] > 64) or (operator == "%" and text):
            raise jinja2.exceptions.SecurityError(f"a template may not compute {left!r:.20} {operator} {right!r:.20}")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template is not valid jinja: {error}") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
