"""A hub on this machine for huggingface_hub's real client: it serves what it is given and fails as it is told."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback_server import Fault, LoopbackServer, QuietHandler, next_fault

Content = bytes | Path


@dataclass
class Repository:
    """One repository with one commit and the branches that point to it."""

    files: Mapping[str, Content]
    commit: str
    branches: tuple[str, ...]
    gated: bool = False
    private: bool = False
    lfs: bool = True


@dataclass(kw_only=True)
class HubFault(Fault):
    """What else goes wrong with a file."""

    cut_after: int | None = None  # bytes of the body after which the connection is closed
    short: int = 0  # bytes that are left out of the range, honestly declared
    longer: int = 0  # bytes that are sent on top, honestly declared
    ignore_range: bool = False
    shift: int = 0  # bytes by which another range is sent
    drip: float = 0.0  # seconds after each byte of the body
    trickle: float = 0.0  # seconds after each byte of header lines that do not end


class LoopbackHub:
    """Serves repositories under `endpoint`; redirects files to a second address if `redirect` is set, as a CDN does."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[HubFault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.good_token = "hf_good"
        self.redirect = False
        self.signature = 0  # what a signed address must carry
        self.body_bytes = 0
        self.wire_bytes = 0  # with status lines and headers
        self.lock = threading.Lock()
        self._servers = [LoopbackServer(_Handler, self), LoopbackServer(_Handler, self)]
        self.endpoint, self.cdn = (server.address for server in self._servers)

    def add(self, name: str, files: Mapping[str, Content], branches: tuple[str, ...] = ("main",), **how: Any) -> str:
        """Publishes a repository; returns its commit sha."""
        commit = hashlib.sha1(f"{name}{sorted(files)}".encode()).hexdigest()
        self.repositories[name] = Repository(files, commit, branches, **how)
        return commit

    def add_directory(self, name: str, directory: Path, **how: Any) -> str:
        """Publishes the files of a directory."""
        return self.add(name, {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}, **how)

    def fail(self, where: str, **how: Any) -> None:
        """Lets requests fail, see HubFault."""
        self.faults.append(HubFault(where=where, **how))

    def seen(self, part: str, method: str = "GET") -> list[dict[str, str]]:
        """The headers of the requests whose address contains `part`."""
        return [headers for verb, path, headers in self.requests if verb == method and part in path]

    def close(self) -> None:
        """Ends both servers."""
        for server in self._servers:
            server.close()


class _Handler(QuietHandler):
    @property
    def hub(self) -> LoopbackHub:
        hub: LoopbackHub = self.server.owner
        return hub

    def flush_headers(self) -> None:
        with self.hub.lock:
            self.hub.wire_bytes += len(b"".join(self._headers_buffer))  # type: ignore[attr-defined]
        super().flush_headers()

    def do_GET(self) -> None:  # noqa: N802
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, self.lower_headers()))
            fault = next_fault(self.hub.faults, self.path) or HubFault()
        self.drip = fault.drip
        if fault.trickle:
            self.trickle(fault.trickle)
        elif not self.fails(fault):
            self.route(fault)

    do_HEAD = do_GET  # noqa: N815

    def route(self, fault: HubFault) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        query = parse_qs(parts.query)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.describe(found[1], found[2] or "main", "blobs" in query)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self.list_tree(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[2], found[3], fault)
        elif found := re.fullmatch(r"/cdn/(\d+)/([^/]+/[^/]+)/([^/]+)", path):
            if int(found[1]) != self.hub.signature:
                self.answer(403, b"<Error>expired</Error>", {"content-type": "application/xml"})
            else:
                self.send_file(self.hub.repositories[found[2]], found[3], fault)
        else:
            self.refuse(404, "NotFound", "no such page")

    def repository(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.is_authorized()):
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in (repository.commit, *repository.branches):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def is_authorized(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.good_token}"

    def describe(self, name: str, revision: str, blobs: bool) -> None:
        repository = self.repository(name, revision)
        if repository is None:
            return
        siblings: list[dict[str, Any]] = [{"rfilename": file} for file in repository.files]
        for sibling in siblings if blobs else []:
            content = repository.files[sibling["rfilename"]]
            sibling |= {"size": size_of(content), "blobId": blob_of(content)}
            if repository.lfs and not sibling["rfilename"].endswith(".json"):
                sibling["lfs"] = {"sha256": sha256_of(content), "size": size_of(content), "pointerSize": 135}
        answer = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings, "tags": []}
        self.answer(200, json.dumps(answer).encode())

    def list_tree(self, name: str, revision: str) -> None:
        repository = self.repository(name, revision)
        if repository is not None:
            files = repository.files.items()
            tree = [{"type": "file", "path": path, "size": size_of(file), "oid": blob_of(file)} for path, file in files]
            self.answer(200, json.dumps(tree).encode())

    def resolve(self, name: str, revision: str, file: str, fault: HubFault) -> None:
        repository = self.repository(name, revision)
        if repository is None:
            return
        if repository.gated and not self.is_authorized():
            status = 403 if "authorization" in self.headers else 401
            self.refuse(status, "GatedRepo", f"Access to model {name} is restricted")
        elif file not in repository.files:
            self.refuse(404, "EntryNotFound", "Entry not found", {"x-repo-commit": repository.commit})
        elif self.hub.redirect and self.command == "GET":
            self.answer(302, b"", {"location": f"{self.hub.cdn}/cdn/{self.hub.signature}/{name}/{file}"})
        else:
            self.send_file(repository, file, fault)

    def send_file(self, repository: Repository, file: str, fault: HubFault) -> None:
        content = repository.files[file]
        size = size_of(content)
        digest = sha256_of(content) if repository.lfs else "0" * 40
        headers = {"etag": f'"{digest}"', "x-repo-commit": repository.commit, "accept-ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        start, stop, status = 0, size, 200
        if asked and not fault.ignore_range:
            start, stop, status = int(asked[1]), min(int(asked[2]) + 1, size), 206
            if start >= size:
                self.answer(416, b"", {"content-range": f"bytes */{size}"})
                return
            start, stop = start + fault.shift, stop + fault.shift - fault.short
            headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(stop - start + fault.longer))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = stop if fault.cut_after is None else min(stop, start + fault.cut_after)
        self.send_bytes(content, start, cut)
        self.send_bytes(bytes(fault.longer), 0, fault.longer)
        self.close_connection = self.close_connection or cut < stop

    def send_bytes(self, content: Content, start: int, stop: int) -> None:
        if isinstance(content, bytes):
            self.write(content[start:stop])
            return
        with content.open("rb") as opened:
            opened.seek(start)
            while start < stop:
                start += self.write(opened.read(min(1 << 20, stop - start)))

    def trickle(self, pause: float) -> None:
        """Begins an answer, and never comes to its body. Ends after some thousand bytes, or when the client does."""
        self.close_connection = True
        for byte in b"HTTP/1.1 200 OK\r\nx-long: " + bytes(5000).replace(b"\0", b"a"):
            self.wfile.write(bytes([byte]))
            sleep(pause)

    def write(self, piece: bytes) -> int:
        if self.drip:
            for byte in piece:
                self.wfile.write(bytes([byte]))
                sleep(self.drip)
        else:
            super().write(piece)
        with self.hub.lock:
            self.hub.body_bytes += len(piece)
            self.hub.wire_bytes += len(piece)
        return len(piece)

    def refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        reason = {"x-error-code": code, "x-error-message": message, **(headers or {})}
        self.answer(status, json.dumps({"error": message}).encode(), reason)


def size_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def sha256_of(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    if content.stat().st_blocks * 512 < content.stat().st_size // 2:  # sparse: too large to hash, its name will do
        return hashlib.sha256(str(content).encode()).hexdigest()
    with content.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def blob_of(content: Content) -> str:
    """The id of a small file in git. That of a large one, in git LFS, would be the id of its pointer."""
    if size_of(content) > 1 << 20:
        return "0" * 40
    text = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
