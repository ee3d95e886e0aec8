"""A Hub on this machine: the protocol for repositories, as far as huggingface_hub depends on what it answers.

    with HubServer() as hub:
        hub.run("-m", "btok_hf", "push", "folder", "org/name", home=tmp_path)

Two ports, as on the real Hub: one for the API and small files, one for storage, which takes no tokens. Repositories
live in memory, with the object ids that git and git-lfs give. Datasets are read like models. Every
answer and every stored file is searched for the tokens; leaving the context fails if one was found.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

from support import forks

OWNER_TOKEN, STRANGER_TOKEN = "hf_" + "oWnEr" * 7, "hf_" + "sTrAn" * 7
USERS = {OWNER_TOKEN: ("owner", ["org"]), STRANGER_TOKEN: ("stranger", [])}
SHA = re.compile(r"[0-9a-f]{40}")


def blob_oid(content):
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Commits (`{path: (content, is_lfs)}` each), branches and tags, and the large files that were uploaded."""

    def __init__(self, repo_id, private):
        self.repo_id, self.private = repo_id, private
        self.commits, self.titles, self.lfs, self.tags = {}, {}, {}, {}
        self.branches = {"main": None}
        self.commit(
            "main", {".gitattributes": (b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}, "init"
        )

    def commit(self, branch, files, title):
        listing = sorted((path, blob_oid(content)) for path, (content, _) in files.items())
        oid = hashlib.sha1(json.dumps([self.branches.get(branch), title, listing]).encode()).hexdigest()
        self.commits[oid], self.titles[oid], self.branches[branch] = files, title, oid
        return oid

    def resolve(self, revision):
        if revision in self.commits:
            return revision
        name = revision.removeprefix("refs/heads/")
        if name not in self.branches and name not in self.tags:
            raise HubError(404, f"Revision {revision} not found", "RevisionNotFound")
        return self.branches.get(name) or self.tags[name]

    def listing(self, commit, folder, recursive):
        """Entries of the tree API below a folder."""
        entries = {}
        for path, (content, is_lfs) in sorted(self.commits[commit].items()):
            if folder and not path.startswith(folder + "/"):
                continue
            parts = path[len(folder) + 1 if folder else 0 :].split("/")
            if len(parts) > 1 and not recursive:
                name = "/".join(filter(None, [folder, parts[0]]))
                entries[name] = {"type": "directory", "path": name, "oid": blob_oid(name.encode()), "size": 0}
                continue
            entries[path] = {"type": "file", "path": path, "oid": blob_oid(content), "size": len(content)}
            if is_lfs:
                digest = hashlib.sha256(content).hexdigest()
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
                entries[path]["oid"] = blob_oid(pointer.encode())
                entries[path]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound", commit)
        return list(entries.values())


class HubError(Exception):
    """An answer with an error status."""

    def __init__(self, status, message, code=None, commit=None, **fields):
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {key: value for key, value in headers.items() if value}
        self.body = {"error": message, **fields}


class HubServer:
    """The server, running while the context is entered.

    Attributes:
        endpoint, storage (`str`): Addresses of the two ports.
        repositories (`dict[str, Repository]`): By id.
        requests (`list[tuple[str, str, int | None]]`): Method, path with query and status (`None`: no answer), of both
            ports, in order.
        leaks (`list[str]`): Answers and files in which a token was found.
        faults (`dict[str, int]`): How many of the next requests break: `reset_upload` (the connection is reset after
            1,000 bytes), `refuse_upload` (403), `fail_commit` (500), `lose_commit` (committed, but no answer).
    """

    def __init__(self):
        self.repositories, self.requests, self.leaks, self.faults = {}, [], [], {}
        self._servers = [Server(("127.0.0.1", 0), handler) for handler in (HubHandler, StorageHandler)]
        api, storage = (server.server_port for server in self._servers)
        # Two hosts: a client that finds the host of the API again may send its token.
        self.endpoint, self.storage = f"http://127.0.0.1:{api}", f"http://localhost:{storage}"

    def __enter__(self):
        for server in self._servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind, *_):
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if kind is None:
            assert not self.leaks, self.leaks

    def environment(self, home, token=OWNER_TOKEN, **variables):
        """Environment variables of a client process, whose cache and login are in `home`."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **({"HF_TOKEN": token} if token else {}),
            **variables,
        }

    def run(self, *command, home, token=OWNER_TOKEN, input=None, check=True, **variables):
        """Run Python with these arguments in a client process. It must print no token and, with `check`, succeed."""
        run = forks.run(*command, env=self.environment(home, token, **variables), input=input)
        assert not any(secret in run.stdout + run.stderr for secret in USERS), "a token was printed"
        assert not check or run.returncode == 0, run.stdout + run.stderr
        return run

    def fault(self, name):
        """Whether this request breaks."""
        self.faults[name] = left = self.faults.get(name, 0) - 1
        return left >= 0

    def search(self, where, content):
        if any(secret.encode() in content for secret in USERS):
            self.leaks.append(where)


class Server(ThreadingHTTPServer):
    def shutdown_request(self, request):
        request.close()  # without an orderly shutdown, which would hide a reset


class Handler(BaseHTTPRequestHandler):
    """What both ports share. A request's body is always read to its end, because the connection is kept."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    routes = ()

    def handle_request(self):
        self.hub, self.status = self.server.hub, None
        self.address = urlsplit(self.path)
        try:
            self.authenticate()
            self.read_body()
            for method, pattern, name in self.routes:
                match = re.fullmatch(pattern, self.address.path)
                if match and self.command in method.split():
                    getattr(self, name)(*(unquote(group or "") for group in match.groups()))
                    break
            else:
                raise HubError(404, f"No such route: {self.command} {self.address.path}")
        except HubError as error:
            self.reply(error.body, error.status, error.headers)
        except ConnectionError:
            self.close_connection = True
        finally:
            self.hub.requests.append((self.command, self.path, self.status))

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, body, status=200, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": len(content), **dict(headers)}
        self.status = status
        self.hub.search(f"answer to {self.command} {self.path}", str(headers).encode() + content)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


class HubHandler(Handler):
    """The API and the files in git."""

    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/auth-check/write", "check_write"),
        ("GET", r"/api/models/([^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", "history"),
        ("GET", r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/(branch|tag)/([^/]+)", "add_ref"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify", "lfs_verify"),
        ("GET HEAD", r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def authenticate(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user, organisations = USERS.get(token, (None, []))
        self.namespaces = {self.user, *organisations}
        if token and self.user is None:
            self.read_body()
            raise HubError(401, "Invalid credentials in Authorization header")

    def repository(self, repo_id, write=False):
        repository = self.hub.repositories.get(repo_id)
        mine = repo_id.split("/")[0] in self.namespaces
        if repository is None or (repository.private and not mine):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not mine:
            raise HubError(403 if self.user else 401, "You have no write access to this repository")
        return repository

    def query(self, name):
        return parse_qs(self.address.query).get(name, [""])[0]

    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"name": name} for name in self.namespaces - {self.user}]
        token = {"accessToken": {"role": "write", "displayName": "test"}}
        self.reply({"type": "user", "name": self.user, "orgs": orgs, "auth": token})

    def validate_card(self):
        content = json.loads(self.body)["content"]
        fine = content.startswith("---\n") and "\n---\n" in content
        errors = [] if fine else [{"message": "the card has no metadata"}]
        self.reply({"errors": errors, "warnings": []}, 200 if fine else 400)

    def create(self):
        fields = json.loads(self.body)
        namespace = fields.get("organization") or self.user
        if self.user is None or namespace not in self.namespaces:
            raise HubError(403 if self.user else 401, f"You have no right to create a model under {namespace}")
        repo_id = f"{namespace}/{fields['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        self.hub.repositories[repo_id] = Repository(repo_id, fields.get("visibility") == "private")
        self.reply({"url": url})

    def info(self, repo_id, revision):
        repository = self.repository(repo_id)
        sha = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        self.reply({"id": repo_id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def check_write(self, repo_id):
        self.repository(repo_id, write=True)
        self.reply({})

    def refs(self, repo_id):
        repository = self.repository(repo_id)
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]
            for kind, refs in (("heads", repository.branches), ("tags", repository.tags))
        )
        self.reply({"branches": branches, "tags": tags, "converts": []})

    def history(self, repo_id, revision):
        repository = self.repository(repo_id)
        oid = repository.resolve(revision)
        row = {"id": oid, "title": repository.titles[oid], "message": "", "authors": [{"user": "owner"}]}
        self.reply([{**row, "date": "2026-01-01T00:00:00.000Z"}])

    def tree(self, repo_id, revision, folder):
        repository = self.repository(repo_id)
        self.reply(repository.listing(repository.resolve(revision), folder, self.query("recursive").lower() == "true"))

    def add_ref(self, repo_id, kind, name):
        repository = self.repository(repo_id, write=True)
        refs = repository.branches if kind == "branch" else repository.tags
        fields = json.loads(self.body or b"{}")
        # The address of a new branch names the branch, that of a new tag the revision to tag.
        name, start = (name, fields.get("startingPoint")) if kind == "branch" else (fields["tag"], name)
        if name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        refs[name] = repository.resolve(start or "main")
        self.reply({})

    def preupload(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        present = {
            entry["path"]: entry.get("lfs", entry)["oid"]
            for entry in repository.listing(repository.resolve(revision), "", recursive=True)
        }
        files = []
        for file in json.loads(self.body)["files"]:
            binary = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            binary = binary or (file["size"] > 0 and b"\0" in base64.b64decode(file["sample"]))
            answer = {"path": file["path"], "uploadMode": "lfs" if binary else "regular", "shouldIgnore": False}
            files.append(answer | ({"oid": present[file["path"]]} if file["path"] in present else {}))
        self.reply({"files": files})

    def lfs_batch(self, repo_id):
        repository = self.repository(repo_id, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage}/{repo_id}/{item['oid']}", "header": {}}
            verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
            objects.append(
                item | ({} if item["oid"] in repository.lfs else {"actions": {"upload": upload, "verify": verify}})
            )
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo_id):
        item = json.loads(self.body)
        if len(self.repository(repo_id, write=True).lfs.get(item["oid"], b"")) != item["size"]:
            raise HubError(404, "The object was not uploaded")
        self.reply({})

    def commit(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        parent = repository.resolve(revision)
        if self.hub.fault("fail_commit"):
            raise HubError(500, "Internal error, we are working hard to fix this")
        files, title = dict(repository.commits[parent]), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in repository.lfs:
                    raise HubError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = (repository.lfs[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"Unknown operation {key}")
        for path, (content, _) in files.items():
            self.hub.search(f"{path} in {repo_id}", content)
        answer = {}
        if self.query("create_pr") == "1":
            number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        oid = repository.commit(revision, files, title)
        if self.hub.fault("lose_commit"):
            self.close_connection = True
            return
        self.reply({"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", **answer})

    def resolve(self, repo_id, revision, path):
        repository = self.repository(repo_id)
        commit = repository.resolve(revision)
        if path not in repository.commits[commit]:
            raise HubError(404, "Entry not found", "EntryNotFound", commit)
        content, is_lfs = repository.commits[commit][path]
        if not is_lfs:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{blob_oid(content)}"'}
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if part:
                self.reply(content[int(part[1]) : int(part[2]) + 1], 206, headers)
            else:
                self.reply(content, 200, headers)
            return
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Size": len(content), "X-Linked-ETag": f'"{digest}"'}
        location = f"{self.hub.storage}/{quote(repo_id)}/{digest}"
        self.reply(b"", 302, {"X-Repo-Commit": commit, "Location": location, **linked})


class StorageHandler(Handler):
    """Large files by the SHA-256 of their content. Their addresses need no token."""

    routes = (("PUT", r"/([^/]+/[^/]+)/([0-9a-f]{64})", "put"), ("GET HEAD", r"/([^/]+/[^/]+)/([0-9a-f]{64})", "get"))

    def authenticate(self):
        if "Authorization" in self.headers:
            self.hub.leaks.append(f"token sent to storage: {self.command} {self.path}")

    def read_body(self):
        if self.command == "PUT" and self.hub.fault("reset_upload"):
            self.rfile.read(1000)
            # Without lingering, the peer sees a reset and not a clean end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise ConnectionResetError
        super().read_body()

    def put(self, repo_id, digest):
        if self.hub.fault("refuse_upload"):
            raise HubError(403, "Forbidden")
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise HubError(400, "The content is not what its address says")
        self.hub.repositories[repo_id].lfs[digest] = self.body
        self.reply(b"")

    def get(self, repo_id, digest):
        content = self.hub.repositories[repo_id].lfs[digest]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            self.reply(content)
            return
        start = int(start[1])
        self.reply(content[start:], 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})
