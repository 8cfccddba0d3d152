"""The usual names of a tokenizer, equal to transformers' on the same tokenizer.json."""

import copy

import numpy as np
import pytest
import tiny_idefics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import STRINGS, TEXTS, ours, same, theirs  # noqa: F401

from minivlm import AutoProcessor
from minivlm.processing.idefics2 import Idefics2Processor
from minivlm.text.tokenizer import Tokenizer


def test_vocabularies(ours, theirs):  # noqa: F811
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.vocab_size == theirs.vocab_size == 32000
    assert set(theirs.all_special_ids) <= set(ours.all_special_ids)
    assert ours.all_special_ids == [0, 1, 2, 32000, 32001, 32002]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_special_tokens": False},
        {"padding": True, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 12, "truncation": True, "padding_side": "right"},
        {"max_length": 4},
        {"padding": True, "pad_to_multiple_of": 8, "return_tensors": "np"},
        {"padding": "max_length", "max_length": 29, "pad_to_multiple_of": 8},
    ],
    ids=str,
)
def test_offsets(ours, theirs, options):  # noqa: F811
    options = {**options, "return_offsets_mapping": True}
    mine, expected = ours(TEXTS, **options), theirs(TEXTS, **options)
    assert same(
        mine, {name: np.asarray(value) if "return_tensors" in options else value for name, value in expected.items()}
    )
    mine, expected = ours(TEXTS[0], **options), theirs(TEXTS[0], **options)
    assert mine.keys() == expected.keys()


@given(STRINGS)
@settings(max_examples=60, deadline=None)
def test_offsets_of_any_text(ours, theirs, text):  # noqa: F811
    try:
        expected = theirs(text, return_offsets_mapping=True)
    except (UnicodeEncodeError, TypeError):  # lone surrogates
        return
    assert ours(text, return_offsets_mapping=True).offset_mapping == expected["offset_mapping"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"padding": "max_length", "max_length": 9}, {"pad_to_multiple_of": 8}], ids=str
)
@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_pad(ours, theirs, side, options, kind):  # noqa: F811
    rows = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}, {"input_ids": [4], "attention_mask": [1]}]
    options = {**options, "padding_side": side, "return_tensors": kind}
    expected = theirs.pad(copy.deepcopy(rows), **options)
    assert same(ours.pad(rows, **options), expected)
    assert rows[1] == {"input_ids": [4], "attention_mask": [1]}
    together = {name: [row[name] for row in rows] for name in rows[0]}
    assert same(ours.pad(together, **options), expected)
    arrays = [{name: np.array(values) for name, values in row.items()} for row in rows]
    assert same(ours.pad(arrays, **options), expected)
    tensors = [{name: torch.tensor(values) for name, values in row.items()} for row in rows]
    assert same(ours.pad(tensors, **options), expected)
    without = [{"input_ids": row["input_ids"]} for row in rows]
    assert same(ours.pad(without, **options), theirs.pad(copy.deepcopy(without), **options))
    if kind is None:
        assert same(ours.pad(rows[0], **options), theirs.pad(copy.deepcopy(rows[0]), **options))


def test_pad_needs_ids(ours):  # noqa: F811
    for rows in ([{"labels": [1]}], {"labels": [[1]]}, {}):
        with pytest.raises(ValueError, match="no input_ids"):
            ours.pad(rows)


def test_add_special_tokens(ours, theirs):  # noqa: F811
    ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    new = {"pad_token": "<pad>", "additional_special_tokens": ["<box>", "</box>"]}
    assert ours.add_special_tokens(new) == theirs.add_special_tokens(new) == 3
    assert len(ours) == len(theirs)
    assert ours.pad_token == theirs.pad_token == "<pad>"
    text = "<box>a</box><pad>b"
    assert ours(text).input_ids == theirs(text)["input_ids"]
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == "a b"
    assert ours.add_special_tokens(new) == 0
    guarded = ours.guard("<box>", "\U000f0000")
    assert ours.get_vocab()["<box>"] not in ours.encode_guarded(guarded, "\U000f0000")
    with pytest.raises(ValueError, match="not a role"):
        ours.add_special_tokens({"padtoken": "<pad>"})


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer that is soon copied."""
    return Tokenizer.from_pretrained(tiny_idefics.write_small(tmp_path_factory.mktemp("letters") / "small"))


@given(st.lists(st.sampled_from(["pad_token", "eos_token"]), min_size=1, max_size=3))
@settings(max_examples=5, deadline=None)
def test_a_role_that_changes_is_noticed(letters, roles):
    """What nobody may type includes tokens that play a part only since a moment ago."""
    tokenizer = copy.deepcopy(letters)
    tokenizer.add_tokens(["[NEW]"])
    guard = "\U000f0000"
    guarded = tokenizer.guard("[NEW]", guard)
    assert tokenizer.encode_guarded(guarded, guard) == tokenizer.encode("[NEW]", add_special_tokens=False)
    for role in roles:
        setattr(tokenizer, role, "[NEW]")
    guarded = tokenizer.guard("[NEW]", guard)
    assert tokenizer.convert_tokens_to_ids("[NEW]") not in tokenizer.encode_guarded(guarded, guard)


# ---- chat templates, without a processor


def test_chat_template(checkpoint, reference, theirs):  # noqa: F811
    processor = Idefics2Processor.from_pretrained(checkpoint("idefics2-8b"))
    tokenizer = processor.tokenizer
    assert tokenizer.chat_template == processor.chat_template
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    string = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert string == processor.apply_chat_template(messages, add_generation_prompt=True)
    assert string == reference.apply_chat_template(messages, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(string, add_special_tokens=False)
    theirs = copy.deepcopy(theirs)
    theirs.chat_template = tokenizer.chat_template
    batch = [messages, messages * 2]
    for conversation in (messages, batch):
        for options in ({}, {"return_dict": False}, {"add_generation_prompt": True}, {"tokenize": False}):
            mine = tokenizer.apply_chat_template(conversation, **options)
            expected = theirs.apply_chat_template(conversation, **options)
            assert mine == (dict(expected) if hasattr(expected, "keys") else expected)
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    tensors = tokenizer.apply_chat_template(batch, **options)
    theirs.padding_side = options.pop("padding_side")
    assert torch.equal(tensors.input_ids, theirs.apply_chat_template(batch, **options)["input_ids"])
    asked = [*messages, {"role": "assistant", "content": "Yes."}]
    found = tokenizer.apply_chat_template(asked, return_assistant_tokens_mask=True)
    learned = [i for i, mark in zip(found.input_ids, found.assistant_masks, strict=True) if mark]
    assert tokenizer.decode(learned) == "Yes.<end_of_utterance>"
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>"}]}]
    assert tokenizer.apply_chat_template(image, tokenize=False).count("<image>") == 2
    image[0]["content"][0]["image"] = "a.png"
    with pytest.raises(ValueError, match="takes no images"):
        tokenizer.apply_chat_template(image)
    with pytest.raises(TypeError, match="paddin"):
        tokenizer.apply_chat_template(messages, paddin=True)


def test_chat_template_may_be_set(checkpoint):
    tokenizer = Idefics2Processor.from_pretrained(checkpoint("idefics2-8b-base")).tokenizer
    assert tokenizer.chat_template is None
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(messages)
    tokenizer.chat_template = "{{ messages[0].content[0].text }}"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Hi"
    for name in ("shapes-idefics2", "shapes-llava-next", "shapes-idefics"):
        assert "Assistant:" in AutoProcessor.from_pretrained(name).tokenizer.chat_template
