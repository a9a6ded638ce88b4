"""The routes of the Hugging Face hub that publishing and opening use, on the loopback address."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_that_may_write"
Files = dict[str, bytes]
REPOSITORY = r"(?:/api)?/datasets/(?P<name>[^/]+/[^/.]+)"


@dataclass
class Hub:
    """Repositories: name → commits, each (sha, files), the newest last."""

    repositories: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)
    large: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    damaged: str | None = None
    """A file whose last byte changes on the way."""
    licences = ("other", "cc-by-4.0")

    def commit(self, name: str, files: Files) -> str:
        """Make this the content of the repository; returns the commit."""
        commits = self.repositories.setdefault(name, [])
        listed = repr((name, len(commits), sorted(files.items())))
        commits.append((hashlib.sha1(listed.encode()).hexdigest(), dict(files)))
        return commits[-1][0]

    def at(self, name: str, revision: str) -> tuple[str, Files] | None:
        commits = self.repositories[name]
        found = commits[-1:] if revision == "main" else [c for c in commits if c[0] == revision]
        return found[0] if found else None


def serve(hub: Hub) -> ThreadingHTTPServer:
    """A server on a free port; it runs when somebody calls serve_forever."""
    return ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Answer,), {"hub": hub}))


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if self.command in ("POST", "PUT") and given is None and "/large/" not in path:
            return self.refuse(401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if found := re.fullmatch("/large/(.*)", path):
            self.hub.large[found[1]] = body
            return self.send(b"")
        if (found := re.match(REPOSITORY, path)) is None:
            return self.refuse(404)
        if (name := found["name"]) not in self.hub.repositories:
            return self.refuse(404 if given else 401, "RepoNotFound")
        return self.in_repository(name, path[found.end() :], body)

    def in_repository(self, name: str, path: str, body: bytes) -> None:
        if path == ".git/info/lfs/objects/batch":
            return self.batch(json.loads(body))
        if path.startswith("/preupload/"):
            files = [
                {"path": each["path"], "uploadMode": mode(each["path"]), "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self.tell({"files": files})
        if path.startswith("/commit/"):
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        kind, _, rest = path.removeprefix("/").partition("/")
        revision, _, file = rest.partition("/")
        if (found := self.hub.at(name, revision or "main")) is None:
            return self.refuse(404, "RevisionNotFound")
        sha, files = found
        if kind == "tree":
            return self.tell([entry(to, data) for to, data in files.items()])
        if kind == "resolve":
            if file not in files:
                return self.refuse(404, "EntryNotFound", commit=sha)
            data = files[file]
            etag = entry(file, data)["lfs"]["oid"] if mode(file) == "lfs" else git_hash(data)
            if file == self.hub.damaged:
                data = data[:-1] + b"?"
            return self.send(data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        return self.tell({"id": name, "sha": sha, "siblings": [{"rfilename": to} for to in files]})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = f"http://{self.headers['Host']}/datasets/{name}"
        if asked["organization"] != "me":
            return self.refuse(403, message="You don't have the rights to create it")
        if name in self.hub.repositories:
            return self.refuse(409)
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(name)
        self.hub.commit(name, {".gitattributes": b"*.png filter=lfs\n"})
        return self.tell({"url": url})

    def validate(self, card: str) -> None:
        found = re.search('^license: "(.*)"$', card, re.M)
        wrong = found is not None and found[1] not in self.hub.licences
        errors = [{"message": '"license" must be one of'}] if wrong else []
        return self.tell({"errors": errors, "warnings": []}, 400 if wrong else 200)

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            place = {"href": f"http://{self.headers['Host']}/large/{each['oid']}"}
            objects.append({**each, "actions": {"upload": place}})
        return self.tell({"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        sha, before = self.hub.repositories[name][-1]
        if lines[0]["value"].get("parentCommit", sha) != sha:
            return self.refuse(412)
        files = dict(before)
        for line in lines[1:]:
            told = line["value"]
            match line["key"]:
                case "file":
                    files[told["path"]] = b64decode(told["content"])
                case "lfsFile":
                    files[told["path"]] = self.hub.large[told["oid"]]
                case "deletedFile":
                    del files[told["path"]]
        sha = self.hub.commit(name, files)
        url = f"http://{self.headers['Host']}/datasets/{name}/commit/{sha}"
        return self.tell({"commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    def tell(self, value: Any, status: int = 200) -> None:
        kind = {"Content-Type": "application/json"}
        self.send(json.dumps(value).encode(), kind, status)

    def refuse(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.send(b"{}", {key: value for key, value in told.items() if value}, status)

    def send(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def mode(path: str) -> str:
    return "lfs" if path.endswith((".png", ".safetensors")) else "regular"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    told = {"type": "file", "path": path, "oid": git_hash(data), "size": len(data)}
    if mode(path) == "lfs":
        oid = hashlib.sha256(data).hexdigest()
        told["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return told
