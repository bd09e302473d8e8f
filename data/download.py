"""Downloads: over https only, limited in size and time, and on disk only when complete and verified."""

import hashlib
import queue
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import make_folder, replacing
from .untrusted import InputError, MissingFile, reason

STALL = 30.0  # seconds without a byte
SLOWEST = 50_000  # bytes a second, on the whole
SPARE = 60.0  # seconds for connecting and redirects


def download(
    url: str,
    path: Path,
    max_bytes: int,
    sha256: str | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Download `url` to `path`, which appears only when complete and verified.

    Progress is shown on a terminal. Several processes may do this at once.

    Args:
        url: https, as everything that it redirects to must be.
        path: of the file; its folder is created.
        max_bytes: that it may have.
        sha256: that it must have.
        check: raises InputError where the file that it gets is not what was wanted.

    Raises:
        MissingFile: no network, no such file there, no byte for `STALL` seconds, or slower than `SLOWEST`; it says where
            to put the file by hand.
        InputError: the file is too large, or another.
        OSError: it cannot be written.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    make_folder(path.parent)
    digest, size = hashlib.sha256(), 0
    by_hand = f"put it there{f' (sha256 {sha256})' if sha256 else ''}, or use --data FILE"
    too_large = InputError(path, f"{url} has more than the {max_bytes:,} bytes that it may have", by_hand)
    with (
        replacing(path) as file,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        try:
            blocks = _received(url, SPARE + max_bytes / SLOWEST)
            promised = _length(url, next(blocks)["Content-Length"])
            if promised > max_bytes:
                raise too_large
            if promised > (free := shutil.disk_usage(path.parent).free):
                what = f"{promised / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free"
                raise InputError(path.parent, what, "set FUSEDGPT_CACHE to a folder on a larger disk")
            task = progress.add_task(path.name, total=promised or None)
            for block in blocks:
                size += len(block)
                if size > max_bytes:
                    raise too_large
                file.write(block)
                digest.update(block)
                progress.advance(task, len(block))
            if size < promised:
                raise ConnectionError(f"the connection ended after {size:,} of {promised:,} bytes")
        except (ConnectionError, TimeoutError) as error:
            raise MissingFile(path, f"could not be downloaded from {url} ({error})", by_hand) from None
        if sha256 and digest.hexdigest() != sha256:
            what = f"what came from {url} has another sha256 ({digest.hexdigest()[:16]}...)"
            raise InputError(path, what, by_hand)
        if check:
            file.flush()
            try:
                check(Path(file.name))
            except InputError as error:
                raise InputError(url, error.what, error.remedy) from None


def _length(url: str, header: str | None) -> int:
    """The number of bytes that a response promises; 0 where it promises none."""
    if header is None:
        return 0
    if not (header.isascii() and header.isdigit() and len(header) < 20):
        raise InputError(url, f"its Content-Length is {header!r}, which is no size", "try again later")
    return int(header)


def _received(url: str, limit: float) -> Iterator[Any]:
    """The response's headers, then its blocks. A thread reads, so that no server can make anybody wait longer than
    `STALL` seconds for a block and `limit` seconds in all, however slowly it sends."""
    blocks: queue.Queue[Any] = queue.Queue(maxsize=16)
    end = time.monotonic() + limit
    threading.Thread(target=_receive, args=(url, blocks), daemon=True, name="download").start()
    while True:
        left = end - time.monotonic()
        try:
            block = blocks.get(timeout=max(0, min(STALL, left)))
        except queue.Empty:
            why = f"nothing came for {STALL:.0f} s" if left > STALL else f"it took more than {limit:,.0f} s"
            raise TimeoutError(why) from None
        if isinstance(block, BaseException):
            raise block
        if block == b"":
            return
        yield block


def _receive(url: str, blocks: "queue.Queue[Any]") -> None:
    with suppress(queue.Full):  # nobody takes them any more
        blocks.put(_answer(url, blocks), timeout=STALL)


def _answer(url: str, blocks: "queue.Queue[Any]") -> Any:
    """Put headers and blocks into the queue; returns the last entry: no more bytes, or an error."""
    try:
        _require_https(url)
        with urllib.request.build_opener(_HttpsOnly).open(url, timeout=STALL) as response:
            blocks.put(response.headers, timeout=STALL)
            while block := response.read1(1 << 18):
                blocks.put(block, timeout=STALL)
        return b""
    except (InputError, queue.Full) as error:
        return error
    except Exception as error:  # of sockets, TLS, HTTP or a URL: all are the network's
        return ConnectionError(reason(error))


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise InputError(url, "downloads take https only", "fetch the file yourself, or use --data FILE")
