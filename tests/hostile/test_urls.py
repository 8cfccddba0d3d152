"""Odd servers: what they send is a picture, or one clear error, in bounded time and memory, and they learn nothing.

A server on this machine behaves as the path says; addresses of the world outside are played by `getaddrinfo`. Every
case runs in a child process; SECONDS is the time for those that would not end.
"""

import gzip
import http.server
import io
import re
import socket
import threading
import time
from typing import Any, ClassVar

import pytest
from guarded import Child
from PIL import Image

from minivlm.processing import fetch
from minivlm.processing.images import load_image

SECONDS = 0.5
PNG = io.BytesIO()
Image.new("RGB", (3, 2), "red").save(PNG, "PNG")
PNG = PNG.getvalue()
BOMB = gzip.compress(bytes(2**24))


class Server(http.server.BaseHTTPRequestHandler):
    """Behaves as `/name` says, which is a method below; notes what it is sent."""

    seen: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers)))
        name, _, rest = self.path[1:].partition("/")
        getattr(self, name.partition("?")[0], self.nothing)(rest)

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def nothing(self, rest: str) -> None:
        self.send_error(404)

    def picture(self, rest: str) -> None:
        self.send(PNG)

    def text(self, rest: str) -> None:
        self.send(PNG, Content_Type="text/html; charset=utf-7")

    def page(self, rest: str) -> None:
        self.send(b"<!DOCTYPE html><html>no picture</html>", Content_Type="image/png")

    def empty(self, rest: str) -> None:
        self.send(b"")

    def half(self, rest: str) -> None:
        self.send(PNG[:-30], Content_Length=str(len(PNG)))

    def longer(self, rest: str) -> None:
        self.send(PNG, Content_Length=str(2**40))

    def packed(self, rest: str) -> None:
        self.send(BOMB, Content_Encoding="gzip")

    def to(self, rest: str) -> None:
        self.send(b"", 302, Location=rest)

    def nowhere(self, rest: str) -> None:
        self.send(b"", 302)

    def again(self, rest: str) -> None:
        self.send(b"", 302, Location=f"/again/{len(rest)}x{rest}")

    def cookie(self, rest: str) -> None:
        self.send(b"", 302, Location="/picture/after-cookie", Set_Cookie="secret=1")

    def endless(self, rest: str) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(2**16))

    def endless_redirect(self, rest: str) -> None:
        self.send_response(302)
        self.send_header("Location", "/picture")
        self.end_headers()
        while True:
            self.wfile.write(bytes(2**16))

    def silent(self, rest: str) -> None:
        time.sleep(30)

    def drops(self, rest: str) -> None:
        """A byte of the body now and then."""
        self.send_response(200)
        self.end_headers()
        self._drop(PNG)

    def header_drops(self, rest: str) -> None:
        self._drop(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000)

    def _drop(self, content: bytes) -> None:
        for byte in content:
            self.wfile.write(bytes([byte]))
            time.sleep(0.2)

    def go_on(self, rest: str) -> None:
        while True:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def headers_without_end(self, rest: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            self.wfile.write(b"X: " + b"x" * 50_000 + b"\r\n")

    def rubbish(self, rest: str) -> None:
        self.wfile.write(bytes(range(256)))

    def words(self, rest: str) -> None:
        self.wfile.write(b"HTTP/1.1 20x \x1b[2J\r\n\r\n")

    def log_message(self, *args: Any) -> None:
        pass


# what is asked of the server (or the URL itself) → "picture", or the error
CASES = {
    "/picture": "picture",
    "/picture/ü?x=ä b#fragment": "picture",
    "/text": "picture",
    "/to//picture": "picture",
    "/longer": "picture",
    "/page": "ValueError: .*/page is not a JPEG.*web page",
    "/empty": "ValueError: .*it is empty",
    "/half": "OSError: .*",
    "/packed": r"ValueError: .*begins with b'\\x1f\\x8b",
    "/missing": "OSError: .*404",
    "/nowhere": "OSError: .*leads nowhere",
    "/again": "OSError: .*more than 5 redirects",
    "/to/file:///etc/hostname": "OSError: .*redirected to 'file:///etc/hostname'",
    "/to/ftp://127.0.0.1/x": "OSError: .*redirected to 'ftp:",
    "/to/data:image/png;base64,AAAA": "OSError: .*redirected to 'data:",
    "/to/gopher://127.0.0.1/": "OSError: .*redirected to 'gopher:",
    "/to/http://user:secret@127.0.0.1/x": "OSError: .*password",
    "/endless": "OSError: .*(more than 32 MiB|not finished)",
    "/endless_redirect": "picture",
    "/silent": "OSError: .*(not finished|timed out)",
    "/drops": "OSError: .*not finished after 0.5 s",
    "/header_drops": "OSError: .*not finished after 0.5 s",
    "/go_on": "OSError: .*(not finished|more than)",
    "/headers_without_end": "OSError: .*(got more than 100 headers|not finished)",
    "/rubbish": "OSError: .*",
    "/words": r"OSError: .*20x  \[2J ",
    "/to/http://100.100.100.200/latest/": "OSError: .*a cloud's keys",
    "http://[fd00:ec2::254]/latest/": "OSError: .*a cloud's keys",
    "http://[64:ff9b::a9fe:a9fe]/": "OSError: .*169.254.169.254 is a link-local",
    "http://[2002:a9fe:a9fe::]/": "OSError: .*169.254.169.254 is a link-local",
    "HTTP://{host}/picture": "picture",
    "  http://{host}/picture": "OSError: no image at",
    "http://user:secret@{host}/picture": r"OSError: could not fetch http://127\.0\.0\.1.*password(?!.*secret)",
    "http://127.0.0.1:1/x.png": "OSError: .*could not fetch http://127.0.0.1:1/x.png",
    "http://127.0.0.1:99999/x.png": "OSError: .*",
    "http://[bad/x.png": "OSError: .*could not fetch",
    "http://": "OSError: .*no host",
    "https://": "OSError: .*no host",
    "http:// blank/": "OSError: .*could not fetch",
    "http://a\r\nHost: b/": "OSError: .*",
    "https://{host}/picture": "OSError: .*could not fetch",
    "ftp://{host}/picture": "ValueError: only http",
    "file:///etc/hostname": "ValueError: only http",
    "s3://bucket/x.png": "ValueError: only http",
    "javascript://x": "ValueError: only http",
    "http://169.254.169.254/latest/meta-data/": "OSError: .*link-local",
    "http://[fe80::1]/x.png": "OSError: .*link-local",
    "http://[::ffff:169.254.169.254]/": "OSError: .*link-local",
    # a public address (played) that leads somewhere else
    "http://public.example:{port}/picture": "picture",
    "http://public.example:{port}/to/http://127.0.0.1:{port}/picture": "OSError: .*redirected from a public address",
    "http://public.example:{port}/to/http://localhost:{port}/picture": "OSError: .*redirected from a public address",
    "http://public.example:{port}/to/http://10.0.0.1/picture": "OSError: .*redirected from a public address",
    "http://public.example:{port}/to/http://public.example:{port}/picture": "picture",
    "http://rebinding.example:{port}/to/http://rebinding.example:{port}/picture": "OSError: .*redirected from a public",
    "http://slow.example/": "OSError: .*",
}


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads = True
        running.handle_error = lambda *args: None  # the visitor has gone
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_port
        running.shutdown()


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.close()


def visit(url: str, port: int, seconds: float) -> tuple[int, int]:
    """In the child: the size of the picture behind a URL."""
    fetch.TIMEOUT = seconds
    asked: list[str] = []

    class PlayedSocket(socket.socket):
        def connect(self, address):
            super().connect(("127.0.0.1", port) if address[0] == "93.184.216.34" else address)

    def played(host, *args, **options):
        asked.append(host)
        if host == "public.example" or (host == "rebinding.example" and asked.count(host) == 1):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]
        if host == "rebinding.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        if host.endswith(".example"):
            raise socket.gaierror("no such host")
        return real(host, *args, **options)

    real, plain = socket.getaddrinfo, socket.socket
    socket.getaddrinfo, fetch.socket.socket = played, PlayedSocket
    try:
        return load_image(url).size
    finally:
        socket.getaddrinfo, fetch.socket.socket = real, plain


@pytest.mark.parametrize("url", CASES)
def test_odd_server(server, child, url):
    given = url.format(host=f"127.0.0.1:{server}", port=server) if "{" in url else url
    given = f"http://127.0.0.1:{server}{given}" if given.startswith("/") else given
    endless = "not finished" in CASES[url]
    start = time.monotonic()
    how, found = child.run(visit, given, server, SECONDS if endless else 20.0)
    assert not endless or time.monotonic() - start < 20 * SECONDS  # on a busy machine
    if how == "returned":
        assert "picture" in CASES[url].split("|"), found
        assert found == (3, 2)
    else:
        assert re.match(CASES[url].removesuffix("|picture"), found, re.DOTALL), found


def test_servers_learn_nothing(server, monkeypatch):
    """No cookie, no token, no name, whatever lies around; and nothing of a proxy's password after a redirect."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("no_proxy", "*")
    Server.seen.clear()
    load_image(f"http://127.0.0.1:{server}/cookie")
    assert [path for path, _ in Server.seen] == ["/cookie", "/picture/after-cookie"]
    for _, headers in Server.seen:
        assert headers.keys() == {"Accept-Encoding", "Host", "User-Agent", "Connection"}
        assert headers["Accept-Encoding"] == "identity"
        assert headers["User-Agent"] == "minivlm"


def test_proxies_get_what_is_theirs(server, monkeypatch):
    """A proxy is asked for the whole URL with its password, which the server behind a redirect does not get."""
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{server}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Server.seen.clear()
    with pytest.raises(OSError, match="404"):  # this server is no proxy
        load_image("http://far.example/picture")
    ((path, headers),) = Server.seen
    assert path == "http://far.example/picture"
    assert headers["Proxy-Authorization"].startswith("Basic ")
    load_image(f"http://127.0.0.1:{server}/picture")
    assert "Proxy-Authorization" not in Server.seen[-1][1]
