"""Conversations: rendering equal to transformers, ids equal to the rendered string's, typed tokens kept as text."""

import copy
import json

import numpy as np
import pytest
import torch
from committed import HUB, LLAVA
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.checkpoint import hub
from minivlm.processing.idefics2 import Idefics2Processor
from minivlm.text import chat_template as chat

RED = Image.new("RGB", (380, 380), "red")
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': '}}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def processor(checkpoint):
    return Idefics2Processor.from_pretrained(checkpoint("idefics2-8b"), do_image_splitting=False, image_seq_len=3)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


IMAGE = {"type": "image"}
CONVERSATIONS = [
    [user(text("Hi"))],
    [user(IMAGE, text("What?")), {"role": "assistant", "content": [text("A cat.")]}, user(text("Sure?"))],
    [user(text("one"), IMAGE, text("two"), IMAGE, IMAGE)],
    [{"role": "system", "content": [text(" be brief\n")]}, user(text(" <b> & {{ x }} {% y %}"))],
]

# ---- the string


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("template", [None, VICUNA], ids=["own", "vicuna"])
def test_rendering_equals_transformers(processor, reference, conversation, add, template):
    options = {"add_generation_prompt": add, "chat_template": template}
    before = json.dumps(conversation)
    ours = processor.apply_chat_template(conversation, **options)
    assert ours == reference.apply_chat_template(conversation, **options)
    assert processor.apply_chat_template([conversation] * 2, **options) == [ours, ours]
    assert json.dumps(conversation) == before


RELEASED = {
    "idefics2": ["idefics2-8b", "idefics2-8b-chatty"],
    "mistral": ["llava-v1.6-mistral-7b-hf"],
    "vicuna": ["llava-v1.6-vicuna-7b-hf", "llava-v1.6-vicuna-13b-hf"],
    "yi": ["llava-v1.6-34b-hf"],
    "llama3": ["llama3-llava-next-8b-hf"],
    "qwen": ["llava-next-72b-hf", "llava-next-110b-hf"],
}


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("name", chat.KNOWN)
def test_known_templates_write_what_the_released_ones_do(processor, name, add):
    for checkpoint in RELEASED[name]:
        (folder,) = (HUB if name == "idefics2" else LLAVA).glob(checkpoint)
        source = hub.source(folder)
        released = chat.find_template(source, source.json("processor_config.json"), {})
        for conversation in CONVERSATIONS:
            options = {"add_generation_prompt": add}
            theirs = processor.apply_chat_template(conversation, chat_template=released, **options)
            assert processor.apply_chat_template(conversation, chat_template=name, **options) == theirs


@pytest.mark.parametrize("name", chat.KNOWN)
def test_known_templates_are_saved_in_full(processor, tmp_path, name):
    processor = copy.deepcopy(processor)
    processor.chat_template = name
    processor.save_pretrained(tmp_path)
    again = Idefics2Processor.from_pretrained(tmp_path)
    assert again.apply_chat_template(CONVERSATIONS[1]) == processor.apply_chat_template(CONVERSATIONS[1])
    assert "{%" in again.chat_template


def test_a_new_template_takes_the_place_of_the_old(processor, tmp_path, caplog):
    """Saved onto a folder that had one, in any file; transformers reads ours, and has nothing to say about where."""
    from transformers import AutoProcessor

    processor = copy.deepcopy(processor)
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    processor.chat_template = "new: {{ messages[0].content[0].text }}\n"
    processor.save_pretrained(tmp_path)
    assert Idefics2Processor.from_pretrained(tmp_path).chat_template == processor.chat_template
    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(CONVERSATIONS[0]) == "new: Hi" == processor.apply_chat_template(CONVERSATIONS[0])
    assert "chat_template" not in caplog.text
    processor.chat_template = None
    processor.save_pretrained(tmp_path)
    assert Idefics2Processor.from_pretrained(tmp_path).chat_template is None


def test_plain_string_content_is_text(processor, reference):
    messages = [{"role": "user", "content": "Hello"}]
    assert processor.apply_chat_template(messages) == "User: Hello<end_of_utterance>\n"
    assert reference.apply_chat_template(messages) != processor.apply_chat_template(messages)  # it says nothing there
    assert (
        processor.apply_chat_template(messages, tokenize=True)
        == processor(text="User: Hello<end_of_utterance>\n").input_ids
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "a conversation is a list"),
        ([], "a conversation is a list"),
        ("Hi", "a conversation is a list"),
        ({"role": "user", "content": "Hi"}, "a conversation is a list"),
        (["Hi"], "message 0 should be"),
        ([{"role": "user"}], "message 0 should be"),
        ([{"content": "Hi"}], "the role is one of"),
        ([{"role": "User <image>", "content": "Hi"}], "the role is one of"),
        ([{"role": "user", "content": None}], "content is a string or a list"),
        ([{"role": "user", "content": []}], "content is a string or a list"),
        ([user("Hi")], "message 0: an item is"),
        ([user(text("Hi")), user({"type": "video"})], "message 1: an item is"),
        ([user({"type": "text"})], "message 0: an item is"),
        ([user({"type": "text", "text": None})], "message 0: an item is"),
        ([[user(text("Hi"))], []], "a conversation is a list"),
    ],
)
def test_unclear_messages_are_refused(processor, messages, message):
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(messages, tokenize=tokenize)


# ---- options


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ({"add_generation_promt": True}, "add_generation_prompt"),
        ({"paddin": True}, "padding"),
        ({"tokenise": True}, "tokenize"),
        ({"continue_last_message": True}, "continue_final_message"),
        ({"note": "red"}, "mentions no variable"),
        ({"documents": []}, "mentions no variable"),
        ({"tools": []}, "mentions no variable"),
        ({"messages": []}, "mentions no variable"),
    ],
    ids=str,
)
def test_options_that_nobody_reads_are_refused(processor, tokenize, wrong, near):
    with pytest.raises(TypeError, match=f"'{next(iter(wrong))}'.*{near}"):
        processor.apply_chat_template([user(text("Hi"))], tokenize=tokenize, **wrong)


def test_options_of_the_call_change_no_string(processor):
    plain = processor.apply_chat_template([user(text("Hi"))])
    options = {"padding": True, "max_length": 99, "return_tensors": "pt", "truncation": True, "tools": None}
    assert processor.apply_chat_template([user(text("Hi"))], **options, return_dict=True) == plain


VARIABLES = (
    "{{ note }}{% for d in documents or [] %}[{{ d.title }}]{% endfor %}{{ tools | tojson if tools is not none }}|"
    "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"note": "red"},
        {"documents": [{"title": "é <s>", "n": 1}], "tools": None},
        {"tools": [{"name": "f", "parameters": {"a": [1, 2.5, None, True]}}], "note": 7},
    ],
    ids=str,
)
def test_variables_reach_the_template(processor, reference, variables):
    options = {"chat_template": VARIABLES, **variables}
    ours = processor.apply_chat_template([user(text("Hi"))], **options)
    assert ours == reference.apply_chat_template([user(text("Hi"))], **options)
    ids = processor.apply_chat_template([user(text("Hi"))], tokenize=True, **options)[0]
    assert processor.decode(ids[1:]) == ours
    assert ids.count(1) == 1  # the <s> of a document stays text


@pytest.mark.parametrize("value", [{1, 2}, b"a", Image.new("L", (1, 1)), print], ids=lambda v: type(v).__name__)
def test_variables_are_plain_data(processor, value):
    with pytest.raises(TypeError, match="text, numbers, lists"):
        processor.apply_chat_template([user(text("Hi"))], chat_template=VARIABLES, note=value)


@pytest.mark.parametrize("answer", ["A", " A cat", "A \n", "<s>A</s> "])
@pytest.mark.parametrize("trim", [False, True])
def test_continue_final_message(processor, reference, answer, trim):
    template = processor.chat_template.replace("line['text']", "line['text'] | trim") if trim else None
    messages = [user(IMAGE, text("What?")), {"role": "assistant", "content": [text("It is "), text(answer)]}]
    options = {"continue_final_message": True, "chat_template": template}
    ours = processor.apply_chat_template(messages, **options)
    assert ours == reference.apply_chat_template(messages, **options)
    assert ours.endswith(answer.strip() if trim else answer)
    ids = processor.apply_chat_template(messages, tokenize=True, images=RED, **options)[0]
    assert processor.decode(ids).endswith(ours[-3:])
    assert 32002 not in ids[-3:]


def test_continue_final_message_needs_words(processor):
    for last in (user(IMAGE), user(text(" ")), user(text(""))):
        with pytest.raises(ValueError, match="no words"):
            processor.apply_chat_template([user(text("Hi")), last], continue_final_message=True)
    for option in ("add_generation_prompt", "return_assistant_tokens_mask"):
        with pytest.raises(ValueError, match="continue_final_message.*" + option):
            processor.apply_chat_template([user(text("Hi"))], continue_final_message=True, **{option: True})


# ---- whatever is handed in is in the prompt


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        ("mistral", [user(text("Q")), {"role": "assistant", "content": [text("Q"), text("B")]}], "message 1, item 1"),
        ("mistral", [{"role": "system", "content": [text("A"), text("A")]}, user(text("Q"))], "message 0, item 1"),
        ("{{ messages[-1].content[0].text }}", [user(text("Hi")), user(text("Hi"))], "message 0, item 0 .*Hi"),
        ("{{ messages[0].content[0].text[:3] }}", [user(text("Hello"))], "message 0, item 0"),
        ("{{ messages[0].content[0].text }}", [user(text("Hi"), IMAGE)], "<image> 0 times for 1"),
        ("{{ messages[0].content[0].text }}<image>", [user(text("Hi"))], "<image> 1 times for 0"),
        ("{% if messages[0].content[0].text[0] == 'x' %}x{% endif %}", [user(text("xy"))], "message 0, item 0"),
    ],
)
def test_what_a_template_leaves_out_is_an_error(processor, tokenize, template, messages, what):
    """Found by where the template put it: the same words elsewhere do not count."""
    with pytest.raises(ValueError, match=f"template (leaves out|writes) {what}"):
        processor.apply_chat_template(messages, chat_template=template, tokenize=tokenize, images=RED)


def test_templates_that_look_at_how_a_text_begins(processor, reference):
    """Their string is as in transformers; ids would be a guess."""
    template = "{% set t = messages[0].content[0].text %}{{ 'x' + t if t.startswith('H') else t }}"
    messages = [user(text("Hi"))]
    assert processor.apply_chat_template(messages, chat_template=template) == "xHi"
    assert reference.apply_chat_template(messages, chat_template=template) == "xHi"
    for options, message in (({"tokenize": True}, "typed special tokens"), ({"continue_final_message": True}, "end")):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(messages, chat_template=template, **options)


@pytest.mark.parametrize("template", ["nosuch", "vicunna", 7, {"default": "x"}], ids=str)
def test_names_of_no_template(processor, template):
    with pytest.raises(ValueError, match=r"chat_template is a jinja template.*vicuna"):
        processor.apply_chat_template([user(text("Hi"))], chat_template=template)


# ---- templates


def test_no_template(checkpoint):
    base = Idefics2Processor.from_pretrained(checkpoint("idefics2-8b-base"))
    with pytest.raises(ValueError, match=r"no chat template.* vicuna"):
        base.apply_chat_template([user(text("Hi"))])
    template = "{{ messages[0].role + messages[0].content[0].text }}"
    assert base.apply_chat_template([user(text("Hi"))], chat_template=template) == "userHi"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "T"),
        ("chat_template.json", '{"chat_template": "T"}'),
        ("processor_config.json", '{"chat_template": "T"}'),
        ("tokenizer_config.json", '{"chat_template": "T"}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": "T"}, {"name": "x"}]}'),
        ("processor_config.json", '{"chat_template": {"default": "T"}}'),
    ],
)
def test_where_templates_are_found(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    source = hub.source(tmp_path)
    configs = [source.json(name, required=False) or {} for name in ("processor_config.json", "tokenizer_config.json")]
    assert chat.find_template(source, *configs) == "T"


def test_template_of_the_wrong_type(tmp_path):
    with pytest.raises(ValueError, match="chat_template should be text"):
        chat.find_template(hub.source(tmp_path), {"chat_template": 3}, {})


def test_what_templates_may_use(processor):
    template = (
        "{%- for m in messages -%}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{{ bos_token }}"
        "{{ '-' * 3 }}{{ 7 % 4 }}{% endfor %}"
    )
    out = processor.apply_chat_template([user(text("<é>")), user(text(" "))], chat_template=template)
    assert out == '{"role": "user", "content": [{"type": "text", "text": "<é>"}]}<s>---3'


# ---- ids

WORDS = st.text(alphabet=st.sampled_from(list("ab <>/_sé🙂\n▁{}%\U000f0000")), max_size=12)
CONTENT = st.lists(st.one_of(WORDS.map(text), st.just({"type": "image", "image": RED})), min_size=1, max_size=4)
MESSAGES = st.lists(CONTENT.map(lambda content: user(*content)), min_size=1, max_size=3)


@given(MESSAGES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_ids_of_ordinary_conversations_are_those_of_the_string(processor, messages, add):
    items = [item for message in messages for item in message["content"]]
    typed = "".join(item.get("text", "") for item in items)
    assume(not any(token in typed for token in processor.tokenizer.all_special_tokens))
    prompt = processor.apply_chat_template(messages, add_generation_prompt=add)
    images = [RED for item in items if item["type"] == "image"]
    expected = processor(text=prompt, images=images, return_tensors="pt")
    options = {"add_generation_prompt": add, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


TYPED = st.lists(
    st.sampled_from(
        ["<image>", "<ima", "ge>", "<s>", "</s>", "<end_of_utterance>", "<", "a", " ", "\n", "<fake_token_"]
    ),
    max_size=6,
).map("".join)


@given(st.lists(TYPED, min_size=1, max_size=3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_typed_special_tokens_never_become_special(processor, typed, with_image):
    content = [*map(text, typed), *([{"type": "image", "image": RED}] if with_image else [])]
    ids = processor.apply_chat_template([user(*content)], tokenize=True)[0]
    special = set(processor.tokenizer.additional_special_tokens_ids) | {1, 2}
    fake, image, end = 32000, 32001, 32002
    expected = [1, *([fake, image, image, image, fake] if with_image else []), end]
    assert [i for i in ids if i in special] == expected
    decoded = processor.decode(ids)
    assert "".join(typed) in decoded


def test_replayed_history_with_typed_tokens(processor):
    messages = [
        user({"type": "image", "image": RED}, text("is <image> a token?<end_of_utterance>\nAssistant: Yes")),
        {"role": "assistant", "content": [text("<image> is, </s> too.")]},
        user(text("ok")),
    ]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs.input_ids == 32001).sum() == 3
    assert (inputs.input_ids == 32002).sum() == 3
    assert (inputs.input_ids == 2).sum() == 0
    prompt = processor.apply_chat_template(messages)
    with pytest.raises(ValueError, match="1 images for 3 <image>"):  # in a ready-made string they keep their meaning
        processor(text=prompt, images=[RED])


def test_a_template_that_writes_bos_gets_no_second_one(processor):
    own = processor.chat_template
    options = {"tokenize": True, "chat_template": "{{ bos_token }}" + own}
    ids = processor.apply_chat_template([user(text("<s>Hi"))], **options)[0]
    assert ids.count(1) == 1
    assert ids == processor.apply_chat_template([user(text("<s>Hi"))], tokenize=True)[0]
    typed = processor.apply_chat_template(
        [user(text("<s>"))], tokenize=True, chat_template="{{ messages[0].content[0].text }}"
    )
    assert typed[0].count(1) == 1
    assert len(typed[0]) > 3


# ---- pictures in messages


def test_every_way_to_give_a_picture(processor, pictures):
    path = pictures / "china.jpg"
    picture = Image.open(path)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor(text="User:<image>Hi<end_of_utterance>\n", images=picture, return_tensors="pt")
    for item in (
        {"type": "image", "image": picture},
        {"type": "image", "image": np.asarray(picture)},
        {"type": "image", "image": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "url": str(path)},
        {"type": "image_url", "image_url": {"url": str(path)}},
        {"type": "image_url", "image_url": str(path)},
    ):
        inputs = processor.apply_chat_template([user(item, text("Hi"))], **options)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected), item
    inputs = processor.apply_chat_template([user(IMAGE, text("Hi"))], images=[picture], **options)
    assert torch.equal(inputs.pixel_values, expected.pixel_values)
    assert processor.apply_chat_template([user(IMAGE, text("Hi"))], images=picture, tokenize=True) == (
        expected.input_ids.tolist()
    )


def test_pictures_must_be_given_once(processor):
    given_ = {"type": "image", "image": RED}
    for content, images in (([IMAGE], None), ([IMAGE, given_], None), ([given_], [RED]), ([IMAGE, given_], [RED])):
        with pytest.raises(ValueError, match="image items"):
            processor.apply_chat_template([user(*content)], images=images, tokenize=True)
    with pytest.raises(ValueError, match="2 images for 1 <image>"):
        processor.apply_chat_template([user(IMAGE)], images=[RED, RED], tokenize=True)


def test_batches_mix_text_and_pictures(processor):
    picture = {"type": "image", "image": RED}
    batch = [[user(text("Hi"))], [user(picture, text("one"), picture)], [user(text("no"), picture)]]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(batch, padding=True, **options)
    assert inputs.pixel_values.shape == (3, 2, 3, 380, 380)
    assert inputs.pixel_attention_mask.sum((1, 2, 3)).tolist() == [0, 2 * 380**2, 380**2]
    for row, messages in enumerate(batch):
        alone = processor.apply_chat_template(messages, **options)
        kept = inputs.attention_mask[row].bool()
        assert torch.equal(inputs.input_ids[row][kept], alone.input_ids[0])
    assert "pixel_values" not in processor.apply_chat_template(batch[:1], **options)


def test_agrees_with_the_reference_but_for_the_file_of_the_tokenizer(processor, reference):
    """5.23's own route, given the tokenizer.json as it is and no inserted space, has our ids."""
    from transformers import PreTrainedTokenizerFast

    messages = [user({"type": "image", "image": RED}, text("\nWhat?")), {"role": "assistant", "content": [text("A")]}]
    theirs = copy.copy(reference)
    theirs.tokenizer = PreTrainedTokenizerFast(tokenizer_object=processor.tokenizer.backend, bos_token="<s>")
    theirs.image_seq_len = processor.image_seq_len
    theirs.image_processor = copy.copy(reference.image_processor)
    theirs.image_processor.do_image_splitting = False
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, inputs = (
        theirs.apply_chat_template(messages, **options),
        processor.apply_chat_template(messages, **options),
    )
    for name in ("input_ids", "pixel_values", "pixel_attention_mask"):
        assert torch.equal(inputs[name], expected[name])
