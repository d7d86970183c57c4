"""A server that stands in for the Hub of Hugging Face: one dataset, `me/some`, at one commit."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(files: dict[str, bytes], home: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serves these files; the environment in which the library asks for them, and the paths it asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            api, files_at = "/api/datasets/me/some", f"/datasets/me/some/resolve/{COMMIT}/"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                names = [{"rfilename": name} for name in files]
                self._json({"id": "me/some", "sha": COMMIT, "siblings": names, "tags": [], "private": False})
            elif path.startswith(f"{api}/tree/{COMMIT}"):
                folder = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
                self._json(entries(folder))
            elif path.removeprefix(files_at) in files:
                self._file(files[path.removeprefix(files_at)])
            else:
                self._send(
                    404, b"not found", {"X-Error-Code": "RepoNotFound" if "api" in path else "EntryNotFound"}
                )

        do_HEAD = do_GET

        def _file(self, content: bytes) -> None:
            about = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            span = self.headers.get("Range")
            if not span:
                return self._send(200, content, about)
            start, _, end = span.removeprefix("bytes=").partition("-")
            part = content[int(start) : int(end or len(content)) + 1]
            where = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
            return self._send(206, part, about | {"Content-Range": where})

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def entries(folder: str) -> list[dict[str, Any]]:
        inside = [name for name in files if not folder or name.startswith(f"{folder}/")]
        below = {name.removeprefix(f"{folder}/").partition("/")[0] for name in inside}
        paths = [f"{folder}/{name}" if folder else name for name in sorted(below)]
        return [
            {"type": "file", "path": path, "size": len(files[path]), "oid": "0"}
            if path in files
            else {"type": "directory", "path": path, "size": 0, "oid": "0"}
            for path in paths
        ]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home)}, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
