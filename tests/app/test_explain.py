"""`minivlm explain`: its data, its files, and the page in a real browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import CONTRAST
from PIL import Image

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.app import cli, explain, figures
from minivlm.parity import drawn_image

MODELS = ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "image.png"
    drawn_image().save(path)
    return path


@pytest.fixture(scope="module")
def pages(image: Path) -> dict[str, Path]:
    """The page of each model."""
    made = {}
    for model in MODELS:
        made[model] = image.with_name(f"{model}.html")
        argv = ["explain", str(image), "what do you see?", "--out", str(made[model]), "--model", model]
        assert cli.main(argv) == 0
    return made


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_is_one_small_file(pages: dict[str, Path]) -> None:
    for page in pages.values():
        text = page.read_text(encoding="utf-8")
        assert len(text) < 5_000_000
        assert "http:" not in text
        assert "https:" not in text
        assert data_of(page)["question"] == "what do you see?"


def test_what_was_asked_cannot_end_the_script(pages: dict[str, Path], tmp_path: Path) -> None:
    question = "</script><b>&{{data}}"
    text = explain.page({**data_of(pages[MODELS[0]]), "question": question})
    assert text.count("</script>") == 2
    assert "<b>&" not in text
    (tmp_path / "page.html").write_text(text)
    assert data_of(tmp_path / "page.html")["question"] == question


@pytest.mark.parametrize("model", MODELS)
def test_the_data_are_those_of_the_model(model: str, pages: dict[str, Path]) -> None:
    found, config = data_of(pages[model]), AutoModelForImageTextToText.from_pretrained(model).decoder.config
    assert found["answer"]
    for token in found["tokens"]:
        assert token["top"][0][1] == pytest.approx(token["p"], abs=1e-4)  # greedy: the likeliest was chosen
        assert len(token["lens"]) == config.num_hidden_layers
        assert token["lens"][-1]["p"] == pytest.approx(token["p"], abs=1e-3)  # the lens ends in the answer
    layers = found["attention"]["text"]
    assert layers[0]["heads"]["shape"] == [len(found["tokens"]), config.num_attention_heads, len(found["prompt"])]
    weights = figures.unpacked(layers[0]["mean"])
    assert 0.9 < float(weights[0].sum()) < 1.1  # the first answer token sees the whole prompt and nothing else
    assert min(token["grey"] for token in found["tokens"]) < 0.1
    names = [stage["name"] for stage in found["stages"]]
    assert names[-1] == "in all"
    assert {"vision layer", "decoder layer"} <= set(names)
    assert len(found["relevance"]) == len(found["tokens"])


def test_packing_keeps_small_and_large() -> None:
    weights = torch.tensor([[0.5, 0.01, 0.0, 0.2], [1e-6, 0.0, 2e-6, 1e-6]])
    torch.testing.assert_close(figures.unpacked(explain.packed(weights)), weights, rtol=0.06, atol=1e-8)


def test_two_images_and_figures(image: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (60, 120), "blue").save(other)
    out = tmp_path / "page.html"
    argv = ["explain", image, other, "what differs?", "--out", out, "--png", tmp_path / "figures", "--layers", "0"]
    assert cli.main([*map(str, argv), "--max-new-tokens", "3"]) == 0
    err = capsys.readouterr().err
    assert "page.html: 0." in err
    found = data_of(out)
    assert len(found["images"]) == 2
    assert ["heads" in layer for layer in found["attention"]["text"]].count(True) == 1
    figures_made = sorted(path.name for path in (tmp_path / "figures").glob("*.png"))
    assert "lens.png" in figures_made
    assert "image-2-whole-image.png" in figures_made
    assert len(figures_made) == 2 * (1 + len(found["tokens"])) + 1


def test_what_it_refuses(image: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["explain", str(image), "what?", "--out", str(tmp_path / "no" / "page.html")]) == 1
    assert "folder that exists" in capsys.readouterr().err
    assert cli.main(["explain", str(image), "what?", "--out", str(tmp_path / "page.html"), "--layers", "9"]) == 1
    assert "0 to 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["explain", "what?", "--out", str(tmp_path / "page.html")])
    model, processor = (auto.from_pretrained(MODELS[0]) for auto in (AutoModelForImageTextToText, AutoProcessor))
    with pytest.raises(ValueError, match="without an image"):
        explain.gather(model, processor, [], "what?")


# ---- In a browser


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("model", MODELS)
def test_in_a_real_browser(model: str, width: int, pages: dict[str, Path], browser: Any) -> None:
    page, wrong, asked = browser.new_page(viewport={"width": width, "height": 844}), [], []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[model].as_uri())
    page.wait_for_selector("#answer button")
    pixels = "document.getElementById('look').toDataURL()"
    before, caption = page.evaluate(pixels), page.inner_text("#caption")
    buttons = page.locator("#answer button")
    assert buttons.count() == len(data_of(pages[model])["tokens"])
    buttons.nth(5).click()
    assert buttons.nth(5).get_attribute("aria-pressed") == "true"
    assert page.inner_text("#caption") != caption
    clicked = page.evaluate(pixels)
    assert clicked != before
    page.keyboard.press("ArrowLeft")
    assert buttons.nth(4).get_attribute("aria-pressed") == "true"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(pixels) == clicked
    drawn = {clicked}
    assert page.locator("#layer").is_hidden()
    for mode in ("mean", "rollout", "layer"):
        page.locator(f"#mode input[value={mode}]").check(force=True)
        drawn.add(page.evaluate(pixels))
    assert len(drawn) == 4
    assert page.locator("#text .t").count() > 4
    page.locator("#layer").focus()
    page.keyboard.press("Home")
    drawn.add(page.evaluate(pixels))
    page.locator("#head").focus()
    page.keyboard.press("ArrowRight")
    drawn.add(page.evaluate(pixels))
    assert len(drawn) == 6
    assert page.inner_text("#head-out") == "1 of 4"
    page.locator("#paint input[value=colours]").check(force=True)
    assert page.evaluate(pixels) not in drawn
    page.locator("#images .views canvas").nth(1).focus()
    page.keyboard.press("ArrowDown")
    assert "patch row 2, column 1" in page.inner_text("#images")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CONTRAST) == []
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()
