"""Conversations to prompts: the checkpoint's own jinja template, run in a sandbox, with what users typed kept as text.

A template turns messages into one string, and in that string a typed "<image>" looks like a real one. So, where ids
are wanted, every character in a user's text with which a special token could begin is followed by a *guard*, a private
character that occurs in no message. The template runs on the guarded texts; the prompt is cut at the special tokens
that are whole, which only the template can have written; then the guards go, and what lies between is encoded as
plain text. Ordinary conversations get exactly the ids of their rendered string.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlm.checkpoint import hub
from minivlm.modules.inputs import Inputs
from minivlm.text.shown import short
from minivlm.text.template_sandbox import render

ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "url", "path", "image_url")
# By name, the prompts of the released checkpoints, for others that were trained like them and have lost their template:
# vicuna, mistral, yi (34B), llama3, qwen (72B, 110B), idefics2.
KNOWN = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


def named(template: str | None) -> str | None:
    """The template of a name that is `KNOWN`; any other as it is."""
    path = KNOWN.get(template) if isinstance(template, str) else None
    return template if path is None else hub.read_text(path)


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


def save(template: str | None, folder: Path) -> None:
    """Write chat_template.jinja, where everybody looks first; another template that lay in the folder goes."""
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(named(template), encoding="utf-8")


def normalise(messages: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages in the one form that templates get, and the images in them (None where only a place is given).

    A message is {"role": …, "content": …}; content is a list of {"type": "text", "text": …} and {"type": "image"}
    items, the latter with the picture under "image", "url" or "path", or as {"type": "image_url", "image_url": {"url":
    …}}. A plain string as content counts as one text item (Idefics2's template would drop it). Only these two keys of
    a message reach the template.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError('a conversation is a list of {"role": …, "content": …}, found ' + short(messages))
    normal, images = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "content" not in message:
            raise ValueError(f'message {number} should be {{"role": …, "content": …}}, found {short(message)}')
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {number}: the role is one of {', '.join(ROLES)}, found {short(role)}")
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list | tuple) or not items:
            raise ValueError(f"message {number}: content is a string or a list of items, found {short(content)}")
        normal.append({"role": role, "content": [_item(item, number, images) for item in items]})
    return normal, images


def _item(item: Any, number: int, images: list[Any]) -> dict[str, str]:
    kind = item.get("type") if isinstance(item, dict) else None
    kind = kind if isinstance(kind, str) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind not in ("image", "image_url"):
        raise ValueError(
            f'message {number}: an item is {{"type": "text", "text": "…"}} or {{"type": "image"}}, found {short(item)}'
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
    template = named(chat_template or processor.chat_template)
    if template is None:
        raise ValueError(
            "this checkpoint has no chat template (it is not tuned for chat); write the prompt yourself, with <image> "
            f"where a picture goes, or pass chat_template=, a template or the name of one: {', '.join(KNOWN)}"
        )
    batched = isinstance(conversation, list | tuple) and any(isinstance(one, list | tuple) for one in conversation)
    normal, pictures = zip(*(normalise(one) for one in (conversation if batched else [conversation])), strict=True)
    tokenizer = processor.tokenizer
    variables = tokenizer.special_tokens_map | {"add_generation_prompt": add_generation_prompt}
    if not tokenize:
        prompts = [render(template, messages=messages, **variables) for messages in normal]
        return prompts if batched else prompts[0]
    guard = _unused_character(normal, template)
    for message in (message for messages in normal for message in messages):
        for item in message["content"]:
            if item["type"] == "text":
                item["text"] = tokenizer.guard(item["text"], guard)
    prompts = [render(template, messages=messages, **variables) for messages in normal]
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
    unused = next((c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used), None)
    if unused is None:
        raise ValueError("the messages use every private character of Unicode, so none is left to mark them with")
    return unused
