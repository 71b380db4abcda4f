"""
A server on loopback that speaks as much of the Hub's protocol as `huggingface_hub` needs for models: repositories, commits, LFS
uploads, downloads. It can fail on purpose. (PYTEST_DONT_REWRITE)
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from servers import serving


GOOD, READ_ONLY = "hf_goodgoodgood", "hf_readreadread"


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        repos: Files of each repository by path; `commits` of it, messages in order.
        faults: `(method, pattern of the path, "500" or "cut", times)`: requests that fail before they are looked at.
        requests: All requests, `(method, path)`.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.repos, self.commits, self.objects, self.faults, self.requests = {}, {}, {}, [], []


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        server, self.path_only = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with server.lock:
            server.requests.append((self.command, self.path_only))
            fault = next((f for f in server.faults if f[0] == self.command and re.search(f[1], self.path_only)), None)
            if fault:
                server.faults.remove(fault)
                if fault[3] > 1:
                    server.faults.append((*fault[:3], fault[3] - 1))
        if fault and fault[2] == "cut":
            self.close_connection = True
            self.connection.close()
            return
        if fault:
            self.reply({"error": "on purpose"}, int(fault[2]))
            return
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if method in (self.command, "GET" if self.command == "HEAD" else None) and match:
                answer(self, body, *match.groups())
                return
        self.reply({"error": f"no route for {self.command} {self.path_only}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def reply(self, value, status=200, headers=(), content_type="application/json"):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in dict(headers).items():
            self.send_header(name, content)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may_write(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == GOOD:
            return True
        if token == READ_ONLY:
            self.reply({"error": f"{token} may only read"}, 403)
        else:
            self.reply({"error": f"{token} is no token"}, 401)
        return False

    def create(self, body):
        if not self.may_write():
            return
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        if repo in self.server.repos:
            self.reply({"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}, 409)
            return
        self.server.repos[repo], self.server.commits[repo] = {}, []
        self.reply({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def preupload(self, body, repo, revision):
        if self.may_write():
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply({"files": modes})

    def lfs_batch(self, body, repo):
        if self.may_write():
            objects = [
                {**asked, "authenticated": True}
                | (
                    {}
                    if asked["oid"] in self.server.objects
                    else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}}}
                )
                for asked in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            self.reply({"error": "not what was announced"}, 400)
            return
        self.server.objects[oid] = body
        self.reply({})

    def commit(self, body, repo, revision):
        if not self.may_write():
            return
        files, message = {}, ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        with self.server.lock:
            self.server.repos[repo] |= files
            self.server.commits[repo].append(message)
        sha = self.sha(repo)
        self.reply({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    def sha(self, repo) -> str:
        return hashlib.sha1(f"{repo} {len(self.server.commits[repo])}".encode()).hexdigest()

    def info(self, body, repo, revision="main"):
        if repo not in self.server.repos:
            self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        names = [{"rfilename": name} for name in self.server.repos[repo]]
        about = {"id": repo, "modelId": repo, "sha": self.sha(repo), "private": False, "siblings": names, "tags": []}
        self.reply(about)

    def tree(self, body, repo, revision, folder=None):
        if repo not in self.server.repos:
            self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = self.server.repos[repo].items()
        self.reply(
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files
                if folder is None or name.startswith(folder + "/")
            ]
        )

    def resolve(self, body, repo, revision, name):
        if repo not in self.server.repos:
            self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        data = self.server.repos[repo].get(name)
        if data is None:
            self.reply(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha(repo)}
            )
            return
        headers = {"X-Repo-Commit": self.sha(repo), "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.reply(data, 200, headers, "application/octet-stream")

    def log_message(self, *args):
        pass


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", r"/api/repos/create", HubHandler.create),
    ("POST", r"/api/validate-yaml", lambda self, body: self.reply({"errors": [], "warnings": []})),
    ("POST", rf"/api/models/{REPO}/preupload/(.+)", HubHandler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", HubHandler.lfs_put),
    ("POST", rf"/api/models/{REPO}/commit/(.+)", HubHandler.commit),
    ("GET", rf"/api/models/{REPO}/revision/(.+)", HubHandler.info),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)", HubHandler.tree),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)/(.+)", HubHandler.tree),
    ("GET", rf"/api/models/{REPO}", HubHandler.info),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", HubHandler.resolve),
]


@pytest.fixture
def hub():
    with serving(HubServer()) as server:
        yield server
