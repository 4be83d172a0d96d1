"A hub on this machine: a real HTTP server with branches, tags, hashes, ranges, gates and tokens, which the real client talks to."
import base64, hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model") # what a real hub keeps by SHA-256; the rest by git's hash

class Repo:
    "One model: its commits, what its branches and tags are now, and who may see it."
    def __init__(self, gated=False, private=False):
        self.commits, self.branches, self.tags, self.messages = {}, {}, {}, {}
        self.gated, self.private = gated, private

    def commit(self, files, branch="main", message=""):
        "A state of the model; its hash follows from the content and from what came before."
        text = repr(sorted((k, hashlib.sha256(v).hexdigest()) for k, v in files.items())) + repr(self.branches.get(branch))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch], self.messages[sha] = dict(files), sha, message
        return sha

    def find(self, revision):
        "The commit of a branch, a tag or itself."
        return self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)

class Hub:
    "The server; what went over the wire is counted in `sent`, and faults are asked for by name of a file."
    def __init__(self):
        self.repos, self.blobs, self.sent, self.asked = {}, {}, [], []
        self.tokens = {"good": "write", "reader": "read"}
        self.cut, self.swapped, self.down, self.writes_fail = {}, {}, 0, 0 # path → bytes until the line breaks (each once); path → bytes sent instead; status
        hub = self
        class Bound(Handler): pass
        Bound.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, folder, branch="main", only=None, more=None, **who):
        "A folder as a state of a model."
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and (only is None or only(f))}
        return self.repos.setdefault(name, Repo(**who)).commit(files | (more or {}), branch)

    def bytes_of(self, name, ending=""):
        "What was sent of a model's files."
        return sum(n for path, n in self.sent if path.startswith(f"/{name}/resolve/") and path.endswith(ending))

def etag(path, data):
    "The hash by which the hub knows a file."
    if path.endswith(LARGE): return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self): self.answer()
    def do_HEAD(self): self.answer()
    def do_POST(self): self.answer()
    def do_PUT(self): self.answer()

    def answer(self):
        hub, url = self.hub, urlsplit(self.path)
        n = int(self.headers.get("Content-Length") or 0)
        self.body, self.query = self.rfile.read(n) if n else b"", parse_qs(url.query)
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""): self.body = self.chunks()
        path = url.path.strip("/")
        hub.asked.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.right = hub.tokens.get(token)
        if hub.down: return self.error(hub.down, "", "down for repairs")
        if token and self.right is None: return self.error(401, "", "Invalid credentials in Authorization header")
        parts = [unquote(p) for p in path.split("/")]
        if path == "api/whoami-v2": return self.json(dict(name="me", type="user"))
        if path == "api/validate-yaml": return self.json(dict(errors=[], warnings=[]))
        if path == "api/repos/create": return self.create()
        if parts[0] == "lfs": return self.large(parts[1])
        if path == "api/models": return self.json([dict(id=n, modelId=n, private=False, tags=[]) for n in hub.repos if n.split("/")[0] in self.query.get("author", [])])
        if parts[0] == "api": return self.model("/".join(parts[2:4]), parts[4:])
        if path.endswith(".git/info/lfs/objects/batch"): return self.batch()
        return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def chunks(self):
        out = b""
        while n := int(self.rfile.readline(), 16):
            out += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def repo(self, name, files=False):
        "A model that the caller may see; answered with an error else."
        repo = self.hub.repos.get(name)
        if repo is None or repo.private and self.right is None: return self.error(401 if self.right is None else 404, "RepoNotFound", "Repository not found")
        if files and repo.gated and self.right is None: return self.error(401, "GatedRepo", "Access to this model is restricted")
        return repo

    def model(self, name, rest):
        "What is known about a model, and what changes it."
        if (repo := self.repo(name)) is None: return
        what, rev, place = rest[0] if rest else "", rest[1] if len(rest) > 1 else "main", "/".join(rest[2:])
        if what in ("preupload", "commit", "branch"): return self.write(name, repo, what, rev)
        if what == "refs":
            def refs(known, kind): return [dict(name=n, ref=f"refs/{kind}/{n}", targetCommit=c) for n, c in known.items()]
            return self.json(dict(branches=refs(repo.branches, "heads"), tags=refs(repo.tags, "tags"), converts=[]))
        if (sha := repo.find(rev)) is None: return self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        files = sorted((f, data) for f, data in repo.commits[sha].items() if not place or f.startswith(place + "/"))
        if what == "tree":
            if not files: return self.error(404, "EntryNotFound", f"{place} does not exist")
            def entry(f, data): return dict(type="file", path=f, size=len(data), oid=etag(f, data)) | (dict(lfs=dict(oid=etag(f, data), size=len(data), pointerSize=130)) if f.endswith(LARGE) else {})
            return self.json([entry(*x) for x in files])
        siblings = [dict(rfilename=f, size=len(data), blobId=etag(f, data)) for f, data in files]
        return self.json(dict(id=name, modelId=name, sha=sha, siblings=siblings, tags=[], private=repo.private, gated=repo.gated, downloads=0, likes=0, safetensors=getattr(repo, "counted", None)))

    def resolve(self, name, rev, file):
        "A file, whole or in part."
        if (repo := self.repo(name, files=True)) is None: return
        if (sha := repo.find(rev)) is None: return self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        data = repo.commits[sha].get(file)
        if data is None: return self.error(404, "EntryNotFound", f"{file} does not exist", {"X-Repo-Commit": sha})
        head = {"ETag": f'"{etag(file, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes", "X-Linked-Size": str(len(data))}
        data = self.hub.swapped.get(file, data)
        if not (span := self.headers.get("Range")): return self.send(200, data, head, file)
        first, last = span.removeprefix("bytes=").split("-")
        part = data[int(first):int(last) + 1 if last else None]
        self.send(206, part, head | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}, file)

    def write(self, name, repo, what, rev):
        "Changes, for whoever may make them."
        if self.right != "write": return self.error(401 if self.right is None else 403, "", "You don't have the rights to write here")
        if what == "branch":
            if rev in repo.branches: return self.error(409, "", "Reference already exists")
            repo.branches[rev] = repo.branches["main"]
            return self.json({})
        if rev not in repo.branches: return self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        old = dict(repo.commits.get(repo.branches[rev], {}))
        if what == "preupload":
            asked = json.loads(self.body)["files"]
            def mode(f): return "lfs" if f.endswith(LARGE) else "regular"
            return self.json(dict(files=[dict(path=f["path"], uploadMode=mode(f["path"]), shouldIgnore=False, oid=etag(f["path"], old[f["path"]]) if f["path"] in old else None) for f in asked]))
        if self.hub.writes_fail: return self.error(self.hub.writes_fail, "", "no commits today")
        lines = [json.loads(line) for line in self.body.splitlines()]
        for x in lines:
            value = x["value"]
            if x["key"] == "file": old[value["path"]] = base64.b64decode(value["content"])
            elif x["key"] == "lfsFile": old[value["path"]] = self.hub.blobs[value["oid"]]
            elif x["key"] == "deletedFile": del old[value["path"]]
        sha = repo.commit(old, rev, lines[0]["value"]["summary"])
        self.json(dict(commitUrl=f"{self.hub.url}/{name}/commit/{sha}", commitOid=sha))

    def create(self):
        given = json.loads(self.body)
        name = f"{given['organization'] or 'me'}/{given['name']}"
        if self.right != "write": return self.error(401 if self.right is None else 403, "", f"You don't have the rights to create a model under {name}")
        if given["organization"] == "others": return self.error(403, "", "You don't have the rights to create a model under the namespace others")
        if name in self.hub.repos: return self.json(dict(error="You already created this model repo", url=f"{self.hub.url}/{name}"), 409)
        self.hub.repos[name] = repo = Repo(private=given.get("visibility") == "private")
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.json(dict(url=f"{self.hub.url}/{name}", id=name, name=name))

    def batch(self):
        "Where large files go; those that are here need not come again."
        if self.right != "write": return self.error(403, "", "You don't have the rights to write here")
        objects = json.loads(self.body)["objects"]
        def action(o): return {} if o["oid"] in self.hub.blobs else dict(actions=dict(upload=dict(href=f"{self.hub.url}/lfs/{o['oid']}")))
        self.json(dict(transfer="basic", objects=[dict(oid=o["oid"], size=o["size"]) | action(o) for o in objects]))

    def large(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid: return self.error(400, "", "the bytes do not fit their hash")
        self.hub.blobs[oid] = self.body
        self.send(200, b"", {}, "")

    def json(self, value, status=200): self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, "")

    def error(self, status, code, message, more={}):
        head = {"X-Error-Code": code} if code else {}
        self.send(status, json.dumps(dict(error=message)).encode(), head | {"X-Error-Message": message, "Content-Type": "application/json"} | more, "")

    def send(self, status, data, head, file):
        self.send_response(status)
        for k, v in ({"Content-Length": str(len(data))} | head).items(): self.send_header(k, v)
        self.end_headers()
        if self.command == "HEAD": return
        if (most := self.hub.cut.pop(file, None)) is not None: # once: the line breaks
            self.wfile.write(data[:most])
            self.wfile.flush()
            self.hub.sent.append((self.path, most))
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data)
        self.hub.sent.append((self.path, len(data)))
