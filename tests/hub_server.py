"""A Hugging Face Hub on localhost: what a client needs to create a repository, upload, commit and download.

It keeps everything in memory and is driven by the real `huggingface_hub` through `HF_ENDPOINT`. Large files go by LFS
(`basic`, or `multipart` from `part_size` bytes on); there is no Xet here, so a client must have it turned off
(`HF_HUB_DISABLE_XET=1`) and is told so otherwise. Faults are injected by `Hub.fail`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKENS = {"hf_writer": ("me", "write"), "hf_reader": ("me", "read"), "hf_stranger": ("you", "write")}
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other", "unknown"}
PIPELINE_TAGS = {
    "feature-extraction",
    "fill-mask",
    "multiple-choice",
    "question-answering",
    "sentence-similarity",
    "text-classification",
    "token-classification",
}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".model")


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    data: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name of what the commit holds: the content, or an LFS pointer to it."""
        data = self.data
        if self.is_lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n"
            data = pointer.encode()
        return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass
class Commit:
    parent: str | None
    message: str
    files: dict[str, File]

    @property
    def sha(self) -> str:
        listing = [(path, file.blob_id) for path, file in sorted(self.files.items())]
        return hashlib.sha1(json.dumps([self.parent, self.message, listing]).encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0

    def add(self, ref: str, commit: Commit) -> str:
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit.sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content at a revision."""
        return {path: file.data for path, file in self.commits[self.resolve(revision)].files.items()}


@dataclass
class Fault:
    """What happens instead of an answer; see `Hub.fail`."""

    pattern: str
    status: int | None
    times: int
    headers: dict[str, str]
    message: str
    after: bool


class Answer(Exception):
    """The answer to a request, raised from anywhere."""

    def __init__(self, status: int = 200, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, dict(headers or {})
        self.body = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()


def refuse(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """An error as the Hub words it: in the body and in two headers."""
    headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, headers)


class Hub:
    """The server and its state.

    Args:
        part_size: LFS files of more bytes go in parts.
        max_size: LFS files of more bytes are refused.

    Attributes:
        url: What `HF_ENDPOINT` is set to.
        repos: By full name.
        stored: LFS objects, by sha256.
        log: Each request, as `"METHOD path"`.
    """

    def __init__(self, part_size: int = 2**62, max_size: int = 2**62) -> None:
        self.part_size, self.max_size = part_size, max_size
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[str] = []
        self.faults: list[Fault] = []
        self.actions: list[tuple[str, Callable[[], None]]] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.server.server_port}"  # downloads come from another host

    def fail(
        self,
        pattern: str,
        status: int | None,
        times: int = 1,
        message: str = "injected",
        after: bool = False,
        **headers: str,
    ) -> None:
        """Has the next requests fail.

        Args:
            pattern: Regular expression, searched in `"METHOD path"`.
            status: What is answered; None drops the connection without an answer.
            times: How many requests fail.
            message: The error's text.
            after: The request is carried out, and only then fails.
            **headers: Of the answer; `_` stands for `-`.
        """
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, status, times, names, message, after))

    def before(self, pattern: str, action: Callable[[], None]) -> None:
        """Runs `action` once, before the next request that the regular expression is found in."""
        self.actions.append((pattern, action))

    def create(self, repo_id: str, files: dict[str, str] | None = None, private: bool = False) -> Repo:
        """A repository with some small files, past the API."""
        repo = self.repos[repo_id] = Repo(private)
        contents = {".gitattributes": "*.safetensors filter=lfs\n"} | (files or {})
        repo.add("main", Commit(None, "initial commit", {k: File(v.encode()) for k, v in contents.items()}))
        return repo

    def change(self, repo_id: str, path: str, text: str) -> None:
        """Somebody else commits a file."""
        repo = self.repos[repo_id]
        head = repo.refs["main"]
        files = repo.commits[head].files | {path: File(text.encode())}
        repo.add("main", Commit(head, f"Update {path}", files))

    def requests(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Hub]:
    """A `Hub` that serves until the block is left."""
    hub = Hub(**options)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do(self) -> None:
        address = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        line = f"{self.command} {unquote(address.path)}"
        with self.hub.lock:
            self.hub.log.append(line)
            for pattern, action in [entry for entry in self.hub.actions if re.search(entry[0], line)]:
                self.hub.actions.remove((pattern, action))
                action()
            fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and not fault.after and fault.status is None:
            return self.drop()
        self.body = self.read_body()
        if fault is not None and not fault.after:
            return self.send(refuse(fault.status, fault.message, **fault.headers))
        try:
            with self.hub.lock:
                self.route(address.path)
            answer = refuse(404, "Not Found")
        except Answer as raised:
            answer = raised
        if fault is None:
            self.send(answer)
        elif fault.status is None:
            self.drop()
        else:
            self.send(refuse(fault.status, fault.message, **fault.headers))

    do_GET = do_HEAD = do_POST = do_PUT = do

    def drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, answer: Answer) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body))} | answer.headers
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def route(self, path: str) -> None:
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, "GET" if self.command == "HEAD" else None):
                action(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})

    # --- who asks, and for what ---

    def user(self) -> tuple[str, str] | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in TOKENS:
            raise refuse(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def find(self, repo: str, *, write: bool = False, propose: bool = False) -> Repo:
        """The repository, if who asks may read it, write to it, or propose changes to it."""
        user = self.user()
        found = self.hub.repos.get(repo)
        owner = repo.split("/")[0]
        if found is None or (found.private and (user is None or user[0] != owner)):
            raise refuse(401 if user is None else 404, "Repository not found", "RepoNotFound")
        propose = propose or "create_pr" in self.query
        if (write or propose) and user is None:
            raise refuse(401, "Invalid username or password.")
        if (write or propose) and (user[1] != "write" or (user[0] != owner and not propose)):
            raise refuse(403, "You don't have the required permissions to write to this repo")
        return found

    def commit_of(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        sha = repo.resolve(revision)
        if sha is None:
            raise refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # --- the API ---

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise refuse(401, "Invalid username or password.")
        name, role = user
        token = {"displayName": "test", "role": role}
        raise Answer(body={"type": "user", "name": name, "orgs": [], "auth": {"accessToken": token}})

    def validate_yaml(self) -> None:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        errors, warnings = [], []
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            data, errors = {}, [str(error)]
        if data is None:
            warnings.append("empty or missing yaml metadata in repo card")
        elif not isinstance(data, dict):
            errors.append("metadata must be a mapping")
        else:
            if data.get("license") not in LICENSES | {None}:
                errors.append(f'"license" must be one of {sorted(LICENSES)}')
            if data.get("license") == "other" and not data.get("license_name"):
                warnings.append('"license_name" is missing')
            if data.get("pipeline_tag") not in PIPELINE_TAGS | {None}:
                errors.append(f'"pipeline_tag" must be one of {sorted(PIPELINE_TAGS)}')
            bases = data.get("base_model", [])
            for base in [bases] if isinstance(bases, str) else bases:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
                    errors.append(f'"base_model" must be the id of a model, not {base!r}')
            for model in data.get("model-index", []):
                for result in model["results"]:
                    if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                        errors.append('"model-index" is incomplete')
        body = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        raise Answer(400 if errors else 200, body)

    def create_repo(self) -> None:
        user, values = self.user(), json.loads(self.body)
        if user is None:
            raise refuse(401, "Invalid username or password.")
        owner = values.get("organization") or user[0]
        repo_id = f"{owner}/{values['name']}"
        if owner != user[0] or user[1] != "write":
            raise refuse(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        place = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            raise Answer(409, {"error": "You already created this model repo"} | place)
        self.hub.create(repo_id, private=bool(values.get("private") or values.get("visibility") == "private"))
        raise Answer(body=place)

    def repo_info(self, repo: str, revision: str) -> None:
        found = self.find(repo)
        sha, commit = self.commit_of(found, revision or "main")
        siblings = []
        for path, file in commit.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(file.data), "blobId": file.blob_id}
            if file.is_lfs:
                entry["lfs"] = {"size": len(file.data), "sha256": file.sha256, "pointerSize": 134}
            siblings.append(entry)
        raise Answer(body={"id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def refs(self, repo: str) -> None:
        refs = self.find(repo).refs.items()
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in refs if "/" not in n]
        raise Answer(body={"branches": branches, "tags": [], "converts": []})

    def tree(self, repo: str, revision: str, path: str) -> None:
        _, commit = self.commit_of(self.find(repo), revision)
        entries = [self.entry(name, file) for name, file in commit.files.items() if name.startswith(path)]
        if path and not entries:
            raise refuse(404, f"{path} does not exist", "EntryNotFound")
        raise Answer(body=json.dumps(entries).encode())

    def paths_info(self, repo: str, revision: str) -> None:
        _, commit = self.commit_of(self.find(repo), revision)
        paths = json.loads(self.body)["paths"]
        raise Answer(body=json.dumps([self.entry(p, commit.files[p]) for p in paths if p in commit.files]).encode())

    def entry(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.blob_id}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
        return entry

    def create_branch(self, repo: str, branch: str) -> None:
        found = self.find(repo, write=True)
        if branch in found.refs:
            raise refuse(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.refs[branch] = self.commit_of(found, start)[0]
        raise Answer()

    def preupload(self, repo: str, revision: str) -> None:
        _, commit = self.commit_of(self.find(repo, write=True), revision)
        files = []
        for asked in json.loads(self.body)["files"]:
            path, present = asked["path"], commit.files.get(asked["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or asked["size"] > 10_000_000 else "regular"
            oid = None if present is None else present.etag
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(body={"files": files})

    def xet_token(self, repo: str, revision: str) -> None:
        self.find(repo, write=True)
        raise refuse(404, "This server has no Xet storage; set HF_HUB_DISABLE_XET=1")

    def lfs_batch(self, repo: str) -> None:
        self.find(repo, propose=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if size > self.hub.max_size:
                answer["error"] = {"code": 413, "message": f"File too large: at most {self.hub.max_size} bytes"}
            elif oid not in self.hub.stored:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/storage/{oid}"}
                if size > self.hub.part_size:
                    count = math.ceil(size / self.hub.part_size)
                    parts = {str(i + 1): f"{self.hub.url}/storage/{oid}/part/{i + 1}" for i in range(count)}
                    upload = {"href": f"{self.hub.url}/storage/{oid}/complete"}
                    upload["header"] = {"chunk_size": str(self.hub.part_size)} | parts
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/storage/{oid}/verify"}}
            objects.append(answer)
        has_parts = any("header" in o.get("actions", {}).get("upload", {}) for o in objects)
        raise Answer(body={"transfer": "multipart" if has_parts else "basic", "objects": objects})

    def put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise refuse(400, "The content does not have this sha256")
        self.hub.stored[oid] = self.body
        raise Answer()

    def put_part(self, oid: str, part: str) -> None:
        self.hub.parts[oid, int(part)] = self.body
        raise Answer(headers={"ETag": hashlib.md5(self.body).hexdigest()})

    def complete(self, oid: str) -> None:
        sent = {part["partNumber"]: part["etag"] for part in json.loads(self.body)["parts"]}
        held = {number: data for (name, number), data in sorted(self.hub.parts.items()) if name == oid}
        if sent != {number: hashlib.md5(data).hexdigest() for number, data in held.items()}:
            raise refuse(400, "The parts are not those that were sent")
        self.body = b"".join(held.values())
        self.put_object(oid)

    def verify(self, oid: str) -> None:
        sent = json.loads(self.body)
        held = self.hub.stored.get(oid)
        if held is None or sent != {"oid": oid, "size": len(held)}:
            raise refuse(404, "There is no such object")
        raise Answer()

    def commit(self, repo: str, revision: str) -> None:
        found = self.find(repo, write=True)
        head, present = self.commit_of(found, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines.pop(0)["value"]
        if header.get("parentCommit") not in (None, head):
            raise refuse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(present.files)
        for line in lines:
            key, value = line["key"], line["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise refuse(400, f"The LFS object of {path} was not uploaded")
                files[path] = File(self.hub.stored[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise refuse(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise refuse(400, f"Unknown operation {key}")
        commit = Commit(head, header["summary"], files)
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit.sha}"}
        if "create_pr" in self.query:
            found.pull_requests += 1
            found.add(f"refs/pr/{found.pull_requests}", commit)
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{found.pull_requests}"
        else:
            found.add(revision, commit)
        raise Answer(body=answer)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, commit = self.commit_of(self.find(repo), revision)
        file = commit.files.get(path)
        if file is None:
            refusal = refuse(404, "Entry not found", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = sha
            raise refusal
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
            raise Answer(302, b"", headers | {"Location": f"{self.hub.storage_url}/storage/{file.sha256}"})
        raise Answer(body=file.data, headers=headers)

    def get_object(self, oid: str) -> None:
        if oid not in self.hub.stored:
            raise refuse(404, "There is no such object")
        data = self.hub.stored[oid]
        headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            raise Answer(body=data, headers=headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        raise Answer(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_OBJECT = r"/storage/(?P<oid>[0-9a-f]{64})"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("GET", rf"/api/models/{_REPO}(/revision/{_REVISION})?", _Handler.repo_info),
    ("GET", rf"/api/models/{_REPO}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"/api/models/{_REPO}/paths-info/{_REVISION}", _Handler.paths_info),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("GET", rf"/api/models/{_REPO}/xet-write-token/{_REVISION}", _Handler.xet_token),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", _OBJECT, _Handler.put_object),
    ("GET", _OBJECT, _Handler.get_object),
    ("PUT", rf"{_OBJECT}/part/(?P<part>\d+)", _Handler.put_part),
    ("POST", rf"{_OBJECT}/complete", _Handler.complete),
    ("POST", rf"{_OBJECT}/verify", _Handler.verify),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
