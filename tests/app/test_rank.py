"""Given answers, the likeliest first: as the model would write them, ended as the template ends them."""

import json

import pytest

import minivlm
from minivlm.app import cli

QUESTION = ["docs/shapes.png", "What number is written?"]


@pytest.mark.parametrize("name", ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"])
def test_the_written_number_is_the_likeliest(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["rank", *QUESTION, "--answers", "46.", "47.", "A red star.", "--model", name, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers[0]["answer"] == "47."
    assert sum(answer["share"] for answer in answers) == pytest.approx(1)
    assert [answer["log_probability"] for answer in answers] == sorted(
        (answer["log_probability"] for answer in answers), reverse=True
    )


def test_the_score_is_the_loss_of_the_answer(capsys: pytest.CaptureFixture) -> None:
    """Minus the summed loss of the answer's tokens and its end, behind the same prompt."""
    assert cli.main(["rank", *QUESTION, "--answers", "47.", "two", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)["answers"][0]["log_probability"]
    processor = minivlm.AutoProcessor.from_pretrained("shapes-idefics2")
    content = [{"type": "image", "image": QUESTION[0]}, {"type": "text", "text": QUESTION[1]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "47."}]}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}, answer],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    learned = inputs.pop("assistant_masks").bool()
    model = minivlm.AutoModelForImageTextToText.from_pretrained("shapes-idefics2")
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(~learned, -100)).loss
    assert score == pytest.approx(-loss.item() * int(learned.sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*QUESTION, "--answers", "one"], "two different"),
        ([*QUESTION, "--answers", "a", "a"], "two different"),
        ([*QUESTION, "--answers", "a", " "], "empty"),
        (["What?", "docs/shapes.png", "--answers", "a", "b"], "is a file"),
    ],
)
def test_what_cannot_be_ranked(argv: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["rank", *argv])
    assert words in capsys.readouterr().err
