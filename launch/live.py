"""Runs as they go: what has changed in a folder of results, and the page of it, served on loopback.

Two addresses are answered, / with the page and /data with what it shows, to whoever asks for this host by a name of
loopback: a page from elsewhere, whose name was made to point here, gets nothing.
"""

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from launch.folder import COMPARISON_FILES, RUN_FILES, under_way
from launch.page import DEEPEST, data_json, find_records, page_html
from parallel.recipe import RecipeError

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # the port may be another one, of a tunnel


def going_on(folder: Path) -> bool:
    """Whether a run or a comparison is under way in `folder` or below it."""
    return any(under_way(each) for each in _folders(folder))


def _folders(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Those below `folder`, and itself, that may be of a run or a comparison."""
    yield folder
    inner: list[Path] = []
    if depth < DEEPEST and not (folder / "steps.jsonl").exists():
        with contextlib.suppress(OSError), os.scandir(folder) as entries:  # it may be gone by now
            inner = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for path in inner:
        yield from _folders(path, depth + 1)


class Results:
    """The records of a folder, read again when something in it has changed, and in at most a tenth of the time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.title = folder, folder.resolve().name or "results"
        self._lock = threading.Lock()  # each question has a thread
        self._stamp: object = None
        self._not_before = 0.0  # by time.monotonic

    def look(self) -> tuple[str, str]:
        """(what changes with the data, the data as JSON)"""
        with self._lock:
            start, stamp = time.monotonic(), [self._stamp_of(each) for each in _folders(self._folder)]
            if stamp != self._stamp and start >= self._not_before:
                self._found = find_records(self._folder)
                self._data = data_json(self.title, self._found, live=True)
                self._tag = hashlib.sha256(self._data.encode()).hexdigest()[:16]
                self._stamp = stamp
                self._not_before = time.monotonic() + 9 * (time.monotonic() - start)  # the runs need the cores
            return f'"{self._tag}"', self._data

    def page(self) -> str:
        self.look()
        return page_html(self.title, self._found, live=True)

    @staticmethod
    def _stamp_of(folder: Path) -> object:
        files = {}
        for name in (*RUN_FILES, *COMPARISON_FILES[:1]):
            with contextlib.suppress(OSError):
                found = (folder / name).stat()
                files[name] = (found.st_ino, found.st_mtime_ns, found.st_size)
        return folder, files, under_way(folder) if files and "record.json" not in files else None


class Server(ThreadingHTTPServer):
    """Serves the page of `folder` on loopback until it is shut down. port: 0 for any. Raises RecipeError."""

    daemon_threads = True

    def __init__(self, folder: Path, *, port: int) -> None:
        self.results = Results(folder)
        try:
            super().__init__((HOST, port), Answer)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "is none"
            raise RecipeError("--port", port, f"cannot be listened on ({reason}); give another, or 0 for any") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a reader that went away
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, _, _ = self.headers.get("Host", "").rpartition(":")
        if (name or self.headers.get("Host")) not in NAMES:
            self.send_error(403, "not by this name")
        elif self.path == "/":
            self._send("text/html", self.server.results.page())
        elif self.path == "/data":
            tag, data = self.server.results.look()
            if self.headers.get("If-None-Match") == tag:
                self._send("application/json", "", code=304, tag=tag)
            else:
                self._send("application/json", data, tag=tag)
        else:
            self.send_error(404, "not here")

    def _send(self, kind: str, text: str, *, code: int = 200, tag: str | None = None) -> None:
        body = text.encode()
        self.send_response(code)
        for key, value in (("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body)))):
            self.send_header(key, value)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """The terminal is for what the user must know."""
