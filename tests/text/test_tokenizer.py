"""The tokenizer against transformers' own reading of the same tokenizer.json, and what it refuses."""

import copy
import json
import pickle

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.text.tokenizer import Tokenizer

TEXTS = [
    "Hello world",
    " Hello",
    "",
    " ",
    "a\n\nb  c\t",
    "<s>Hello</s> there",
    "x<image>What<image> is\n<end_of_utterance>\nAssistant:",
    "مرحبا 🙂 日本語 é \u0000 \ufffd",
    "<unk><unk>",
]
# text that often holds a special token or a part of one
PIECES = st.sampled_from(
    ["<image>", "<s>", "</s>", "<", ">", "image", " ", "\n", "User:", "é", "🙂", "▁", "a", "</", "\U000f0000"]
)
STRINGS = st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=8).map("".join))


@pytest.fixture(scope="module")
def ours(checkpoint):
    return Tokenizer.from_pretrained(checkpoint("idefics2-8b"))


@pytest.fixture(scope="module")
def theirs(checkpoint):
    """transformers on tokenizer.json as it is, without the rebuilding that its Llama class does."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint("idefics2-8b") / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def same(ours, theirs) -> bool:
    def plain(values):
        return {name: v.tolist() if hasattr(v, "tolist") else v for name, v in values.items()}

    return plain(ours) == plain(theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_special_tokens": False},
        {"padding": True, "return_tensors": "pt"},
        {"padding": "longest", "return_tensors": "np"},
        {"padding": "max_length", "max_length": 30},
        {"padding": "max_length", "max_length": 8, "truncation": True},
        {"padding": "max_length"},
        {"truncation": True},
        {"truncation": True, "max_length": 4},
        {"truncation": "longest_first", "max_length": 4, "padding": True},
        {"truncation": "only_first", "max_length": 3, "add_special_tokens": False},
        {"max_length": 4},
        {"truncation": False, "max_length": 4},
        {"padding": False, "truncation": "do_not_truncate"},
    ],
    ids=str,
)
def test_calls_equal_transformers(ours, theirs, options, side):
    ours, theirs = copy.copy(ours), copy.copy(theirs)
    ours.padding_side = theirs.padding_side = side
    assert same(ours(TEXTS, **options), theirs(TEXTS, **options))
    assert same(ours(TEXTS[0], **options), theirs(TEXTS[0], **options))
    ours.truncation_side = theirs.truncation_side = "left"
    assert same(ours(TEXTS, **options), theirs(TEXTS, **options))


@given(STRINGS)
@settings(max_examples=200, deadline=None)
def test_encode_and_decode_equal_transformers(ours, theirs, text):
    try:
        expected = theirs.encode(text)
    except (UnicodeEncodeError, TypeError):  # lone surrogates
        with pytest.raises(ValueError, match="encoded"):
            ours.encode(text)
        return
    ids = ours.encode(text)
    assert ids == expected
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 32010), max_size=12))
@settings(max_examples=200, deadline=None)
def test_decode_of_any_ids(ours, theirs, ids):
    for skip in (False, True):
        expected = theirs.decode(ids, skip_special_tokens=skip)
        for form in (ids, tuple(ids), torch.tensor(ids, dtype=torch.int64), np.array(ids, np.int32)):
            assert ours.decode(form, skip_special_tokens=skip, clean_up_tokenization_spaces=True) == expected
        assert ours.batch_decode([ids, ids], skip) == [expected, expected]
        assert ours.batch_decode(torch.tensor([ids, ids], dtype=torch.int64), skip) == [expected, expected]
        assert ours.decode([ids, torch.tensor(ids, dtype=torch.int64)], skip) == [expected, expected]


def test_decode_equals_the_rebuilt_reference_too(ours, reference):
    ids = ours(TEXTS).input_ids
    for skip in (False, True):
        assert ours.batch_decode(ids, skip) == reference.batch_decode(ids, skip_special_tokens=skip)
    assert ours.decode(22557) == reference.decode(22557)
    assert ours.batch_decode([1, 22557]) == reference.batch_decode([1, 22557]) == ["<s> Hello"]
    assert ours.batch_decode([]) == ours.batch_decode(torch.zeros(0, 5, dtype=torch.int64)) == []


def test_names_and_ids(ours, theirs):
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "padding_side"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (1, 2, 0, 0)
    assert len(ours) == len(theirs) == 32003
    assert ours.convert_tokens_to_ids("<image>") == 32001
    assert ours.convert_tokens_to_ids(["<image>", "no such token"]) == [32001, 0]
    assert ours.convert_ids_to_tokens([1, 32002]) == ["<s>", "<end_of_utterance>"]
    assert ours.convert_ids_to_tokens(32002) == "<end_of_utterance>"
    assert ours.additional_special_tokens[1] == "<image>"
    assert ours.additional_special_tokens_ids == [32000, 32001, 32002]


def test_added_tokens_and_another_pad_token(ours):
    tokenizer = copy.deepcopy(ours)
    assert tokenizer.add_tokens(["<image>", "<pad>", "<pad>"], special=True) == 1
    tokenizer.pad_token = "<pad>"
    assert tokenizer.pad_token_id == 32003 == len(tokenizer) - 1
    assert tokenizer(["a", "a b c"], padding=True).input_ids[0][0] == 32003
    assert tokenizer.encode("<pad>") == [1, 32003]
    tokenizer.pad_token = "<nowhere>"
    with pytest.raises(ValueError, match="not in the vocabulary"):
        tokenizer(["a", "b"], padding=True)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        tokenizer(["a", "b"], padding=True)
    assert len(ours) == 32003


def test_refusals(ours):
    for text in (None, 3, [], [3], ["a", None], {"a": "b"}, [["a"]]):
        with pytest.raises(ValueError, match="text is a string or a list"):
            ours(text)
    for options, message in (
        ({"padding": "left"}, "padding is"),
        ({"truncation": "middle"}, "truncation is"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": -1, "truncation": True}, "max_length"),
        ({"max_length": 10**12, "padding": "max_length"}, "max_length"),
        ({"max_length": 2.5}, "max_length"),
        ({"return_tensors": "tf"}, "return_tensors"),
        ({"return_tensors": "pt"}, "padding=True"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(["a", "a b c d"], **options)
    with pytest.raises(TypeError):
        ours("a", paddding=True)
    with pytest.raises(TypeError, match="text is a string"):
        ours.encode(3)
    for ids in ("abc", None, [1.5], ["a"], torch.tensor([0.5])):
        with pytest.raises(TypeError, match="whole numbers"):
            ours.decode(ids)
    for ids in ([-100, 5], [2**40], -1):
        with pytest.raises(ValueError, match="ids lie in"):
            ours.decode(ids)


def test_save_and_load(ours, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = copy.deepcopy(ours)
    tokenizer.add_tokens(["<extra>"], special=True)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    for text in [*TEXTS, "<extra>x"]:
        assert again.encode(text) == tokenizer.encode(text)
    assert again.padding_side == "right"
    assert again.pad_token == "<unk>"
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert theirs(TEXTS, padding=True).input_ids == again(TEXTS, padding=True).input_ids
    assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_damaged_and_contradicting_files(checkpoint, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoint("idefics2-8b"), tmp_path / "a")
    (folder / "added_tokens.json").write_text('{"<image>": 7}')
    with pytest.raises(ValueError, match="'<image>' has id 32001"):
        Tokenizer.from_pretrained(folder)
    (folder / "added_tokens.json").write_text('{"<new>": 32003}')
    assert Tokenizer.from_pretrained(folder).convert_tokens_to_ids("<new>") == 32003
    good = json.loads((folder / "tokenizer_config.json").read_text())
    for change in ({"pad_token": 3}, {"model_max_length": "long"}, {"model_max_length": -1}):
        (folder / "tokenizer_config.json").write_text(json.dumps(good | change))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=next(iter(change)) if "model" in str(change) else "should be a string"):
            Tokenizer.from_pretrained(folder)
    for content in ("", "{}", "[]", '{"model": {"type": "BPE"}}', "version https://git-lfs.github.com/spec/v1"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(folder)


def test_vocabularies_of_released_checkpoints_fit_their_models(checkpoint):
    base = Tokenizer.from_pretrained(checkpoint("idefics2-8b-base"))
    base.check_vocabulary(32002)  # the size of its model, though <end_of_utterance> has the id 32002
    with pytest.raises(ValueError, match="has id 31999, but the model has 31999 tokens"):
        base.check_vocabulary(31999)


# ---- guarded prompts: what a user typed stays text

GUARD = "\U000f1234"


def metaspace_first(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary behind LLaVA-vicuna's pipeline, where only the first piece of a prompt gets a "▁"."""
    spec = json.loads(tokenizer.backend.to_str())
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), tokenizer.config)


@pytest.fixture(scope="module", params=["prepend", "metaspace first"])
def tokenizer(request, ours):
    return ours if request.param == "prepend" else metaspace_first(ours)


@given(STRINGS)
@settings(max_examples=200, deadline=None)
def test_without_guards_nothing_changes(tokenizer, text):
    assert tokenizer.encode_guarded(text, GUARD) == tokenizer.encode(text, add_special_tokens=False)


@given(STRINGS, STRINGS)
@settings(max_examples=200, deadline=None)
def test_typed_special_tokens_are_text(tokenizer, first, second):
    special = set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)) - {tokenizer.unk_token_id}
    prompt = f"User: {tokenizer.guard(first, GUARD)}{tokenizer.guard(second, GUARD)}<end_of_utterance>\nA"
    ids = tokenizer.encode_guarded(prompt, GUARD)
    assert [i for i in ids if i in special] == [32002]
    text = tokenizer.decode(ids).rsplit("<end_of_utterance>", maxsplit=1)[0]
    assert text == f"User: {first}{second}".replace("▁", " ")


def test_tokens_that_swallow_blanks(ours):
    backend = copy.deepcopy(ours.backend)
    backend.add_special_tokens([tokenizers.AddedToken("<wide>", lstrip=True, rstrip=True, special=True)])
    tokenizer = Tokenizer(backend)
    for text in ("a <wide> b", "<wide>", " \n<wide>\t<wide> <image>", "a<wide>b", "a <wid> b"):
        assert tokenizer.encode_guarded(text, GUARD) == tokenizer.encode(text, add_special_tokens=False)
