"""As much of a Weights & Biases server as wandb needs to tell it of a run, and to go on with it."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40


class Server(ThreadingHTTPServer):
    """Keeps the lines of files that runs stream to it: it appends, and numbers lines as wandb does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, dict[str, list[str]]] = {}
        self.config: dict[str, Any] = {}
        self.requests = 0
        self.refuses = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """wandb leaves connections as they are when it ends."""

    def history(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.runs[run]["wandb-history.jsonl"]]

    def answer(self, query: str, variables: dict[str, Any]) -> Any:
        name = variables.get("name")
        if "RunResumeStatus" in query:
            return {"model": _PROJECT | {"bucket": self._resume(name) if name in self.runs else None}}
        if "UpsertBucket" in query and name is not None:
            is_new = name not in self.runs
            self.runs.setdefault(name, {})
            if variables.get("config"):
                self.config = json.loads(variables["config"])
            return {"upsertBucket": {"bucket": self._bucket(name), "inserted": is_new}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        for name, part in files.items():
            lines = self.runs.setdefault(run, {}).setdefault(name, [])
            lines[part["offset"] :] = part["content"]

    def _bucket(self, run: str) -> dict[str, Any]:
        count = len(self.runs[run].get("wandb-history.jsonl", []))
        return {"id": run, "name": run, "config": "{}", "project": _PROJECT, "historyLineCount": count}

    def _resume(self, run: str) -> dict[str, Any]:
        files = self.runs[run]
        resume = {
            "summaryMetrics": "".join(files.get("wandb-summary.json", ["{}"])[-1:]),
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": json.dumps({"t": {}}),  # What tells it that the run had begun.
        }
        for kind in ("history", "events"):
            lines = files.get(f"wandb-{kind}.jsonl", [])
            resume |= {f"{kind}LineCount": len(lines), f"{kind}Tail": json.dumps(lines[-1:])}
        return self._bucket(run) | resume


_PROJECT = {"id": "p", "name": "stack", "entity": {"id": "e", "name": "team"}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        server.requests += 1
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            data = gzip.decompress(data)
        body: dict[str, Any] = {}
        with suppress(ValueError):  # An upload, or telemetry.
            body = json.loads(data)
        if server.refuses:
            self._reply({"errors": [{"message": "the key is refused"}]}, 401)
        elif "query" in body:
            self._reply({"data": server.answer(body["query"], body.get("variables") or {})})
        else:
            if "file_stream" in self.path:
                server.stream(self.path.split("/")[-2], body.get("files") or {})
            self._reply({})

    do_GET = do_PUT = do_POST

    def _reply(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, code: Any = None, size: Any = None) -> None:
        """Nobody reads it."""


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
