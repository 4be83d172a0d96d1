"The doctor on models that lie on a hub: a small HTTP server speaks its protocol, the real client asks it, and the bytes sent are counted."
import hashlib, json, os, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from model_glue_nb.zoo.zoo import demo_zoo_path

MODELS = {f"org/{n}": demo_zoo_path()/n for n in ("a-base", "a-sort", "c-base")}

class Hub(BaseHTTPRequestHandler):
    "Model info, HEAD and GET with byte ranges, as the hub answers them."
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass

    def do_GET(self, body=True):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api" and (info := self.info("/".join(parts[2:4]))):
            return self.send(200, json.dumps(info).encode(), {}, body)
        file = MODELS.get("/".join(parts[:2])) if len(parts) > 4 and parts[2] == "resolve" else None
        if file is None or not (file := file/parts[4]).exists():
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        data = file.read_bytes()
        head = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if not (span := self.headers.get("Range")): return self.send(200, data, head, body)
        first, last = (int(x) for x in span.removeprefix("bytes=").split("-"))
        part = data[first:last + 1]
        self.send(206, part, head | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}, body)

    def do_HEAD(self): self.do_GET(body=False)

    def info(self, name):
        if name not in MODELS: return None
        files = [dict(rfilename=f.name, size=f.stat().st_size) for f in sorted(MODELS[name].iterdir())]
        return dict(id=name, modelId=name, sha="0" * 40, siblings=files, tags=[], downloads=0, likes=0, private=False)

    def send(self, code, data, head, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        for k, v in head.items(): self.send_header(k, v)
        self.end_headers()
        if body:
            self.wfile.write(data)
            self.server.sent.append((self.path, len(data)))

@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.sent = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

def ask(hub, tmp_path, *args):
    env = os.environ | dict(HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path/"cache"), NO_PROXY="127.0.0.1", HF_HUB_DISABLE_TELEMETRY="1")
    return subprocess.run([sys.executable, "-c", "from model_glue_nb.cli.program import main; main()", "doctor", *map(str, args)], env=env, capture_output=True, text=True)

def test_hub_ids_are_judged_by_their_headers(hub, tmp_path):
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text(f"- org/a-base\n- org/c-base\n- {demo_zoo_path()/'a-sort'}\n")
    r = ask(hub, tmp_path, zoo, "--json")
    assert r.returncode == 0, r.stderr
    rows = {x["model"]: x for x in json.loads(r.stdout)}
    local = json.loads(ask(hub, tmp_path, demo_zoo_path(), "--json").stdout)
    local = {x["model"]: x for x in local}
    for name in ("a-base", "c-base"):
        for k in ("architecture", "layers", "heads", "rope", "params", "bytes", "dtype", "tokenizer", "licence", "problem", "notes"):
            assert rows[name][k] == local[name][k], k
    assert rows["a-base"]["group"] == rows["a-sort"]["group"] != rows["c-base"]["group"]
    sent = {k: sum(n for p, n in hub.sent if p.endswith("safetensors") and k in p) for k in ("a-base", "c-base")}
    for name, n in sent.items(): # the first request asks for 100,000 bytes, where nearly every header ends
        size = (demo_zoo_path()/name/"model.safetensors").stat().st_size
        assert 0 < n <= 100_000 < size / 10, "headers alone are fetched"

def test_pairs_of_hub_ids(hub, tmp_path):
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text("- org/a-base\n- org/a-sort\n- org/c-base\n")
    r = ask(hub, tmp_path, zoo, "--pairs", "--json")
    assert r.returncode == 0, r.stderr
    found = {(x["a"], x["b"]): x["verdict"] for x in json.loads(r.stdout)}
    assert found == {("a-base", "a-sort"): "as is", ("a-base", "c-base"): "mix only", ("a-sort", "c-base"): "mix only"}

def test_a_long_header_takes_a_second_request(hub, tmp_path, monkeypatch):
    import numpy as np
    from safetensors.numpy import save_file
    import shutil
    big = shutil.copytree(MODELS["org/a-base"], tmp_path/"big")
    save_file({f"model.layers.0.x{i}" + "y" * 100: np.zeros(1, np.float32) for i in range(1500)}, big/"model.safetensors")
    monkeypatch.setitem(MODELS, "org/big", big)
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text("- org/big\n")
    r = ask(hub, tmp_path, zoo, "--json")
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)[0]["params"] == 1500

def test_a_wrong_id_is_one_message(hub, tmp_path):
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text("- org/nobody\n")
    r = ask(hub, tmp_path, zoo)
    assert r.returncode == 2 and "could not be fetched" in r.stderr and "Traceback" not in r.stderr

def test_a_hub_that_cannot_be_reached_is_one_message(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    zoo = tmp_path/"zoo.yaml"
    zoo.write_text("- org/a-base\n")
    r = ask(hub, tmp_path, zoo)
    assert r.returncode == 2 and "Check the name, the network" in r.stderr and "Traceback" not in r.stderr
