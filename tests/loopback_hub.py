"""A file server on the loopback address that answers like the hub and like a plain file host, and can misbehave."""

import base64
import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Loopback:
    """`files` by name. `faults[name]` is a list of what happens to the next GETs of its bytes, then all is well:

    ("cut", n)      n bytes, then the connection ends
    ("stall", n)    n bytes, then silence
    ("status", c)   HTTP status c
    ("bytes", b)    these bytes instead, with the headers of the right ones where lengths agree
    ("no range",)   the whole file, whatever was asked for
    """

    def __init__(self, **files: bytes):
        self.files = {name.replace("__", "."): content for name, content in files.items()}
        self.faults: dict[str, list[tuple]] = defaultdict(list)
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.lfs = True  # the hub states a sha256; else git's hash
        self.etags = True  # plain files carry one
        self.head_status = 200  # of the hub's HEAD
        self.xet: dict[str, str] = {}  # files that the hub also stores in Xet: name -> hash of its chunks
        self.cas = ""  # where the chunks are, an endpoint of the Xet library
        self.stalled = threading.Event()
        self.cdn_host = "localhost"  # where the hub redirects to
        self.pushed: dict[str, dict[str, bytes]] = {}  # repository -> what commits put there
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}  # large files by sha256, on their way into a commit
        self.push_status = 0  # instead of an answer to any request that sends something

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                outer.answer(self, body=False)

            def do_GET(self):
                outer.answer(self, body=True)

            def do_POST(self):
                outer.take(self)

            def do_PUT(self):
                outer.take(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients that hang up are part of the game
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stalled.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self, part: str = "") -> list[dict[str, str]]:
        """Headers of the GETs whose path has `part`; without it, of those that asked for the bytes of a file."""
        wanted = (part,) if part else ("/cdn/", "/files/")
        return [
            headers for method, path, headers in self.requests if method == "GET" and any(w in path for w in wanted)
        ]

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        self.requests.append((handler.command, handler.path, {k.title(): v for k, v in handler.headers.items()}))
        name = handler.path.rsplit("/", 1)[-1]
        content = self.files.get(name)
        if handler.path == "/xet-token":
            token = {"casUrl": self.cas, "exp": int(time.time()) + 3600, "accessToken": "secret"}
            names = {"casUrl": "X-Xet-Cas-Url", "exp": "X-Xet-Token-Expiration", "accessToken": "X-Xet-Access-Token"}
            return self._json(handler, token, **{names[key]: value for key, value in token.items()})
        if "/reconstructions/" in handler.path:  # a store of chunks that says nothing
            self.stalled.wait(60)
        if "/resolve/" in handler.path:
            self._hub(handler, name, content)
        elif content is None:
            self._end(handler, 404)
        else:
            self._bytes(handler, name, content, body)

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        """What a client sends to push: the repository, the large files, the commit."""
        self.requests.append((handler.command, handler.path, {k.title(): v for k, v in handler.headers.items()}))
        sent = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        path = handler.path.split("?")[0]
        if handler.command == "PUT":
            self.stored[path.rsplit("/", 1)[-1]] = sent
            return self._end(handler, 200)
        if self.push_status or "Authorization" not in handler.headers:
            return self._json(handler, {"error": "refused"}, self.push_status or 401)
        lines = [json.loads(line) for line in sent.splitlines()]
        commit = re.fullmatch(r"/api/models/(.+)/commit/main", path)
        if path == "/api/repos/create":
            repo = f"{lines[0]['organization']}/{lines[0]['name']}"
            is_new = repo not in self.pushed
            self.pushed.setdefault(repo, {})
            if is_new:
                self.private[repo] = lines[0].get("visibility") == "private" or lines[0].get("private") is True
            return self._json(handler, {"url": f"{self.url}/{repo}"}, 200 if is_new else 409)
        if path == "/api/validate-yaml":
            return self._json(handler, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in lines[0]["files"]
            ]
            return self._json(handler, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}} for o in lines[0]["objects"]
            ]
            return self._json(handler, {"transfer": "basic", "objects": objects})
        if not commit:
            return self._json(handler, {"error": "unknown"}, 404)
        there = self.pushed[commit[1]]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                there[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                there[value["path"]] = self.stored[value["oid"]]
        self.files |= {name: content for name, content in there.items() if "/" not in name}  # to be fetched again
        return self._json(handler, {"commitUrl": f"{self.url}/{commit[1]}/commit/{COMMIT}", "commitOid": COMMIT})

    def _json(self, handler, value, status: int = 200, **headers) -> None:
        content = json.dumps(value).encode()
        handler.send_response(status)
        for key, text in headers.items():
            handler.send_header(key, str(text))
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _end(self, handler, status: int, **headers) -> None:
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), str(value))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _hub(self, handler, name: str, content: bytes | None) -> None:
        if self.head_status != 200:
            return self._end(handler, self.head_status)
        if content is None:
            return self._end(handler, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        digest = hashlib.sha256(content).hexdigest()
        if not self.lfs:
            digest = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        facts = {"X_Repo_Commit": COMMIT, "X_Linked_Etag": f'"{digest}"', "X_Linked_Size": len(content)}
        if name in self.xet:
            facts |= {"X_Xet_Hash": self.xet[name], "X_Xet_Refresh_Route": f"{self.url}/xet-token"}
        return self._end(handler, 302, Location=f"http://{self.cdn_host}:{self.port}/cdn/{name}", **facts)

    def _bytes(self, handler, name: str, content: bytes, body: bool) -> None:
        fault = self.faults[name].pop(0) if self.faults[name] and body else ("",)
        if fault[0] == "status":
            return self._end(handler, fault[1])
        if fault[0] == "bytes":
            content = fault[1]
        etag = f'"{hashlib.md5(self.files[name]).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        same = handler.headers.get("If-Range", etag) == etag
        start = int(asked[1]) if asked and same and fault[0] != "no range" else 0
        if start > 0 and start >= len(content):
            return self._end(handler, 416, Content_Range=f"bytes */{len(content)}")
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.etags:
            handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        if not body:
            return None
        sent = content[start:]
        if fault[0] in ("cut", "stall"):
            handler.wfile.write(sent[: fault[1]])
            handler.wfile.flush()
            if fault[0] == "stall":
                self.stalled.wait(60)
            handler.close_connection = True
            return None
        for begin in range(0, len(sent), 1 << 16):
            handler.wfile.write(sent[begin : begin + (1 << 16)])
        return None

    def wait_for(self, condition, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)
