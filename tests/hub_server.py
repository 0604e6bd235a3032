"""A hub of one repository on this machine, for tests of what downloads from it.

Speaks what huggingface_hub speaks: the model's metadata with sizes and checksums, HEAD and GET of
`resolve` addresses with ranges; files of LFS are redirected to another host name, as the hub
redirects to its CDN. Its faults are switched on by attributes.
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
    cut_once: dict[str, int] = field(default_factory=dict)
    """The connection is dropped at this byte of the file, the first time it is asked for."""
    stall_at: dict[str, int] = field(default_factory=dict)
    """Nothing more is sent from this byte on; the connection stays open."""
    corrupt: set[str] = field(default_factory=set)
    api_answer: bytes = b""
    """Instead of metadata."""
    address: str = ""
    served: Counter[str] = field(default_factory=Counter)
    """Bytes sent of each file's content."""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, token) of each request."""
    stalled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def is_lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin"))

    def etag(self, name: str) -> str:
        content = self.files[name]
        if self.is_lfs(name):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def metadata(self) -> bytes:
        siblings = []
        for name, content in self.files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": self.etag(name)}
            if self.is_lfs(name):
                entry["lfs"] = {"sha256": self.etag(name), "size": len(content), "pointerSize": 135}
            siblings.append(entry)
        entry = {"id": self.repo_id, "sha": COMMIT, "gated": "auto", "siblings": siblings}
        return json.dumps(entry).encode()


@contextmanager
def serving(hub: HubServer) -> Iterator[HubServer]:
    """Serve it on a free port; `hub.address` is what HF_ENDPOINT has to be."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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
        elif token not in (None, "hf_good", "hf_no_licence"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            if name != hub.repo_id and not hub.api_answer:
                # the hub does not tell strangers whether a repository exists
                self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            elif revision not in ("", "main", COMMIT):
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                self._answer(200, hub.api_answer or hub.metadata())
        elif path.startswith(f"/{hub.repo_id}/resolve/{COMMIT}/"):
            self._resolve(path.split("/", 5)[5], token)
        else:
            self._refuse(404, "RepoNotFound", "Repository not found")

    do_HEAD = do_GET

    def _resolve(self, name: str, token: str | None) -> None:
        hub = self.hub
        if token != "hf_good":  # anyone may list the repository
            message = "Access to this model is restricted."
            self._refuse(403 if token else 401, "GatedRepo", message)
        elif name not in hub.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif hub.is_lfs(name):
            cdn = hub.address.replace("127.0.0.1", "localhost")
            etag, size = f'"{hub.etag(name)}"', str(len(hub.files[name]))
            headers = {"X-Linked-Etag": etag, "X-Linked-Size": size, "X-Repo-Commit": COMMIT}
            self._answer(302, b"", Location=f"{cdn}/cdn/{name}", **headers)
        else:
            self._content(name)

    def _content(self, name: str) -> None:
        hub = self.hub
        content = hub.files[name]
        if name in hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int((self.headers.get("range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        stop = hub.cut_once.pop(name, None) if self.command == "GET" else None
        stop = stop or len(content)
        if start >= stop and content:
            self.close_connection = True  # dropped without an answer
            return
        headers = {"ETag": f'"{hub.etag(name)}"', "X-Repo-Commit": COMMIT}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        stall = hub.stall_at.get(name)
        sent = content[start : stop if stall is None else stall]
        self._answer(206 if start else 200, sent, len(content) - start, **headers)
        if self.command == "HEAD":
            return
        hub.served[name] += len(sent)
        if stall is not None:
            hub.stalled.set()
            hub.over.wait()
        if start + len(sent) < len(content):
            self.close_connection = True

    def _answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(status, b"", **headers)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""
