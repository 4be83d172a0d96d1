"A mixture of differences as base, PEFT folders and router: the command and the Python of its card do what our own mixture does."
import http.server, json, re, shlex, threading
import pytest, torch
import yaml
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.merging.differences import extract
from model_glue_nb.mixing.mixture import mix, read_mixture
from model_glue_nb.mixing.spec import MixtureSpec, check_mixture_spec
from model_glue_nb.zoo.serving import unserved
from model_glue_nb.zoo.zoo import read_zoo

EXPERTS = "a-base", "a-sort", "a-reverse", "b-swap"
PROMPTS = ["put LIFWCB in order =", "reverse ABCD =", "MLRIP as in a dictionary =", "swap ABCD ="]

def block(card, kind): return re.search(rf"```{kind}\n(.*?)```", card, re.S)[1]

@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    spec = MixtureSpec(EXPERTS, dict(name="linear"), level="adapter", bases=("a-base",), difference=dict(rank=5, linear=True))
    suite = load_suite("demo").only(["sort", "reverse", "swap"]).part("search", 10)
    return mix(spec, read_zoo("demo"), tmp_path_factory.mktemp("served")/"m", suite)

@pytest.fixture(scope="module")
def card(mixture): return (mixture.path/"README.md").read_text()

@pytest.fixture(scope="module")
def servers(card):
    "Flags of each command, as a shell reads them."
    def parse(line):
        words = shlex.split(line)
        assert words[:2] == ["vllm", "serve"]
        flags, at = {}, None
        for w in words[3:]:
            at = w if w.startswith("--") else at
            flags.setdefault(at, []).append(w) if w != at else flags.setdefault(at, [])
        return words[2], flags
    return [parse(line) for line in block(card, "sh").splitlines()]

@pytest.fixture(scope="module")
def live(mixture): return mixture.load("cpu")

def with_peft(base, adapter):
    "A base and an adapter, as everybody loads them."
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(base), PeftModel.from_pretrained(model, adapter).eval() if adapter else model

def continued(loaded, prompt, n=8):
    tokenizer, model = loaded
    x = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad(): y = model.generate(input_ids=x, max_new_tokens=n, do_sample=False)
    return tokenizer.decode(y[0, x.shape[1]:], skip_special_tokens=True)

def test_the_command_names_folders_that_are_there_and_flags_that_vllm_knows(mixture, servers):
    assert [s[1]["--port"] for s in servers] == [["8000"], ["8001"]] and all((mixture.path/path/"config.json").exists() for path, _ in servers)
    path, flags = servers[0]
    assert flags["--enable-lora"] == [] and flags["--max-loras"] == ["2"] and flags["--served-model-name"] == ["a-base"]
    modules = dict(m.split("=") for m in flags["--lora-modules"])
    assert modules == {"a-sort": "adapters/a-sort", "a-reverse": "adapters/a-reverse"}
    ranks = [json.loads((mixture.path/f/"adapter_config.json").read_text()) for f in modules.values()]
    most, reserved = max(max(r["rank_pattern"].values()) for r in ranks), int(flags["--max-lora-rank"][0])
    assert reserved in (8, 16, 32, 64, 128, 256, 320, 512) and most <= reserved
    assert "--enable-lora" not in servers[1][1] and servers[1][1]["--served-model-name"] == ["b-swap"]

def test_each_adapter_says_with_peft_what_the_mixture_says(mixture, servers, live):
    path, flags = servers[0]
    for module in flags["--lora-modules"]:
        name, folder = module.split("=")
        config = json.loads((mixture.path/folder/"adapter_config.json").read_text())
        assert config["modules_to_save"] is None and config["bias"] == "none" and not any("embed" in m for m in config["target_modules"])
        loaded = with_peft(mixture.path/path, mixture.path/folder)
        expert = live.expert(EXPERTS.index(name))
        got = [continued(loaded, p) for p in PROMPTS]
        assert got == expert.generate(PROMPTS, 8) and got != live.expert(0).generate(PROMPTS, 8)

def test_the_python_of_the_card_gets_the_mixtures_answers(mixture, servers, live, card, monkeypatch, capsys):
    "Requests go to servers that answer with PEFT, by the names of the command."
    homes, loaded = [], {}
    class Engine(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path, flags = self.server.served
            adapters = dict(m.split("=") for m in flags.get("--lora-modules", []))
            known = {flags["--served-model-name"][0]: None} | {n: mixture.path/f for n, f in adapters.items()}
            key = asked["model"], path
            if key not in loaded: loaded[key] = with_peft(mixture.path/path, known[asked["model"]])
            text = continued(loaded[key], asked["prompt"], asked["max_tokens"])
            self.send_response(200), self.end_headers()
            self.wfile.write(json.dumps(dict(choices=[dict(text=text)])).encode())
    code = block(card, "python").replace("max_tokens=32", "max_tokens=8")
    for served in servers:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine)
        server.served = served
        threading.Thread(target=server.serve_forever, daemon=True).start()
        homes.append(server)
        code = code.replace(f"localhost:{served[1]['--port'][0]}", f"127.0.0.1:{server.server_port}")
    monkeypatch.chdir(mixture.path)
    try:
        for prompt in PROMPTS:
            exec(code.replace('"…"', repr(prompt)), {})
            assert capsys.readouterr().out == live.generate([prompt], 8)[0] + "\n"
    finally: [s.shutdown() for s in homes]
    assert len(loaded) > 1

def test_what_an_engine_cant_read_is_named_with_the_way_out(tmp_path):
    spec = MixtureSpec(("a-base", "a-sort"), dict(name="random"), level="adapter", bases=("a-base",), difference=dict(rank=5))
    card = (mix(spec, read_zoo("demo"), tmp_path/"m").path/"README.md").read_text()
    assert "Not served: a-sort." in card and "modules are stored whole" in card and "linear: true" in card
    assert "--enable-lora" not in card and "| a-base | http://localhost:8000 | `a-base` |" in card

def test_linear_layers_alone(tmp_path):
    zoo = read_zoo("demo")
    whole, linear = (extract(zoo["a-sort"], zoo["a-base"], tmp_path/str(i), rank=5, linear=bool(i)) for i in (0, 1))
    assert unserved(tmp_path/"0") and not unserved(tmp_path/"1") and linear.unsaid > whole.unsaid
    assert {p.kind for p in linear.parts if p.rank} == {"linear"} and not any("norm" in p.module for p in linear.parts if p.n_bytes)

@pytest.mark.parametrize("difference, says", [(dict(rank=4, linear="yes"), "Give true or false"), (dict(linear=True), "No budget came"), (dict(rank=4, linaer=True), "Did you mean 'linear'")])
def test_bad_differences_are_refused(difference, says):
    spec = MixtureSpec(("a", "b"), dict(name="linear"), level="adapter", base="a", difference=difference)
    assert says in " ".join(check_mixture_spec(spec))

def test_a_recipe_of_a_mixture_may_say_its_differences(tmp_path):
    zoo = read_zoo("demo")
    said = dict(zoo=[str(zoo[n].path) for n in EXPERTS], level="adapter", bases=["a-base"], difference=dict(rank=4, linear=True))
    (tmp_path/"m.yaml").write_text(yaml.safe_dump(said))
    spec, *_ = read_mixture(tmp_path/"m.yaml")
    assert spec.bases == ("a-base",) and spec.difference == dict(rank=4, linear=True)
