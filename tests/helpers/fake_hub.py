"""A small server that speaks as much of the Hugging Face Hub's language as uploads and downloads need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

import yaml

COMMIT = "c" * 40


@dataclass
class Hub:
    """Its address, what it holds, and what was asked of it.

    Attributes:
        files: contents of files by repository and name.
        private: repositories that were made as private ones.
        tokens: what callers said who they are.
    """

    address: str
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by their SHA-256


class _Server(ThreadingHTTPServer):
    hub: Hub


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for pattern, answer in ANSWERS.items():
            if found := re.fullmatch(pattern, path):
                self._answer(answer(self.server.hub, found[1] if found.groups() else "", body))
                return
        self._answer({"error": f"no such place: {path}"}, 404)

    def do_PUT(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(body).hexdigest()
        assert path == f"/objects/{digest}"
        self.server.hub.objects[digest] = body
        self._answer({})

    def do_GET(self) -> None:
        found = re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", self._path())
        held = self.server.hub.files
        content = held.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            code = "EntryNotFound" if found and found[1] in held else "RepoNotFound"
            self._answer({"error": "not found"}, 404, X_Error_Code=code)
        else:
            self._answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def _path(self) -> str:
        path = urlparse(self.path).path
        self.server.hub.requests.append(f"{self.command} {path}")
        self.server.hub.tokens.add(self.headers.get("Authorization", ""))
        return path

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        is_raw = isinstance(content, bytes)
        data = content if is_raw else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_raw else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _create(hub: Hub, _: str, body: bytes) -> dict[str, Any]:
    asked = json.loads(body)
    name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
    hub.files.setdefault(name, {})
    if asked.get("private") or asked.get("visibility") == "private":
        hub.private.add(name)
    return {"url": f"{hub.address}/{name}", "name": name}


def _validate(_hub: Hub, _: str, body: bytes) -> dict[str, Any]:
    front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
    return {"errors": [] if isinstance(front, dict) else [{"message": "no front matter"}], "warnings": []}


def _preupload(_hub: Hub, _: str, body: bytes) -> dict[str, Any]:
    names = [file["path"] for file in json.loads(body)["files"]]
    modes = {name: "lfs" if name.endswith(".pt") else "regular" for name in names}
    return {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}


def _batch(hub: Hub, _: str, body: bytes) -> dict[str, Any]:
    objects = [
        {**one, "actions": {"upload": {"href": f"{hub.address}/objects/{one['oid']}"}}}
        for one in json.loads(body)["objects"]
    ]
    return {"transfer": "basic", "objects": objects}


def _commit(hub: Hub, name: str, body: bytes) -> dict[str, Any]:
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            hub.files[name][value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            hub.files[name][value["path"]] = hub.objects[value["oid"]]
    return {"commitUrl": f"{hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}


ANSWERS: dict[str, Callable[[Hub, str, bytes], dict[str, Any]]] = {
    "/api/repos/create": _create,
    "/api/validate-yaml": _validate,
    "/api/models/(.+)/preupload/main": _preupload,
    r"/(.+)\.git/info/lfs/objects/batch": _batch,
    "/api/models/(.+)/commit/main": _commit,
}


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Serve on a free port of this machine until the end of the block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
