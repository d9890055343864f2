"""The few endpoints of the Hugging Face hub that an upload needs, over HTTP, for the hub's own client."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_" + "secretsecret" * 3


class HubServer(ThreadingHTTPServer):
    """repositories: files by name. refused: statuses by a part of a path. asked: methods and paths, as they came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}
        self.asked: list[str] = []
        self.role = "write"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing on standard error."""

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        content = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        for part, status in hub.refused.items():
            if part in path:
                return self.answer(status, {"error": "not today"})
        if path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = sent
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/whoami-v2":
            return self.answer(
                200, {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": hub.role}}}
            )
        if path in ("/api/repos/create", "/api/repos/delete"):
            return self.make_or_remove(json.loads(sent))
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if path.endswith("/objects/batch"):
            oids = [each["oid"] for each in json.loads(sent)["objects"]]
            upload = {oid: {"upload": {"href": f"{hub.address}/large/{oid}"}} for oid in oids}
            return self.answer(200, {"objects": [{"oid": oid, "size": 1, "actions": upload[oid]} for oid in oids]})
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        files = hub.repositories.get(f"{owner}/{name}")
        if files is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if not rest or rest[0] == "revision":
            return self.answer(200, {"id": f"{owner}/{name}", "siblings": [{"rfilename": each} for each in files]})
        if rest[0] == "tree":
            return self.answer(200, [{"type": "file", "path": each, "size": 1, "oid": "0"} for each in files])
        if rest[0] == "preupload":
            mode = {True: "lfs", False: "regular"}
            asked = [each["path"] for each in json.loads(sent)["files"]]
            modes = {each: mode[each.endswith((".safetensors", ".onnx", ".gguf"))] for each in asked}
            answers = [{"path": each, "uploadMode": modes[each], "shouldIgnore": False} for each in asked]
            return self.answer(200, {"files": answers})
        return self.commit(files, sent)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def make_or_remove(self, given: dict[str, Any]) -> None:
        name = f"{given['organization']}/{given['name']}"
        if self.command == "DELETE":
            del self.server.repositories[name]
        else:
            self.server.repositories[name] = {".gitattributes": b""}
            self.server.private[name] = given.get("visibility") == "private"
        self.answer(200, {"url": f"{self.server.address}/{name}", "name": name})

    def commit(self, files: dict[str, bytes], sent: bytes) -> None:
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.answer(200, {"commitUrl": f"{self.server.address}/me/small/commit/1", "commitOid": "1", "success": True})


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """The hub, for a block."""
    with HubServer() as server:
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
