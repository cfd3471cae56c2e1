"""Web servers on the loopback interface: a package index and a model hub, from folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Answer = tuple[int, dict[str, str], bytes]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(answer: Callable[[str], Answer], *, cut: bool = False) -> Iterator[str]:
    """Serve until the block ends.

    Args:
        answer: path → status, headers, body.
        cut: promise the whole body, send half of it and hang up.

    Yields:
        The server's address.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_answer(with_body=False)

        def do_GET(self) -> None:
            self.send_answer(with_body=True)

        def send_answer(self, *, with_body: bool) -> None:
            status, headers, body = answer(self.path.partition("?")[0])
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                cut_here = cut and len(body) > 1000
                self.wfile.write(body[: len(body) // 2] if cut_here else body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its caller's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def package_index(name: str, wheel: str, content: bytes) -> Callable[[str], Answer]:
    """An index with one package of one wheel."""
    page = f'<!DOCTYPE html><html><body><a href="/files/{wheel}">{wheel}</a></body></html>'

    def answer(path: str) -> Answer:
        if path == f"/simple/{name}/":
            return 200, {"Content-Type": "text/html"}, page.encode()
        if path == f"/files/{wheel}":
            return 200, {"Content-Type": "application/octet-stream"}, content
        return 404, {}, b""

    return answer


def model_hub(repo: str, folder: Path) -> Callable[[str], Answer]:
    """A hub with one model of revisions `main` and `v1`; `secret/...` needs a login."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}

    def answer(path: str) -> Answer:
        if "/secret/" in path:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if path.startswith(f"/api/models/{repo}/tree/"):
            return 200, _JSON, json.dumps([_entry(*item) for item in files.items()]).encode()
        info_at = [f"/api/models/{repo}{end}" for end in ("", "/revision/main", "/revision/v1")]
        if path in info_at:
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings}
            return 200, _JSON, json.dumps(info).encode()
        if path.startswith(f"/api/models/{repo}/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        content = files.get(path.removeprefix(f"/{repo}/resolve/{COMMIT}/"))
        if content is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return 200, {"ETag": _digest(content), "X-Repo-Commit": COMMIT}, content

    return answer


_JSON = {"Content-Type": "application/json"}


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
