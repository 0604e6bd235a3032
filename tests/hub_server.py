"""A hub of one repository on this machine, for tests of what downloads from it.

Speaks what huggingface_hub speaks: the model's metadata with sizes and checksums, HEAD and GET of
`resolve` addresses with ranges; files of LFS are redirected to another host name, as the
hub redirects to its CDN. Its faults are switched on by attributes.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21"


@dataclass
class HubServer:
    """The repository, its faults, and what was asked of it."""

    files: dict[str, bytes]
    repo_id: str = "black-forest-labs/FLUX.1-dev"
    valid_tokens: tuple[str, ...] = ("hf_good", "hf_no_licence")
    gated_for: tuple[str | None, ...] = (None, "hf_no_licence")
    """Tokens (None: without one) that may list the repository and not read it."""
    cut_once: dict[str, int] = field(default_factory=dict)
    """The connection is dropped at this byte of the file, the first time it is asked for."""
    stall_at: dict[str, int] = field(default_factory=dict)
    """Nothing more is sent from this byte on; the connection stays open."""
    corrupt: set[str] = field(default_factory=set)
    api_says: tuple[int, bytes] | None = None
    """Status and body instead of metadata."""
    address: str = ""
    served: Counter[str] = field(default_factory=Counter)
    """Bytes sent of each file's content."""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, token) of each request."""
    stalled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def is_lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin"))

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()

    def blob_id(self, name: str) -> str:
        content = self.files[name]
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def metadata(self) -> dict:
        siblings = []
        for name, content in self.files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": self.blob_id(name)}
            if self.is_lfs(name):
                sha = self.sha256(name)
                entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 135}
            siblings.append(entry)
        return {"id": self.repo_id, "sha": COMMIT, "gated": "auto", "siblings": siblings}


@contextmanager
def serving(hub: HubServer) -> Iterator[HubServer]:
    """Serve it on a free port; `hub.address` is what HF_ENDPOINT has to be."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        hub.asked.append((self.command, path, token))
        if path.startswith("/cdn/"):
            self._content(path.removeprefix("/cdn/"))
        elif token is not None and token not in hub.valid_tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), token)
        elif path.startswith(f"/{hub.repo_id}/resolve/"):
            revision, name = path.removeprefix(f"/{hub.repo_id}/resolve/").split("/", 1)
            self._resolve(revision, name, token)
        else:
            self._refuse(404, "RepoNotFound", "Repository not found")

    do_HEAD = do_GET

    def _api(self, path: str, token: str | None) -> None:
        hub = self.hub
        name, _, rest = path.partition("/revision/")
        if hub.api_says:
            self._answer(*hub.api_says)
        elif name != hub.repo_id:
            # the hub does not tell strangers whether a repository exists
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif rest not in ("", "main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest}")
        else:
            self._answer(200, json.dumps(hub.metadata()).encode())

    def _resolve(self, revision: str, name: str, token: str | None) -> None:
        hub = self.hub
        if token in hub.gated_for:
            status = 403 if token else 401
            self._refuse(status, "GatedRepo", "Access to this model is restricted.")
        elif revision != COMMIT:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif name not in hub.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif hub.is_lfs(name):
            self.send_response(302)
            self.send_header(
                "Location", hub.address.replace("127.0.0.1", "localhost") + f"/cdn/{name}"
            )
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{hub.sha256(name)}"')
            self.send_header("X-Linked-Size", str(len(hub.files[name])))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._content(name)

    def _content(self, name: str) -> None:
        hub = self.hub
        content = hub.files[name]
        if name in hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, asked = 0, self.headers.get("range")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        stop = hub.cut_once.pop(name, None) if self.command == "GET" else None
        stop = stop or len(content)
        if start >= stop and content:
            self.close_connection = True  # dropped without an answer
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hub.blob_id(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        stall = hub.stall_at.get(name)
        sent = content[start : stop if stall is None else stall]
        self.wfile.write(sent)
        self.wfile.flush()
        hub.served[name] += len(sent)
        if stall is not None:
            hub.stalled.set()
            hub.over.wait()
        if start + len(sent) < len(content):
            self.close_connection = True

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""
