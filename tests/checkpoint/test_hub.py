"""Fetching from the Hub, against a small server on this machine that answers as the Hub does."""

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import processes
import pytest

from minivlm.checkpoint.hub import suggestion

COMMIT = "1" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves /org/repo/resolve/REVISION/FILE from a folder; counts what is asked for."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server: Any = self.server
        if self.path.count("/") < 5:  # whether the Hub answers at all
            self.send_response(200)
            self.end_headers()
            return
        _, org, _, _, revision, name = self.path.split("?")[0].split("/", 5)
        path = (server.adapter if org == "adapter" else server.folder) / name
        refusal = {"gated": (403, "GatedRepo"), "unknown": (401, "RepoNotFound")}.get(org)
        if refusal is None and revision not in ("main", "v1", COMMIT):
            refusal = (404, "RevisionNotFound")
        if refusal is None and not path.is_file():
            refusal = (404, "EntryNotFound")
        self.send_response(refusal[0] if refusal else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        content = b"" if refusal else path.read_bytes()
        if refusal:
            self.send_header("X-Error-Code", refusal[1])
        else:
            server.asked.append((self.command, name, self.headers.get("Authorization")))
            self.send_header("ETag", hashlib.sha1(content).hexdigest())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    folder = tmp_path_factory.mktemp("hub")
    server.folder = oracle.save(oracle.random_reference(oracle.idefics2_config()), folder, max_shard_size="100KB")
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    shutil.copytree(folder, folder / "inner", ignore=shutil.ignore_patterns("inner"))
    server.adapter = tmp_path_factory.mktemp("adapter")
    (server.adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "unknown/base"}')
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


CODE = """
import json, sys
from minivlm import AutoModelForImageTextToText as Auto
for name, options in json.loads(sys.argv[1]):
    try:
        print(list(Auto.from_pretrained(name, **options).lm_head.weight.shape))
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
"""
LOADED = "[100, 64]"


def load(
    port: int, cache: Path, *calls: tuple[str, dict[str, Any]], offline: bool = False, patience: int = 2
) -> list[str]:
    """What from_pretrained gives for each name, in a process whose Hub is at `port` and that prints nothing else."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_ETAG_TIMEOUT": str(patience),
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    result = processes.run(CODE, json.dumps(calls), env=environment)
    assert result.stderr == ""
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_download_then_offline(hub: Any, cache: Path) -> None:
    """Only what is needed is fetched, with the token, and once; what is in the cache needs no connection."""
    hub.asked.clear()
    options = {"revision": "v1", "token": "hf_secret"}
    once = ("org/repo", options)
    inner = ("org/repo", options | {"subfolder": "inner"})
    assert load(hub.server_port, cache, once, once, inner) == [LOADED] * 3
    fetched = [name for command, name, _ in hub.asked if command == "GET"]
    assert len(fetched) == len(set(fetched))
    shards = {path.name for path in hub.folder.glob("*.safetensors")}
    assert {name for name in fetched if name.endswith(".safetensors")} == shards
    assert {f"inner/{name}" for name in shards} <= {
        name for _, name, _ in hub.asked
    }  # the same blobs are there already
    assert not [name for name in fetched if "pytorch_model.bin" in name]
    assert all(authorization == "Bearer hf_secret" for _, _, authorization in hub.asked)
    hub.asked.clear()
    assert load(hub.server_port, cache, once, inner, offline=True) == [LOADED] * 2
    assert load(hub.server_port, cache, ("org/repo", options | {"local_files_only": True})) == [LOADED]
    assert not hub.asked


def test_refusals(hub: Any, tmp_path: Path) -> None:
    expected = [
        ("gated/repo", {}, "accept its licence"),
        ("unknown/repo", {}, "neither a folder"),
        ("org/repo", {"revision": "v9"}, "no revision 'v9'"),
        ("org/repo", {"local_files_only": True}, "not in the local cache"),
        ("adapter/repo", {}, "holds an adapter of unknown/base"),
        ("unknown/idefics2-8b", {}, r"Did you mean HuggingFaceM4/idefics2-8b"),
    ]
    found = load(hub.server_port, tmp_path, *((name, options) for name, options, _ in expected))
    for line, (_, _, words) in zip(found, expected, strict=True):
        assert line.startswith("CheckpointFileError")
        assert re.search(words, line)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port where connections are taken, and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_without_network(kind: str, hub: Any, silent: int, cache: Path, tmp_path: Path) -> None:
    """One sentence, in seconds, and nothing of the Hub client's own; what is in the cache loads all the same."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1] if kind == "closed" else silent
    warm = {"cache_dir": str(cache / "hub"), "revision": "v1"}
    start = time.monotonic()
    found = load(port, tmp_path, ("org/repo", {}), ("org/repo", warm), ("org/repo", warm), patience=1)
    assert "not in the local cache and the Hub cannot be reached" in found[0]
    assert found[1:] == [LOADED] * 2
    assert time.monotonic() - start < 60  # the Hub's client would try six times, for a minute each


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("idefics2-8b", "Did you mean HuggingFaceM4/idefics2-8b"),
        ("shapes-idefic2", "Did you mean shapes-idefics2"),
        ("shapes-lava-next", "Did you mean shapes-llava-next?"),
        ("huggingfacem4/idefics2-8b", "Did you mean HuggingFaceM4/idefics2-8b"),
        ("llava-hf/llava-1.6-mistral-7b-hf", "llava-hf/llava-v1.6-mistral-7b-hf"),
        ("gpt2", ""),
        ("org/model", ""),
    ],
)
def test_suggestions(name: str, expected: str) -> None:
    found = suggestion(name)
    assert expected in found
    assert bool(found) == bool(expected)
