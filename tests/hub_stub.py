"""A Hugging Face Hub of one process: repositories in memory, and the calls an upload consists of.

``/api/repos/create``, ``/api/validate-yaml`` (of the card), ``…/preupload/…`` (large files go to LFS, as on the Hub),
the list of files (``…/tree/…``), the LFS batch call with its uploads, ``…/commit/…``. Everything else is 404, and every
request is kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_stub"


class Hub:
    """What the stub holds: files by repository and branch, uploaded objects, the requests."""

    def __init__(self):
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.created: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits: list[dict] = []
        self.validated: list[str] = []
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self):
        self._serve(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunked())

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunked()
        self.hub.requests.append(f"PUT {self.path.split('?')[0]}")
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "digest"})
        self.hub.objects[oid] = body
        return self._answer(200, {})

    def do_GET(self):
        path = self.path.split("?")[0]
        self.hub.requests.append(f"GET {path}")
        parts = path.strip("/").split("/")
        if len(parts) == 6 and parts[4] == "tree" and "/".join(parts[2:4]) in self.hub.created:
            files = self.hub.files.get(("/".join(parts[2:4]), parts[5]), {})
            return self._answer(200, [{"type": "file", "path": name, "size": len(content), "oid": "0"}
                                      for name, content in files.items()])
        return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def _serve(self, body):
        path = self.path.split("?")[0]
        self.hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name'].rpartition('/')[2]}"
            self.hub.created[name] = asked
            return self._answer(200, {"url": f"{self.hub.url}/{name}", "id": "1", "name": name})
        if path == "/api/validate-yaml":
            self.hub.validated.append(json.loads(body)["content"])
            front = yaml.safe_load(self.hub.validated[-1].split("---")[1])
            wrong = [{"message": "expected a mapping"}] if not isinstance(front, dict) else []
            return self._answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
        parts = path.strip("/").split("/")
        repository = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2]).removesuffix(".git")
        if repository not in self.hub.created:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if "branch" in parts:
            self.hub.files.setdefault((repository, parts[-1]), {})
            return self._answer(200, {})
        if "preupload" in parts:
            modes = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                      "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            answers = [{**one, "actions": {"upload": {"href": f"{self.hub.url}/put/{one['oid']}"}}} for one in asked]
            return self._answer(200, {"transfer": "basic", "objects": answers}, kind="application/vnd.git-lfs+json")
        if "commit" in parts:
            return self._commit(repository, parts[-1], [json.loads(line) for line in body.splitlines() if line])
        return self._answer(404, {"error": path})

    def _commit(self, repository, branch, lines):
        files = self.hub.files.setdefault((repository, branch), {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repository}/commit/1", "commitOid": "1", "success": True})

    def _chunked(self):
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return body

    def _answer(self, status, value, headers=(), kind="application/json"):
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": kind, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def running_hub():
    """Serve on a free local port while inside; yields the `Hub`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
