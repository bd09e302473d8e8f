"""Downloads from a server of our own, over https: what arrives, what is refused, and who is not waited for."""

import hashlib
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fusedgpt.data import corpus
from fusedgpt.data import download as module
from fusedgpt.data.corpus import open_corpus
from fusedgpt.data.download import download
from fusedgpt.data.untrusted import InputError, MissingFile

BODY = b"Words. " * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        what, _, value = self.path[1:].partition("/")
        ended = self.server.ended
        if what == "nothing":
            self.send_error(404)
            return
        if what == "trickle-headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            while not ended.wait(0.02):
                self.wfile.write(b"x")
            return
        self.send_response(302 if what == "to" else 200)
        if what == "to":
            self.send_header("Location", value.replace("SERVER", self.server.url))
        elif what == "length":
            self.send_header("Content-Length", value)
        elif what != "unsized":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if what == "trickle":
            while not ended.wait(0.02):
                self.wfile.write(b"x")
        elif what == "silent":
            self.wfile.write(b"xxx")
            ended.wait()
        else:
            self.wfile.write(b"short" if value == "7105" else BODY)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, address):
        """Of clients that go: most of these tests are about them."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the server's certificate")
    file = tmp_path_factory.mktemp("certificate") / "both.pem"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command = ["openssl", *options.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", file, "-out", f"{file}.crt"], check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


@pytest.fixture
def server(certificate, monkeypatch):
    """A server that `Handler` describes; its certificate is known to this process."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url, server.ended = f"https://127.0.0.1:{server.server_port}", threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def dead_url():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"https://127.0.0.1:{unused.getsockname()[1]}/text"


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("path", ["text", "unsized", "to/SERVER/text", "to//text"])
def test_a_download_arrives_whole(server, cache, path):
    download(f"{server.url}/{path}", cache / "a.txt", max_bytes=7000, sha256=hashlib.sha256(BODY).hexdigest())
    assert (cache / "a.txt").read_bytes() == BODY
    assert left(cache) == ["a.txt"]


BAD = {
    "another text": ("text", InputError, "has another sha256 .* put it there .sha256 00ff", "00ff"),
    "too large": ("text", InputError, "more than the 6,999 bytes", None),
    "too large without a size": ("unsized", InputError, "more than the 6,999 bytes", None),
    "more than it says": ("length/10", InputError, "another sha256", "00ff"),
    "less than it says": ("length/7105", MissingFile, "ended after 5 of 7,105 bytes", None),
    "size in words": ("length/abc", InputError, "Content-Length is 'abc', which is no size", None),
    "negative size": ("length/-1", InputError, "Content-Length is '-1'", None),
    "Arabic size": ("length/%D9%A3", InputError, "Content-Length is ", None),
    "absurd size": ("length/" + "9" * 5000, InputError, "Content-Length is '999", None),
    "not there": ("nothing", MissingFile, "could not be downloaded from .*404", None),
    "to http": (
        "to/http://127.0.0.1/text",
        InputError,
        "http://127.0.0.1/text: downloads take https only",
        None,
    ),
    "to ftp": (
        "to/ftp://127.0.0.1/text",
        InputError,
        "ftp://127.0.0.1/text: downloads take https only",
        None,
    ),
    "to a file": (
        "to/file:///etc/passwd",
        InputError,
        "could not be downloaded.*file:///etc/passwd.* not allowed",
        None,
    ),
    "round and round": ("to/SERVER/to/", MissingFile, "could not be downloaded", None),
    "to nonsense": ("to/https://[::bad", MissingFile, "could not be downloaded", None),
    "silent": ("silent", MissingFile, "nothing came for 0 s|timed out", None),
    "slow": ("trickle", MissingFile, "took more than 1 s", None),
    "slow headers": ("trickle-headers", MissingFile, "took more than 1 s", None),
}


@pytest.mark.parametrize(("path", "kind", "message", "sha256"), BAD.values(), ids=BAD)
def test_a_bad_download_leaves_nothing(server, cache, monkeypatch, path, kind, message, sha256):
    monkeypatch.setattr(module, "STALL", 0.3 if path == "silent" else 30)
    monkeypatch.setattr(module, "SPARE", 0.6 if "trickle" in path else 60)
    limit = 6999 if "6,999" in message else 7200
    with pytest.raises(kind, match=message) as caught:
        download(f"{server.url}/{path}", cache / "a.txt", max_bytes=limit, sha256=sha256)
    assert left(cache) == []
    assert len(str(caught.value)) <= 400
    assert str(caught.value).isprintable()


def test_what_is_not_https_is_not_asked(cache):
    for url in ("http://127.0.0.1/text", "ftp://127.0.0.1/text", "file:///etc/passwd", "/etc/passwd"):
        with pytest.raises(InputError, match="downloads take https only"):
            download(url, cache / "a.txt", max_bytes=7000)
    assert left(cache) == []


def test_a_server_without_a_known_certificate_is_refused(server, cache, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(MissingFile, match="CERTIFICATE_VERIFY_FAILED"):
        download(f"{server.url}/text", cache / "a.txt", max_bytes=7000)


def test_nobody_is_left_behind_by_a_server_that_goes_on_sending(server, cache, monkeypatch):
    monkeypatch.setattr(module, "STALL", 0.2)
    monkeypatch.setattr(module, "SPARE", 0.3)
    with pytest.raises(MissingFile, match="took more than"):
        download(f"{server.url}/trickle", cache / "a.txt", max_bytes=7000)
    end = time.monotonic() + 20
    while any(thread.name == "download" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_download_that_fails_its_check_leaves_nothing(server, cache):
    def check(path):
        assert path.read_bytes() == BODY
        raise InputError(path, "not what was wanted", "look elsewhere")

    with pytest.raises(InputError, match=r"/text: not what was wanted; look elsewhere"):
        download(f"{server.url}/text", cache / "a.txt", max_bytes=7000, check=check)
    assert left(cache) == []


def test_a_download_larger_than_the_disk_is_refused(server, cache, monkeypatch):
    usage = __import__("collections").namedtuple("usage", "total used free")(10000, 5000, 5000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"0\.0 GB to download, 0\.0 GB free; set FUSEDGPT_CACHE"):
        download(f"{server.url}/text", cache / "a.txt", max_bytes=7000)
    assert left(cache) == []


def test_without_a_network_the_error_says_where_the_file_goes(dead_url, cache, monkeypatch):
    known = corpus._Download(dead_url, 4, hashlib.sha256(b"text").hexdigest())
    monkeypatch.setitem(corpus._DOWNLOADS, "the-verdict", known)
    with pytest.raises(MissingFile) as raised:
        open_corpus("the-verdict")
    where = cache / "the-verdict.txt"
    assert f"{where}: could not be downloaded from {dead_url}" in str(raised.value)
    assert f"put it there (sha256 {known.sha256}), or use --data FILE" in str(raised.value)

    where.write_text("text")  # and that is what makes it work
    assert "".join(open_corpus("the-verdict", 0.5).train_texts()) == "te"
    where.write_text("other")
    with pytest.raises(ValueError, match="not the the-verdict that is known here"):
        open_corpus("the-verdict")


def test_a_named_text_is_downloaded_once(server, cache, monkeypatch):
    known = corpus._Download(f"{server.url}/text", len(BODY), hashlib.sha256(BODY).hexdigest())
    monkeypatch.setitem(corpus._DOWNLOADS, "tinyshakespeare", known)
    first = open_corpus("tinyshakespeare")
    monkeypatch.setattr(corpus, "download", None)
    again = open_corpus("tinyshakespeare")
    assert first.fingerprint == again.fingerprint
    assert "".join([*again.train_texts(), *again.val_texts()]) == BODY.decode()
