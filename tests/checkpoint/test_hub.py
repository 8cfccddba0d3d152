"""Fetching from the Hub, against a small server on this machine that answers as the Hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest

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
        path = server.folder / name
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
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def load(hub: Any, cache: Path, name: str, offline: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """from_pretrained in a process of its own, whose Hub is our server and whose cache is `cache`."""
    code = (
        "import json, sys; from minivlm import AutoModelForImageTextToText as Auto\n"
        "print(Auto.from_pretrained(sys.argv[1], **json.loads(sys.argv[2])).lm_head.weight.shape)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", code, name, json.dumps(options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_download_then_offline(hub: Any, tmp_path: Path) -> None:
    """Only what is needed is fetched, with the token; a second load and an offline one fetch nothing."""
    hub.asked.clear()
    first = load(hub, tmp_path, "org/repo", revision="v1", token="hf_secret")
    assert "[100, 64]" in first.stdout, first.stderr
    fetched = {name for command, name, _ in hub.asked if command == "GET"}
    assert {name for name in fetched if name.endswith(".safetensors")} == {
        path.name for path in hub.folder.glob("*.safetensors")
    }
    assert "pytorch_model.bin" not in fetched
    assert all(authorization == "Bearer hf_secret" for _, _, authorization in hub.asked)
    hub.asked.clear()
    assert "[100, 64]" in load(hub, tmp_path, "org/repo", revision="v1", token="hf_secret").stdout
    assert not [name for command, name, _ in hub.asked if command == "GET"]
    hub.asked.clear()
    for options in ({"offline": True}, {"local_files_only": True}):
        assert "[100, 64]" in load(hub, tmp_path, "org/repo", revision="v1", **options).stdout
    assert not hub.asked


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gated/repo", {}, "accept its licence"),
        ("unknown/repo", {}, "neither a folder"),
        ("org/repo", {"revision": "v9"}, "no revision 'v9'"),
        ("org/repo", {"local_files_only": True}, "not in the local cache"),
    ],
)
def test_refusals(hub: Any, tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    result = load(hub, tmp_path, name, **options)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
