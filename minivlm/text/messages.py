"""Conversations in the one message format that chat templates receive here."""

from collections.abc import Sequence
from typing import Any

from minivlm.text.shown import short

ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")


def make_message(role: str, text: str, images: Sequence[Any] = ()) -> dict[str, Any]:
    """One message: its images, then its text."""
    items = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*items, {"type": "text", "text": text}]}


def normalise(messages: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages in the format that templates receive, and their images (None for an image item without one).

    A message is {"role": …, "content": …}; content is a list of {"type": "text", "text": …} and {"type": "image"}
    items, the latter with the image under "image", "url", "path" or "base64", or as {"type": "image_url", "image_url":
    {"url": …}}. A string as content becomes one text item (Idefics2's template would drop it). Templates see only
    these two keys of a message.
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
    image = next((item[key] for key in IMAGE_KEYS if item.get(key) is not None), None)
    images.append(image["url"] if isinstance(image, dict) and "url" in image else image)
    return {"type": "image"}
