"""A Hub in a thread: the endpoints that huggingface_hub uses to create, push, list and download repositories.

Dataset repositories are named `datasets/<owner>/<name>`, as in the Hub's addresses.

`HF_ENDPOINT` is read when huggingface_hub is imported: clients are processes of their own, with the environment that
`HubStub.environment` gives. Left out: Xet (`HF_HUB_DISABLE_XET=1`), branches and pull requests, multi-part uploads.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

USER = "someone"
TOKEN = "hf_stub"


class HubStub:
    """
    ```python
    with HubStub() as hub:
        subprocess.run([...], env=hub.environment(tmp_path))
        hub.files("someone/repository")["README.md"]
    ```
    """

    def __init__(self):
        self.repositories: dict[str, list[dict[str, bytes]]] = {}  # the files after each commit
        self.messages: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}  # Git LFS, by sha256
        self.requests: list[str] = []  # method and path
        self.unknown: list[str] = []  # those that the stub has no answer to
        self.lock = threading.Lock()

    def __enter__(self) -> "HubStub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that knows this Hub only, with empty caches in `home`."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        return clean | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What the repository holds now."""
        return self.repositories[repo_id][-1]

    def revision(self, repo_id: str) -> str:
        number = len(self.repositories[repo_id])
        return hashlib.sha1(f"{repo_id}@{number}".encode()).hexdigest()


class _Failure(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        try:
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {path}")
                for method, pattern, answer in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in method:
                        # What goes to the object storage is signed by its address.
                        if method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                            raise _Failure(401, "who are you?")
                        status, headers, content = answer(self, **match.groupdict())
                        break
                else:
                    self.hub.unknown.append(f"{self.command} {path}")
                    raise _Failure(404, "the stub has no such endpoint")
        except _Failure as failure:
            status, headers = failure.status, {"X-Error-Message": failure.message}
            headers |= {"X-Error-Code": failure.code} if failure.code else {}
            content = {"error": failure.message, "errors": [{"message": failure.message}]}
        if not isinstance(content, bytes):
            headers = {"Content-Type": "application/json", **headers}
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _files(self, repo: str, revision: str | None = None) -> dict[str, bytes]:
        if repo not in self.hub.repositories:
            raise _Failure(404, f"Repository {repo} not found", "RepoNotFound")
        if revision not in (None, "main", self.hub.revision(repo)):
            raise _Failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.hub.repositories[repo][-1]

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        repo = f"datasets/{name}" if asked.get("type") == "dataset" else name
        answer = {"url": f"{self.hub.endpoint}/{repo}", "name": name, "id": name}
        if repo in self.hub.repositories:
            return 409, {}, {**answer, "error": "You already created this model repo"}
        self.hub.repositories[repo], self.hub.messages[repo] = [{}], []
        return 200, {}, answer

    def whoami(self):
        return 200, {}, {"type": "user", "name": USER, "orgs": []}

    def validate_yaml(self):
        """The part of the Hub's rules that a card of ours could break."""
        content = json.loads(self.body)["content"]
        block = re.match(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
        if block is None:
            return 200, {}, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        metadata = yaml.safe_load(block[1])
        named = metadata.get("base_model", [])
        for name in [named] if isinstance(named, str) else named:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                raise _Failure(400, f'"base_model" is not a valid model id: {name}')
        for result in metadata.get("model-index", []):
            for entry in result["results"]:
                if not entry["task"]["type"] or not entry["dataset"]["type"] or not entry["dataset"]["name"]:
                    raise _Failure(400, '"model-index" lacks a task or a dataset')
                if any(not isinstance(metric["value"], (int, float)) for metric in entry["metrics"]):
                    raise _Failure(400, '"model-index" holds a metric without a value')
        return 200, {}, {"errors": [], "warnings": []}

    def preupload(self, repo, revision):
        present = self._files(repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith((".safetensors", ".bin")) or file["size"] > 10_000_000
            old = present.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _git_oid(old)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {}, {"files": files}

    def lfs_batch(self, repo):
        self._files(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
            objects.append({**asked, **({} if asked["oid"] in self.hub.objects else {"actions": upload})})
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        return 200, headers, {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Failure(422, "the content is not that of the oid")
        self.hub.objects[oid] = self.body
        return 200, {}, b""

    def commit(self, repo, revision):
        files = dict(self._files(repo, revision))
        for line in self.body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                self.hub.messages[repo].append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if len(self.hub.objects[value["oid"]]) != value["size"]:
                    raise _Failure(422, f"{value['path']} has another size")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Failure(422, f"the stub does not commit {key}")
        self.hub.repositories[repo].append(files)
        oid = self.hub.revision(repo)
        return 200, {}, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid}

    def info(self, repo, revision=None):
        files = self._files(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        name = repo.removeprefix("datasets/")
        return (
            200,
            {},
            {"id": name, "modelId": name, "sha": self.hub.revision(repo), "private": False, "siblings": siblings},
        )

    def tree(self, repo, revision, folder=None):
        files = self._files(repo, revision)
        inside = {path: content for path, content in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise _Failure(404, f"{folder} does not exist", "EntryNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            for path, content in sorted(inside.items())
        ]
        return 200, {}, entries

    def resolve(self, repo, revision, path):
        content = self._files(repo, revision).get(path)
        headers = {"X-Repo-Commit": self.hub.revision(repo)}
        if content is None:
            raise _Failure(404, f"Entry not found: {path}", "EntryNotFound")
        digest = hashlib.sha256(content).hexdigest()
        if digest in self.hub.objects:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        headers["ETag"] = f'"{_git_oid(content)}"'
        return 200, {"Content-Type": "application/octet-stream", **headers}, content


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"(?P<repo>(datasets/)?[\w.-]+/[\w.-]+)"
_API = f"/api/(models/)?{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, str, Callable]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"{_API}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
    ("POST", f"{_API}/commit/{_REVISION}", _Handler.commit),
    ("GET HEAD", f"{_API}(/revision/{_REVISION})?", _Handler.info),
    ("GET HEAD", f"{_API}/tree/{_REVISION}(/(?P<folder>.+))?", _Handler.tree),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
