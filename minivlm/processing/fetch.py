"""Downloads images from URLs, only where a call or a prompt names one, and trusts nothing that comes back.

- http and https, to the address the caller names, private networks included: images often lie on one's own server.
  Link-local addresses and KEYS, where clouds serve credentials, are refused.
- At most REDIRECTS redirects, none from https to http, none from a public address into a private network.
- At most TIMEOUT seconds in all and MAX_DOWNLOAD bytes; nothing is decompressed. The format is found by decoding; the
  server's content type is ignored.
- No name, password, cookie or token is sent; a URL that contains a password is refused. Proxies come from the
  environment; addresses that a proxy connects to are not checked.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import threading
import time
import urllib.parse
import urllib.request
from functools import partial
from typing import Any

from minivlm.text.shown import printable

MAX_DOWNLOAD = 32 * 2**20  # bytes
TIMEOUT = 20.0  # seconds
REDIRECTS = 5
KEYS = {ipaddress.ip_address(a) for a in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")}  # AWS, Alibaba, Oracle
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str) -> bytes:
    """The bytes of an http(s) or data: URL. ValueError for any other URL, OSError if it cannot be fetched."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        return _from_data_url(rest)
    if scheme.lower() not in ("http", "https"):
        raise ValueError(f"only http:// and https:// URLs are fetched, found {url[:60]!r}; a file is named by its path")
    visit = _Visit()
    try:
        return visit.get(url)
    except Exception as error:  # urllib, http.client, ssl and codecs each raise their own
        reason = f"not finished after {TIMEOUT:g} s" if visit.remaining() <= 0 else printable(str(error), 200)
        raise OSError(f"could not fetch {shown(url)} ({reason}); download it yourself and pass the file") from error
    finally:
        visit.end()


def shown(url: str) -> str:
    """A URL for errors: short, and without a password."""
    scheme, slashes, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}"[:200]


def _from_data_url(rest: str) -> bytes:
    """The bytes in a data: URL, given without its "data:"."""
    header, _, payload = rest.partition(",")
    if not header.lower().endswith(";base64") or len(payload) > MAX_DOWNLOAD * 4 // 3 + 4:
        raise ValueError(f"a data: URL holds base64 of at most {MAX_DOWNLOAD // 2**20} MiB, found {header[:60]!r}")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data: URL is not valid base64: {error}") from error


class _Visit:
    """One URL and its redirects: the time left, whether the last server was public, the open connections."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + TIMEOUT
        self._public = False  # whether the last server was outside private networks
        self._open: list[socket.socket] = []
        self._timer = threading.Timer(TIMEOUT, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def remaining(self) -> float:
        return self._deadline - time.monotonic()

    def end(self) -> None:
        self._timer.cancel()
        for connection in self._open:
            connection.close()

    def _cut(self) -> None:
        """Time is up: close the connections, so that reads from a slow server end."""
        for connection in self._open:
            with contextlib.suppress(OSError):  # already closed
                connection.shutdown(socket.SHUT_RDWR)

    def get(self, url: str) -> bytes:
        """Download an http(s) URL, following redirects."""
        opener = urllib.request.OpenerDirector()  # with no handler of files, FTP, errors or redirects
        http_handler, https_handler = urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()
        http_handler.http_open = partial(_open, http_handler, self, http.client.HTTPConnection)
        https_handler.https_open = partial(_open, https_handler, self, http.client.HTTPSConnection)
        for handler in (http_handler, https_handler, urllib.request.ProxyHandler()):
            opener.add_handler(handler)
        for _ in range(REDIRECTS + 1):
            url = _cleaned(url)
            request = urllib.request.Request(url, headers={"User-Agent": "minivlm"})
            with opener.open(request, timeout=max(0.001, self.remaining())) as response:
                if response.status >= 400:
                    raise OSError(f"HTTP Error {response.status}: {response.reason}")
                if response.status < 300:
                    return self._body(response)
                url = _redirected(url, response.headers.get("Location"))
        raise ValueError(f"more than {REDIRECTS} redirects")

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        body = bytearray()
        while chunk := response.read1(2**16):
            body += chunk
            if len(body) > MAX_DOWNLOAD:
                raise ValueError(f"more than {MAX_DOWNLOAD // 2**20} MiB")
        if self.remaining() <= 0:
            raise TimeoutError  # the body is incomplete: the connection was cut
        return bytes(body)

    def connect(self, host: str, port: int, direct: bool) -> socket.socket:
        """A connection to the first address that accepts one. Not `direct`: to a proxy."""
        problem: Exception = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if direct:  # checked here, because a second DNS lookup may give another address
                self._check(ipaddress.ip_address(address[0].partition("%")[0]))
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(max(0.001, self.remaining()))
            try:
                connection.connect(address)
            except OSError as error:
                connection.close()
                problem = error
                continue
            self._open.append(connection.dup())  # TLS will wrap the other one
            return connection
        raise problem

    def _check(self, address: Any) -> None:
        if address in NAT64:
            address = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
        address = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if address.is_link_local or address in KEYS:
            raise ValueError(f"{address} is a link-local address or one of a cloud's keys, where no images are")
        if self._public and not address.is_global:
            raise ValueError(f"redirected from a public address to {address}, in a private network")
        self._public = address.is_global


def _cleaned(url: str) -> str:
    """The URL in ASCII, as browsers send it. ValueError if it names a user, or no host."""
    parts = urllib.parse.urlsplit(url.strip())
    if "@" in parts.netloc:
        raise ValueError("it holds a user's name or password, which would be sent on")
    if not parts.hostname:
        raise ValueError("it names no host")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (urllib.parse.quote(part, safe="%/:;=&+$,!~*'()?@-._[]|") for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def _redirected(url: str, location: str | None) -> str:
    """The target of a redirect. ValueError for another scheme, http after https included."""
    if not location:
        raise ValueError("a redirect that leads nowhere")
    new = urllib.parse.urljoin(url, location)
    scheme = urllib.parse.urlsplit(new).scheme
    if scheme not in ("http", "https") or (url.startswith("https:") and scheme == "http"):
        raise ValueError(f"redirected to {shown(new)[:60]!r}, which is not http or https, or no longer https")
    return new


def _open(handler: Any, visit: _Visit, kind: type, request: urllib.request.Request) -> http.client.HTTPResponse:
    """As urllib's handlers do, but with the visit's own connection; TLS certificates are checked."""
    direct = request.host == urllib.parse.urlsplit(request.full_url).netloc  # else the host is the proxy's

    def connection(host: str, **options: Any) -> http.client.HTTPConnection:
        made = kind(host, **options)
        made._create_connection = lambda address, *_: visit.connect(*address, direct)
        return made

    return handler.do_open(connection, request)
