"""Inputs: attributes, moving, converting."""

import copy
import pickle

import numpy as np
import pytest
import torch

from minivlm.modules.inputs import Inputs


def make() -> Inputs:
    return Inputs(input_ids=torch.ones(1, 3, dtype=torch.int64), pixel_values=torch.ones(1, 2), note="kept")


def test_keys_are_attributes():
    inputs = make()
    assert inputs.input_ids is inputs["input_ids"]
    inputs.labels = inputs.input_ids
    assert inputs["labels"] is inputs.input_ids
    with pytest.raises(AttributeError, match="there are input_ids"):
        _ = inputs.pixels
    assert dict(**inputs).keys() == inputs.keys()


@pytest.mark.parametrize(
    "arguments", [("cpu", torch.float16), (torch.float16,), (torch.device("cpu"), torch.float16)], ids=str
)
def test_to_takes_the_positional_forms_and_casts_floats_only(arguments):
    inputs = make().to(*arguments)
    assert inputs.pixel_values.dtype == torch.float16
    assert inputs.input_ids.dtype == torch.int64
    assert inputs.note == "kept"
    assert make().to("meta").input_ids.device.type == "meta"
    assert make().to(dtype=torch.bfloat16).pixel_values.dtype == torch.bfloat16


def test_to_agrees_with_transformers():
    from transformers import BatchFeature

    ours, theirs = make().to("cpu", torch.bfloat16), BatchFeature(make()).to("cpu", torch.bfloat16)
    assert {k: getattr(v, "dtype", v) for k, v in ours.items()} == {
        k: getattr(v, "dtype", v) for k, v in theirs.items()
    }


def test_convert():
    assert torch.equal(Inputs(a=[[1, 2]]).convert("pt").a, torch.tensor([[1, 2]]))
    assert Inputs(a=[[]]).convert("pt").a.dtype == torch.int64
    assert isinstance(Inputs(a=[[1]]).convert("np").a, np.ndarray)
    assert Inputs(a=[[1], [2, 3]]).convert(None).a == [[1], [2, 3]]
    with pytest.raises(ValueError, match="padding=True"):
        Inputs(a=[[1], [2, 3]]).convert("pt")
    with pytest.raises(ValueError, match="return_tensors"):
        Inputs(a=[[1]]).convert("tf")


def test_copies_and_pickles():
    inputs = make()
    assert isinstance(copy.copy(inputs), Inputs)
    assert torch.equal(pickle.loads(pickle.dumps(inputs)).input_ids, inputs.input_ids)
