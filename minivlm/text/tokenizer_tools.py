"""Methods that other tools expect of a tokenizer, under transformers' names; minivlm itself does not use them."""

from collections.abc import Mapping, Sequence
from typing import Any

from minivlm.modules.inputs import Inputs
from minivlm.text.tokenizer_file import ROLES

LISTS = ("additional_special_tokens", "extra_special_tokens")  # the second since transformers 5


class TokenizerTools:
    """A mixin of `Tokenizer`: vocabularies as dicts, padding of rows made elsewhere, chat templates for text alone."""

    model_input_names = ("input_ids", "attention_mask")
    is_fast = True  # it is the `tokenizers` library's

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens, which `len(tokenizer)` includes."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Token → id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Added token → id, in the order of ids."""
        return {token.content: i for i, token in sorted(self.backend.get_added_tokens_decoder().items())}

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text as the vocabulary spells them."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=add_special_tokens))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_special_tokens(self, tokens: dict[str, Any]) -> int:
        """{"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]} → the number of new tokens.

        All become special, and roles are assigned. The model needs an embedding row for every new token. Earlier
        special tokens stay special; in transformers a new list of additional ones replaces the old one.
        """
        if unknown := set(tokens) - {*ROLES, *LISTS}:
            raise ValueError(
                f"{min(unknown)!r} is not a role of a special token; there are {', '.join((*ROLES, *LISTS))}"
            )
        roles = {role: str(token) for role, token in tokens.items() if role in ROLES}
        extra = [str(token) for name in LISTS for token in tokens.get(name) or []]
        count = self.add_tokens([*roles.values(), *extra], special=True)
        for role, token in roles.items():
            setattr(self, role, token)
        return count

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> Inputs:
        """Rows of ids, in one dict or a list of dicts, padded to one length, and their attention_mask.

        Other values stay as they are, as in transformers.
        """
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in encoded_inputs[0]}
        values = {name: to_lists(value) for name, value in encoded_inputs.items()}
        if "input_ids" not in values:
            raise ValueError(f"there are no input_ids to pad, only {', '.join(values) or 'nothing'}")
        single = not values["input_ids"] or isinstance(values["input_ids"][0], int)
        rows = [values["input_ids"]] if single else values["input_ids"]
        masks = values.get("attention_mask") or [[1] * len(row) for row in rows]
        masks = [masks] if masks and isinstance(masks[0], int) else masks
        options = {"padding": padding, "max_length": max_length, "truncation": False, "add_special_tokens": False}
        options |= {"pad_to_multiple_of": pad_to_multiple_of, "padding_side": padding_side}
        padded = self.assemble(rows, beside={"given": (masks, 0)}, **options)
        values["input_ids"] = padded["input_ids"]
        if return_attention_mask is not False:
            values["attention_mask"] = padded["given"]
        if single and return_tensors is None:
            values |= {name: values[name][0] for name in ("input_ids", "attention_mask") if name in values}
        return Inputs(values).convert(return_tensors)

    def apply_chat_template(
        self, conversation: Sequence[Any], *, tokenize: bool = True, return_dict: bool = True, **options: Any
    ) -> Any:
        """`chat_template.apply` without images, by the tokenizer's own `chat_template`.

        Adds no special tokens around the prompt; a single conversation gives flat lists, as in transformers.
        """
        from minivlm.text.chat_template import apply  # imported here: it imports the tokenizer

        found = apply(_TextProcessor(self), conversation, tokenize=tokenize, return_dict=True, **options)
        if not tokenize:
            return found
        if not isinstance(conversation[0], list | tuple) and options.get("return_tensors") is None:
            found = Inputs({name: rows[0] for name, rows in found.items()})
        return found if return_dict else found["input_ids"]


class _TextProcessor:
    """The part of a processor that `chat_template.apply` needs."""

    image_token = "<image>"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    def call_options(self) -> tuple[str, ...]:
        return ("padding", "truncation", "max_length", "padding_side", "pad_to_multiple_of", "return_tensors")

    def encode_prompts(
        self, prompts: list[Any], images: list[list[Any]], return_tensors: str | None = None, **options: Any
    ) -> Inputs:
        if any(images):
            raise ValueError("a tokenizer takes no images; call apply_chat_template of the processor")
        bodies, marks = zip(*(prompt.encode(self.tokenizer) for prompt in prompts), strict=True)
        marked = any(prompt.learned is not None for prompt in prompts)
        beside = {"assistant_masks": (list(marks), 0)} if marked else {}
        options["add_special_tokens"] = False
        return self.tokenizer.assemble(list(bodies), beside=beside, **options).convert(return_tensors)


def to_lists(ids: Any) -> Any:
    """Arrays and tensors, also inside lists, as Python numbers in lists."""
    if hasattr(ids, "tolist"):
        return ids.tolist()
    return [to_lists(i) for i in ids] if isinstance(ids, list | tuple) else ids
