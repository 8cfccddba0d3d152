"""The documentation pages of these models run with only the import changed.

Every Python block of a page runs in order, in one namespace, as a reader would paste it. What the test exchanges is
what a test must: names of checkpoints become small checkpoints with the real vocabularies, picture URLs become ones on
this machine, and devices that are not here become the CPU. Misprints of the pages are mended in `MISPRINTS`.
"""

import http.server
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minivlm import AutoModelForImageTextToText
from minivlm.auto import PRESETS
from minivlm.models.idefics import IdeficsConfig
from minivlm.models.idefics2 import Idefics2Config
from minivlm.models.llava_next import LlavaNextConfig

DOCUMENTS = Path(__file__).parent / "data" / "documents"
SHARED = Path(__file__).parents[2] / "shared" / "hub"

MISPRINTS = {
    "Image. Soehbat(": "Image.open(",
    # The Chinese conversation alone has 107 tokens, so this limit is an error, here as in the reference.
    "max_length=100)": "max_length=150)",
    "    model_id,": '    "llava-hf/llava-v1.6-mistral-7b-hf",',  # its page never says what it is
}
CHANGES = {
    "from transformers import": "from minivlm import",
    "from accelerate.test_utils.testing import get_backend": "get_backend = lambda: ('cpu', 1, None)",
    **({} if torch.cuda.is_available() else {'"cuda:0"': '"cpu"', '"cuda"': '"cpu"', ".to(0)": '.to("cpu")'}),
}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def blocks(document: str) -> list[str]:
    """The Python of a page, block by block; of interactive sessions, what was typed."""
    text = (DOCUMENTS / document).read_text(encoding="utf-8")
    found = re.findall(r"```(?:python|py)\n(.*?)```", text, flags=re.DOTALL)
    return [typed(code) if ">>>" in code else code for code in found]


def typed(session: str) -> str:
    """What was typed in an interactive session (a page leaves blank lines inside a statement, as doctest does not)."""
    return "\n".join(line[4:] for line in session.splitlines() if line.startswith((">>>", "...")))


def idefics2(released: Any) -> Any:
    text = {**TINY, "model_type": "mistral", "vocab_size": 32003, "num_key_value_heads": 2}
    perceiver = {"hidden_size": 32, "resampler_n_heads": 4, "resampler_head_dim": 8, "resampler_depth": 1}
    vision = {**TINY, "image_size": 980, "patch_size": 14}
    parts = {"vision_config": vision, "perceiver_config": {**perceiver, "num_key_value_heads": 2}, "text_config": text}
    return Idefics2Config.from_hub(parts)


def llava_next(released: Any) -> Any:
    vision = {**TINY, "image_size": 336, "patch_size": 14}
    text = {**TINY, "model_type": "mistral", "vocab_size": 32064, "num_key_value_heads": 2, "sliding_window": None}
    return LlavaNextConfig.from_hub({"vision_config": vision, "text_config": text, "image_token_index": 32000})


def idefics(released: Any) -> Any:
    vision = {**TINY, "embed_dim": 32, "image_size": 224, "patch_size": 14}
    perceiver = {"use_resampler": True, "resampler_n_heads": 4, "resampler_head_dim": 8, "resampler_depth": 1}
    added = {"additional_vocab_size": released.additional_vocab_size, "cross_layer_interval": 1, "qk_layer_norms": True}
    parts = {"vision_config": vision, "perceiver_config": {**perceiver, "resampler_n_latents": 8}}
    return IdeficsConfig.from_hub({**TINY, **added, **parts, "use_resampler": True})


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path], llava: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Hub name → folder: the real processor files, and random weights, small in every width."""
    made: dict[str, Path] = {}

    def files(name: str) -> Path:
        organisation, _, model = name.partition("/")
        if model.startswith("idefics2"):
            return checkpoint(model)
        if organisation == "llava-hf":
            return llava(model)
        if not (SHARED / name / "tokenizer.json").is_file():
            pytest.skip(f"Llama's vocabulary may not be stored here and {SHARED / name} has no tokenizer.json")
        return SHARED / name

    def folder(name: str) -> Path:
        if name not in made:
            released, real = PRESETS[name], files(name)
            made[name] = tmp_path_factory.mktemp("small")
            torch.manual_seed(0)
            small_config = {"idefics2": idefics2, "llava_next": llava_next, "idefics": idefics}[released.model_type]
            AutoModelForImageTextToText.from_config(small_config(released)).save_pretrained(made[name])
            for path in real.glob("*"):
                if path.name not in ("config.json", "keys.json"):
                    shutil.copyfile(path, made[name] / path.name)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def pictures_url() -> Iterator[str]:
    """A server on this machine that answers every request with a photograph."""
    photograph = (DOCUMENTS.parent / "images" / "coco_000000039769.jpg").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Content-Length", str(len(photograph)))
            self.end_headers()
            self.wfile.write(photograph)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def exchange(code: str, small: Callable[[str], Path], url: str) -> str:
    for old, new in {**MISPRINTS, **CHANGES}.items():
        code = code.replace(old, new)
    code = re.sub(r"https?://[^\s\"']+", f"{url}/picture.jpg", code)
    for name in sorted(PRESETS, key=len, reverse=True):
        if f'"{name}"' in code:
            code = code.replace(f'"{name}"', repr(str(small(name))))
    return code


@pytest.mark.parametrize("document", sorted(path.name for path in DOCUMENTS.glob("*.md")))
def test_page(document: str, small: Callable[[str], Path], pictures_url: str) -> None:
    pytest.importorskip("requests", reason="the pages fetch their pictures with requests")
    namespace: dict[str, Any] = {}
    ran = 0
    for code in blocks(document):
        torch.manual_seed(0)
        exec(compile(exchange(code, small, pictures_url), document, "exec"), namespace)
        ran += 1
    assert ran >= 2, "no code found: has the page changed?"
