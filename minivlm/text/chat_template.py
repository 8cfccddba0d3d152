"""Finds chat templates, and turns conversations into prompts and inputs: `apply_chat_template`."""

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from minivlm.checkpoint import hub
from minivlm.checkpoint.files import saving
from minivlm.modules.inputs import Inputs
from minivlm.text.messages import normalise
from minivlm.text.rendering import Rendered, learned_spans, render_conversation
from minivlm.text.shown import short, suggestion
from minivlm.text.template_sandbox import mentioned
from minivlm.text.tokenizer import Prompt

# Templates of the released checkpoints by name, for checkpoints trained like them whose template is missing: vicuna,
# mistral, yi (34B), llama3, qwen (72B, 110B), idefics2.
KNOWN = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


def named(template: str | None) -> str | None:
    """The `KNOWN` template of that name, or a template unchanged. ValueError for anything else."""
    if isinstance(template, str) and template in KNOWN:
        return hub.read_text(KNOWN[template])
    if template is not None and not (isinstance(template, str) and re.search(r"\{[{%]", template)):
        raise ValueError(
            f"chat_template is a jinja template, with {{{{ … }}}} in it, or one of the names {', '.join(KNOWN)}; "
            f"found {short(template)}{suggestion(str(template), KNOWN)}"
        )
    return template


def find_template(source: hub.Source, processor_config: dict[str, Any], tokenizer_config: dict[str, Any]) -> str | None:
    """A checkpoint's template, from wherever any version of transformers has put it; None without one."""
    path = source.file("chat_template.jinja", required=False)
    if path is not None:
        return hub.read_text(path)
    for config in (source.json("chat_template.json", required=False) or {}, processor_config, tokenizer_config):
        template = config.get("chat_template")
        if isinstance(template, list):  # several templates, by name
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
    """Write chat_template.jinja, which every reader tries first; remove other templates from the folder."""
    with saving() as save:
        if template is not None:
            save.text(folder / "chat_template.jinja", named(template))
        save.remove(folder / "chat_template.jinja")  # unless it was just written
        save.remove(folder / "chat_template.json")


@overload
def apply(
    processor: Any, conversation: Sequence[Any], *, tokenize: Literal[True], return_dict: Literal[True], **options: Any
) -> Inputs: ...


@overload
def apply(processor: Any, conversation: Sequence[Any], **options: Any) -> str | list[str] | list[list[int]]: ...


def apply(
    processor: Any,
    conversation: Sequence[Any],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tokenize: bool = False,
    return_dict: bool = False,
    return_assistant_tokens_mask: bool = False,
    images: Any = None,
    **options: Any,
) -> str | list[str] | list[list[int]] | Inputs:
    """`apply_chat_template` of every processor here. One conversation or a list of them → prompts, ids or inputs.

    Without `tokenize`: the prompt string(s), where typed special tokens look like the template's own. With it: the ids,
    or with `return_dict` all of the model's inputs. Images are taken from the messages, or from `images` if the
    messages only mark their positions.

    continue_final_message: the prompt ends with the last message's text, without an end mark: the model continues it.
    return_assistant_tokens_mask: add assistant_masks (B, T) to the inputs, 1 for tokens that a model learns to write;
    see `learned_spans`.
    options: those of the processor's call (padding, return_tensors, …), which need `tokenize`, and the template's own
    variables (tools, documents, …): text, numbers, lists and dicts. TypeError for unknown names.
    """
    template = _wanted(chat_template or processor.chat_template)
    if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
        raise ValueError(
            "continue_final_message goes on with the last message, so add_generation_prompt, which begins another one, "
            "and return_assistant_tokens_mask, for finished messages, do not go with it"
        )
    batched = isinstance(conversation, list | tuple) and any(isinstance(one, list | tuple) for one in conversation)
    normal, given = zip(*(normalise(one) for one in (conversation if batched else [conversation])), strict=True)
    call_options, variables = _sorted_options(processor, template, options)
    variables["add_generation_prompt"] = add_generation_prompt
    modes = {"continue_final_message": continue_final_message, "for_ids": tokenize}
    modes["with_spans"] = return_assistant_tokens_mask
    rendered = [render_conversation(template, messages, processor, variables, **modes) for messages in normal]
    if not tokenize:
        texts = [each.text for each in rendered]
        return texts if batched else texts[0]
    pairs = zip(rendered, normal, strict=True)
    prompts = [_prompt(*pair, processor, return_assistant_tokens_mask) for pair in pairs]
    # a template that writes the bos token itself must not get a second one
    bos = processor.tokenizer.bos_token
    call_options.setdefault("add_special_tokens", not (bos and prompts[0].text.startswith(bos)))
    inputs = processor.encode_prompts(prompts, _images(given, images), **call_options)
    return inputs if return_dict else inputs["input_ids"]


def _wanted(template: str | None) -> str:
    """The template of that name, or itself. ValueError without one."""
    if template is None:
        raise ValueError(
            "this checkpoint has no chat template (it is not tuned for chat); write the prompt yourself, with <image> "
            f"for each image, or pass chat_template=, a template or the name of one: {', '.join(KNOWN)}"
        )
    return named(template)


def _prompt(rendered: Rendered, messages: list[dict[str, Any]], processor: Any, with_learned: bool) -> Prompt:
    """A rendered conversation as the tokenizer takes it."""
    if rendered.guarded is None:
        raise ValueError(
            "this chat template depends on the words of a text, so typed special tokens cannot be told from its own; "
            "leave out tokenize=True and pass the resulting string to processor(text=…)"
        )
    learned = learned_spans(rendered, messages, processor) if with_learned else None
    return Prompt(rendered.guarded, rendered.guard, learned)


def _sorted_options(processor: Any, template: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those of the processor's call and the template's variables. TypeError for unknown ones."""
    if not options:
        return {}, {"tools": None, "documents": None}
    known = processor.call_options()
    call_options = {name: value for name, value in options.items() if name in known}
    variables = {name: value for name, value in options.items() if name not in known}
    names = mentioned(template) - {"messages"}
    for name, value in variables.items():
        if name not in names and not (name in ("tools", "documents") and value is None):
            near = suggestion(name, [*inspect.signature(apply).parameters, *known, *names])
            raise TypeError(
                f"apply_chat_template got an unknown option {name!r}: not an option of this processor, and the chat "
                f"template mentions no variable of that name{near}"
            )
    try:
        plain = json.loads(json.dumps(variables))
    except (TypeError, ValueError) as error:
        raise TypeError(f"variables of a chat template are text, numbers, lists and dicts: {error}") from error
    return call_options, {"tools": None, "documents": None} | plain


def _images(given: Sequence[list[Any]], images: Any) -> Any:
    """The images in the messages, or `images`. ValueError unless all images come from one of the two."""
    found = [image for row in given for image in row if image is not None]
    items = sum(len(row) for row in given)
    if images is None and len(found) == items:
        return list(given)
    if found or images is None:
        raise ValueError(
            f"the messages have {items} image items, {len(found)} of them with an image"
            f"{', and images= is given too' if images is not None else ''}; put every image into its item "
            '({"type": "image", "image": …}) or pass all of them as images='
        )
    return images
