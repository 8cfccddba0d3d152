"""The eight tasks run, from prompt to text, on a tiny random IDEFICS: on drawn shapes, and by URL as in the guide."""

import http.server
import threading

import idefics_tasks
import pytest
import shapes
import torch
from idefics_tasks import TASKS, from_shapes, from_the_guide
from tiny_idefics import IMAGE_SIZE, SPECIAL, write_small

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.models.idefics import IdeficsConfig, IdeficsForVisionText2Text
from minivlm.processing.idefics import IdeficsProcessor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with random weights and letters for a vocabulary."""
    folder = write_small(tmp_path_factory.mktemp("tasks") / "tiny")
    vision = {"embed_dim": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
    config = {
        "vocab_size": 102,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vision_config": vision | {"image_size": IMAGE_SIZE, "patch_size": 8},
    }
    torch.manual_seed(0)
    IdeficsForVisionText2Text(IdeficsConfig.from_hub(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def show():
    return from_shapes()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_on_shapes(loaded, show, name):
    answers = TASKS[name](*loaded, show)
    assert len(answers) == (3 if name == "batch" else 1)
    begins = {
        "prompted_captioning": "This is an image of",
        "few_shot": f"User: Describe this image.\nAssistant: {show.tower_text}",
        "question_answering": "Instruction: Provide an answer",
        "conversation": "User: What is in this image?",
    }
    for answer in answers:
        assert answer.lstrip().startswith(begins.get(name, ""))
        assert "<image>" not in answer


def test_ranking_lists_every_category(loaded, show):
    (text,) = TASKS["rank_classification"](*loaded, show)
    scores = [float(line.split()[0]) for line in text.splitlines()]
    assert sorted(scores, reverse=True) == scores
    assert sorted(line.split()[1] for line in text.splitlines()) == sorted(show.categories)


def test_what_is_shown_is_new_and_its_answers_are_right(show):
    again = from_shapes()
    assert again.pet.tobytes() == show.pet.tobytes()
    assert show.right["classification"] in show.categories
    assert show.right["question_answering"].rstrip(".") in shapes.COLOURS
    assert show.right["captioning"].startswith("a")


def test_a_base_checkpoint_does_not_converse(tmp_path, loaded, show):
    processor = IdeficsProcessor.from_pretrained(write_small(tmp_path / "base", SPECIAL[:5]))
    assert "take an -instruct one" in TASKS["conversation"](loaded[0], processor, show)[0]


def test_the_guides_pictures_come_by_url(checkpoint, data, monkeypatch, capsys):
    """Every URL of the guide, on a server of this machine."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write((data / "images" / "china.jpg").read_bytes())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}/"
        guide = vars(from_the_guide())
        urls = {name: value for name, value in guide.items() if str(value).startswith("https://")}
        local = {name: url.replace("https://", here) for name, url in urls.items()}
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(
            idefics_tasks, "from_the_guide", lambda: idefics_tasks.Show(**guide | local | {"story_tokens": 9})
        )
        idefics_tasks.main(["--model", str(checkpoint), "--show", "guide", "--device", "cpu"])
        server.shutdown()
    printed = capsys.readouterr().out
    assert all(f"== {name.replace('_', ' ')}," in printed for name in TASKS)
    assert "Question: Where are these people and what's the weather like? Answer:" in printed
    assert len(set(asked)) == len(urls)


def test_unknown_tasks_are_refused(capsys):
    with pytest.raises(SystemExit):
        idefics_tasks.main(["juggling"])
    assert "unknown task 'juggling'" in capsys.readouterr().err
