"Structure-aware fuzzing of every file that people give us: `make fuzz` tries 100,000 inputs and writes what it saw."
import argparse, base64, contextlib, copy, io, json, multiprocessing, os, pickle, random, re, resource, select, shutil, signal, sqlite3, struct
import sys, tempfile, time, traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

SECONDS, MEMORY, INPUTS = 5, 10**9, 500 # Limits of one input; inputs per forked child
HIDDEN, INNER, WORDS, LAYERS = 32, 48, 64, 2

# --- a tiny checkpoint, written without torch

def shapes():
    "Names and shapes of a two-layer Llama."
    found = {"lm_head.weight": (WORDS, HIDDEN), "model.embed_tokens.weight": (WORDS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    layer = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "mlp.down_proj": (HIDDEN, INNER),
             "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "self_attn.q_proj": (HIDDEN, HIDDEN),
             "self_attn.k_proj": (16, HIDDEN), "self_attn.v_proj": (16, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    for i in range(LAYERS): found |= {f"model.layers.{i}.{k}.weight": v for k, v in layer.items()}
    return found

def header_of(sizes):
    "A safetensors header of some bf16 tensors, and how many bytes follow it."
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for k, shape in sizes.items():
        n = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[k] = dict(dtype="BF16", shape=list(shape), data_offsets=[at, at + n])
        at += n
    return header, at

def weights(header, n, seed=0):
    "A safetensors file."
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    draw = random.Random(seed)
    body = b"".join(struct.pack("<H", 0x3c00 | draw.randrange(256) | draw.randrange(2) << 15) for _ in range(n // 2))
    return struct.pack("<Q", len(head)) + head + body

CONFIG = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=HIDDEN, intermediate_size=INNER,
              num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=WORDS,
              max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1,
              rms_norm_eps=1e-6, hidden_act="silu", dtype="bfloat16", rope_parameters=dict(rope_theta=1e4, rope_type="default"))
VOCAB = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, WORDS)}
TOKENIZER = dict(version="1.0", truncation=None, padding=None, added_tokens=[dict(
    id=1, content="</s>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)], normalizer=None,
    pre_tokenizer=dict(type="Whitespace"), post_processor=None, decoder=None,
    model=dict(type="WordLevel", vocab=VOCAB, unk_token="<unk>"))
TOKENIZER_CONFIG = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                        pad_token="</s>", model_max_length=128, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
                        added_tokens_decoder={"1": dict(content="</s>", special=True)})
ADAPTER = dict(peft_type="LORA", base_model_name_or_path="a", r=4, lora_alpha=8, target_modules=["q_proj"], bias="none",
               fan_in_fan_out=False, modules_to_save=None, rank_pattern={}, alpha_pattern={}, use_rslora=False)
CARD = dict(license="apache-2.0", base_model="a", tags=["merge", "model_glue_nb"], language=["en"])
QUESTIONS = [dict(question=f"w{i} w{i + 1}", answer=f"w{i + 2}") for i in range(3, 33)]

def member(folder, seed=0):
    "A model folder."
    folder.mkdir(parents=True)
    (folder/"model.safetensors").write_bytes(weights(*header_of(shapes()), seed))
    for name, content in (("config", CONFIG), ("tokenizer", TOKENIZER), ("tokenizer_config", TOKENIZER_CONFIG)):
        (folder/f"{name}.json").write_text(json.dumps(content))

def prepare(root):
    "What valid files refer to: two members, an adapter, a suite."
    member(root/"zoo"/"a")
    member(root/"zoo"/"b", 1)
    adapter = root/"adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    sizes = {name.format("A"): (4, HIDDEN), name.format("B"): (HIDDEN, 4)}
    (adapter/"adapter_model.safetensors").write_bytes(weights(*header_of(sizes)))
    (adapter/"adapter_config.json").write_text(json.dumps(ADAPTER))
    (root/"suite").mkdir()
    (root/"suite"/"q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (root/"suite"/"suite.yaml").write_text(
        json.dumps(dict(name="s", search_share=.4, tasks=[dict(name="t", file="q.jsonl")])))
    merge = dict(merge_method="linear", models=["zoo/a", "zoo/b"])
    (root/"merge.yaml").write_text(json.dumps(merge))
    (root/"lora.yaml").write_text(json.dumps(merge | dict(models=["zoo/a+adapter", "zoo/b"])))
    (root/"list.yaml").write_text('["zoo/a", "zoo/b"]')

# --- a valid document of each format, where it lies, and the commands that read it

MERGE = dict(merge_method="ties", base_model="zoo/a", models=[
    dict(model="zoo/a"),
    dict(model="zoo/b",
         parameters=dict(weight=[.2, 1], density=[dict(filter="mlp", value=.5), dict(value=1)]))],
    parameters={"normalize": True, "lambda": .9}, dtype="bfloat16", tokenizer=dict(source="union", pad_to_multiple_of=8), seed=1)
SLICES = dict(merge_method="passthrough", slices=[dict(sources=[dict(model="zoo/a", layer_range=[0, 1])]),
                                                  dict(sources=[dict(model="zoo/b", layer_range=[0, 2])])])
RUN = dict(zoo="zoo", suite="suite/suite.yaml", tasks=["t"], search_questions=4, clusters=dict(threshold=.9, linkage="average"),
           merge=dict(methods=["linear", "ties"], strategy="coefficient", budget="5q", options=dict(steps=3), executor="local"),
           mixture=dict(level="model", router=dict(name="knn", k=3), dense_layers=0, max_experts=2), seed=1)
MIXTURE = dict(experts=["a", "b"], zoo="zoo",
               router=dict(name="linear", C=1.0),
               level="block", base="a", dense_layers=1, top_k=1,
               input="sample", pooling="mean", suite="suite/suite.yaml", search_questions=3, copy=False)
SUITE = dict(name="s", description="d", search_share=.4, seed=2, tasks=[
    dict(name="t", file="q.jsonl", max_new_tokens=3, stop=["\n"], metric="exact_match", version=1, weight=1., limit=30)])
GRID = dict(suite="suite/suite.yaml", tasks=["t"], search_questions=4, clusters=dict(threshold=.9, linkage="average"),
            merging=dict(methods=["linear"],
                         strategies=dict(average={}, coefficient=dict(steps=3)),
                         sizes=[2], budget=4, max_clusters=1),
            mixture=dict(levels=["model", "ffn"], routers=["random"], dense_layers=[0, .5], experts=2), seed=3)
RESULTS = {"results": {"arc": {"alias": "arc", "acc,none": .5, "acc_stderr,none": .1}}, "n-samples": {"arc": {"effective": 9}},
           "configs": {"arc": {"task": "arc"}}, "versions": {"arc": 1}, "config": {"model_args": "x"}, "model_name": "m"}
INDEX = dict(metadata=dict(total_size=1), weight_map=dict.fromkeys(shapes(), "model.safetensors"))
DOCTOR, DRY = ["doctor", "zoo"], ["merge", "merge.yaml", "out", "--dry-run"] # a dry run measures the machine: slow
SCORE = ["score", "zoo", "--suite", "suite/suite.yaml", "--dry-run"]
REAL = ["merge", "merge.yaml", "out", "--overwrite"]
FORMATS = { # name → (documents, file, how it is written, commands)
    "header": ([header_of(shapes())[0]], "zoo/b/model.safetensors", "header", [DOCTOR, REAL, DOCTOR, REAL, DOCTOR, REAL, REAL, DRY]),
    "index": ([INDEX], "zoo/b/model.safetensors.index.json", "json", [DOCTOR, REAL, DOCTOR, REAL, DOCTOR, REAL, REAL, DRY]),
    "config": ([CONFIG], "zoo/b/config.json", "json", [DOCTOR, REAL, SCORE, DOCTOR, REAL, SCORE, REAL, DRY]),
    "tokenizer": ([TOKENIZER], "zoo/b/tokenizer.json", "json", [DOCTOR, REAL, SCORE, DOCTOR, REAL, SCORE, REAL, DRY]),
    "tokenizer_config": ([TOKENIZER_CONFIG], "zoo/b/tokenizer_config.json", "json", [DOCTOR, REAL, SCORE, DOCTOR, REAL, SCORE, REAL, DRY]),
    "adapter": ([ADAPTER], "adapter/adapter_config.json", "json", [
        ["merge", "lora.yaml", "out", "--overwrite"]] * 7 + [["merge", "lora.yaml", "out", "--dry-run"]]),
    "card": ([CARD], "zoo/b/README.md", "card", [DOCTOR, REAL, ["doctor", "zoo", "--pairs", "--json"]]),
    "merge": ([MERGE, SLICES], "x.yaml", "yaml", [
        ["merge", "x.yaml", "out", "--overwrite"]] * 7 + [["merge", "x.yaml", "out", "--dry-run"]]),
    "run": ([RUN], "x.yaml", "yaml", [["run", "x.yaml", "--out", "run", "--dry-run"]]),
    "mixture": ([MIXTURE], "x.yaml", "yaml", [["mix", "x.yaml", "out", "--dry-run"]]),
    "suite": ([SUITE], "suite/suite.yaml", "yaml", [SCORE]),
    "questions": ([QUESTIONS[:6]], "suite/q.jsonl", "lines", [SCORE]),
    "grid": ([GRID], "x.yaml", "yaml", [["bench", "nowhere", "--grid", "x.yaml", "--out", "run"]]),
    "store": ([["a", "t", "v", "q", "m", .5, "w1"]], "run/store.sqlite", "store", [
        ["score", "zoo", "--suite", "suite/suite.yaml", "--out", "run", "--dry-run"]]),
    "results": ([RESULTS], "results_x.json", "json", [["import", "results_x.json"], ["import", "results_x.json", "--json"]]),
    "table": ([[["model", "arc", "gsm8k"], ["a", .5, .25], ["b", 1, 0]],
               [["model", "task", "score"], ["a", "arc", .5]]],
              "x.csv", "csv", [["import", "x.csv"], ["import", "x.csv", "--json"]]),
    "zoo_list": ([["zoo/a", "zoo/b"]], "list.yaml", "yaml", [["doctor", "list.yaml"]])}

def written(document, how):
    "A document as bytes."
    if isinstance(document, bytes): return document
    def dumped(x): return json.dumps(x, default=str).encode("utf-8", "surrogatepass")
    if how == "header":
        head = dumped(document)
        return (struct.pack("<Q", len(head)) + head
                + weights(*header_of(shapes()))[8 + len(dumped(header_of(shapes())[0])):])
    if how == "card": return b"---\n" + dumped(document) + b"\n---\n# A card\n"
    if how == "lines": return b"\n".join(map(dumped, document if isinstance(document, list) else [document]))
    if how == "csv":
        rows = document if isinstance(document, list) else [document]
        def line(r): return ",".join(map(str, r)) if isinstance(r, list) else str(r)
        return "\n".join(map(line, rows)).encode("utf-8", "surrogatepass")
    if how == "store": return database(document)
    return dumped(document) # JSON is YAML

def database(row):
    "A results store with one row of any shape."
    with tempfile.TemporaryDirectory() as d:
        db = sqlite3.connect(f"{d}/x")
        row = row if isinstance(row, list) else [row]
        def fits(x):
            return x if isinstance(x, (str, float)) or isinstance(x, int) and abs(x) < 2**63 else repr(x)[:100]
        row = [fits(x).encode("utf-8", "replace").decode() if isinstance(x, str) else fits(x) for x in row]
        names = "model task version question metric value answer more".split()[:max(1, len(row))]
        db.execute(f"create table results ({','.join(names)})")
        with contextlib.suppress(sqlite3.Error):
            db.execute(f"insert into results values ({','.join('?' * len(names))})", row[:len(names)])
        db.commit()
        db.close()
        return Path(f"{d}/x").read_bytes()

# --- mutations, drawn by hypothesis so that it can shrink them

ODD = (None, True, False, 0, 1, -1, 1.5, -0.5,
       3, 64, 10**6, 2**31, 2**63, -2**63,
       10**400, 1e308, float("nan"), float("inf"), "", "x",
       "0.5", "64", "../../x", "/etc/passwd", "a\0b", "\x1b[31mred", "[/]", "=1+1", "\ud800", "\u202e", "x" * 300, "y" * 5000, "*", "(",
       "auto", "union", "base", "none", "zoo/a", "a", [], [1],
       ["x"], [[]], [None], {},
       {"a": 1}, {"x": {}}, [{"value": None}],
       [{"filter": "x"}], {"name": "knn"}, [0] * 400)

def strategies():
    "Edits of a document, and edits of its bytes."
    from hypothesis import strategies as st
    odd = st.sampled_from(ODD)
    where = st.integers(0, 400)
    value = odd | odd | st.integers() | st.floats() | st.text(max_size=12) | st.recursive(
        odd, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5)
    edit = (st.tuples(st.just("replace"), where, value) | st.tuples(st.just("replace"), where, odd)
            | st.tuples(st.just("delete"), where, st.none()) | st.tuples(st.just("rename"), where, odd)
            | st.tuples(st.just("extra"), where, value) | st.tuples(st.just("swap"), where, where)
            | st.tuples(st.just("wrap"), where, st.integers(1, 3))
            | st.tuples(st.just("deep"), where, st.sampled_from((50, 900, 3000)))
            | st.tuples(st.just("repeat"), where, st.integers(1, 50)))
    raw = (st.tuples(st.just("cut"), st.integers(0, 20_000), st.none())
           | st.tuples(st.just("flip"), st.integers(0, 20_000), st.integers(0, 255))
           | st.tuples(st.just("insert"), st.integers(0, 20_000), st.binary(max_size=6))
           | st.tuples(st.just("encode"), st.just(0), st.sampled_from(("utf-16", "utf-8-sig", "latin-1", "utf-32"))))
    edits = st.lists(edit, min_size=1, max_size=3)
    return st.tuples(edits,
                     st.just([])) | st.tuples(edits, st.just([])) | st.tuples(edits, st.just([])) | st.tuples(
 st.lists(edit, max_size=1), st.lists(raw, min_size=1, max_size=3))

def places(document, holder=None, key=None):
    "Every value of a document with the container and key where it stands."
    out = [(holder, key, document)]
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for k, v in items: out += places(v, document, k)
    return out

def edited(document, edits):
    "A document after some edits; depth is made as text, since no value that deep can be copied."
    holder = [json.loads(json.dumps(document))]
    for what, at, value in edits:
        found = places(holder[0], holder, 0)
        if len(found) > 5000: break
        parent, key, old = found[at % len(found)]
        value = copy.deepcopy(value) # a later edit must not change what other examples are given
        if what == "replace": parent[key] = value
        elif what == "delete" and parent is not holder: del parent[key]
        elif what == "rename" and isinstance(parent, dict): parent[str(value)] = parent.pop(key)
        elif what == "extra" and isinstance(old, dict): old[f"x{at}"] = value
        elif what == "extra" and isinstance(old, list): old.append(value)
        elif what == "swap": parent[key] = json.loads(json.dumps(found[value % len(found)][2]))
        elif what == "wrap": parent[key] = [old] if value == 1 else {"x": old} if value == 2 else [old, old]
        elif what == "repeat" and isinstance(old, list): parent[key] = old * value
        elif what == "deep": parent[key] = f"@deep{value}@"
    return holder[0]

def content(name, choice, edits, raw):
    "The bytes of one input."
    documents, _, how, _ = FORMATS[name]
    made = written(edited(documents[choice % len(documents)], edits), how)
    if how != "store":
        def deep(m): return b"[" * int(m[1]) + b"]" * int(m[1])
        made = re.sub(rb'"@deep(\d+)@"', deep, made)
    for what, at, value in raw:
        at = at % (len(made) + 1)
        if what == "cut": made = made[:at]
        elif what == "flip" and made:
            made = made[:at % len(made)] + bytes([value]) + made[at % len(made) + 1:]
        elif what == "insert": made = made[:at] + value + made[at:]
        elif what == "encode": made = made.decode("utf-8", "replace").encode(value, "replace")
    return made

# --- one input in a forked child

WRITES = {"os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"}

class Worker:
    "Children that run command lines; each is watched and replaced when it dies."
    def __init__(self):
        self.room = tempfile.TemporaryDirectory(prefix="fuzz_")
        self.base, self.root, self.pid = Path(self.room.name)/"valid", Path(self.room.name)/"root", None
        self.base.mkdir()
        prepare(self.base)
        shutil.copytree(self.base, self.root)
        os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(self.root/"cache"), HOME=str(self.root),
                           TERM="dumb", COLUMNS="200", TMPDIR=str(self.root/"tmp"), TOKENIZERS_PARALLELISM="false")
        self.warm()

    def warm(self):
        "What every child needs is imported and compiled once, before the first fork, by running each command."
        sys.dont_write_bytecode = True # it would be a write outside
        import torch, transformers.models.auto # what an odd config needs
        import typer.main
        from model_glue_nb.cli.program import main
        here, built = os.getcwd(), {}
        build = typer.main.get_command # typer builds all commands anew at each call, which takes longer than most of them
        typer.main.get_command = lambda app: built.setdefault(id(app), build(app))
        os.chdir(self.root)
        try:
            for documents, file, how, commands in FORMATS.values():
                (self.root/file).parent.mkdir(exist_ok=True)
                (self.root/file).write_bytes(written(documents[0], how))
                for args in {tuple(c): c for c in commands}.values():
                    kind, text = self.command(main, args)
                    if kind not in ("exit 0", "exit 2"):
                        print(f"valid {file}: {' '.join(args)}: {kind}", file=sys.stderr)
                self.restore(file)
        finally: os.chdir(here)

    def start(self):
        ask, self.ask = os.pipe()
        self.answer, answer = os.pipe()
        self.pid = os.fork()
        self.n = 0
        if self.pid:
            os.close(ask)
            os.close(answer)
            return
        os.close(self.ask)
        os.close(self.answer)
        try: self.serve(os.fdopen(ask, "rb"), answer)
        finally: os._exit(0)

    def serve(self, ask, answer):
        os.chdir(self.root)
        (self.root/"tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(self.root/"tmp")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY,) * 2)
        home, outside = os.path.realpath(self.root) + os.sep, []
        def hook(event, args):
            if event == "open":
                path, mode, flags = args
                if not isinstance(path, (str, bytes)) or not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    return
                paths = [path]
            elif event in WRITES: paths = [p for p in args[:2] if isinstance(p, (str, bytes))]
            else: return
            for p in map(os.fsdecode, paths):
                if p != os.devnull and not (os.path.realpath(p) + os.sep).startswith(home):
                    outside.append(f"{event} {p}")
        sys.addaudithook(hook)
        from model_glue_nb.cli.program import main
        signal.signal(signal.SIGALRM, signal.SIG_DFL) # not that of whoever started us
        while line := ask.readline():
            args, outside[:] = json.loads(line), []
            signal.alarm(SECONDS)
            kind, text = self.command(main, args)
            signal.alarm(0)
            if outside: kind = f"WRITES {outside[0]}"
            os.write(answer, (json.dumps([kind, text[-2000:]]) + "\n").encode())

    def command(self, main, args):
        said = io.StringIO()
        sys.argv = ["model-glue", *args]
        kind = "exit 0"
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try: main()
            except SystemExit as e: kind = f"exit {e.code or 0}"
            except BaseException as e: kind = f"TRACEBACK {type(e).__name__} at {home_of(e)}: {str(e)[:80]}"
        text = said.getvalue()
        if kind == "exit 1": kind = "FAULT " + " ".join(text.split())[-200:]
        if "Traceback (most recent call last)" in text: kind = "TRACEBACK printed"
        if "\x1b" in text: kind = "ESCAPE reaches the terminal"
        return kind, text

    def stop(self):
        if self.pid:
            for f in (self.ask, self.answer): os.close(f)
            with contextlib.suppress(ProcessLookupError): os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None

    def __call__(self, name, made, command):
        "What happens to one input: 'exit 0', 'exit 2', or what must not happen."
        _, file, _, commands = FORMATS[name]
        path = self.root/file
        path.parent.mkdir(exist_ok=True)
        if path.is_symlink() or path.exists(): path.unlink()
        path.write_bytes(made)
        try: return self.run(commands[command % len(commands)])
        finally: self.restore(file)

    def restore(self, file):
        "Put the valid file back, take away what was made."
        valid = self.base/file
        if valid.exists(): shutil.copyfile(valid, self.root/file)
        else: (self.root/file).unlink(missing_ok=True)
        for extra in ("out", "run", "cache"): shutil.rmtree(self.root/extra, ignore_errors=True)

    def run(self, args):
        if self.pid and self.n >= INPUTS: self.stop()
        if not self.pid: self.start()
        self.n += 1
        os.write(self.ask, (json.dumps(args) + "\n").encode())
        got, end = b"", time.monotonic() + 4 * SECONDS
        while not got.endswith(b"\n"):
            ready = select.select([self.answer], [], [], max(0, end - time.monotonic()))[0]
            part = os.read(self.answer, 65536) if ready else b""
            if not part: break
            got += part
        if got.endswith(b"\n"): return json.loads(got)[0]
        os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        self.pid = None
        for f in (self.ask, self.answer): os.close(f)
        return f"HANG over {SECONDS} s" if status & 127 in (signal.SIGALRM, signal.SIGKILL) else f"DIED by signal {status & 127}"

def home_of(error):
    "File and function of the package where an error came from."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "model_glue_nb" in f.filename]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].name}" if frames else "?"

def good(kind): return kind in ("exit 0", "exit 2")

def search(name, n, worker, seed=None, seen=None):
    "Try n inputs of one format; gives Counter of outcomes and the first input of each kind of failure."
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded, strategies as st
    counts, failed = Counter(), {}
    def one(choice, command, edits):
        made = content(name, choice, *edits)
        kind = worker(name, made, command)
        counts[kind if good(kind) else "bad"] += 1
        label = re.sub(r"\d+|'.*?'", "#", kind)[:90]
        if not good(kind) and (label not in failed or len(made) < len(failed[label][1])):
            failed[label] = (kind, made, command)
    test = given(st.integers(0, 3), st.integers(0, 7), strategies())(one)
    test = settings(max_examples=n, database=None, deadline=None, derandomize=seed is None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))(test)
    if seed is not None: test = seeded(seed)(test)
    test()
    return counts, failed

def tried(name, n_inputs, seed):
    "One format in a process of its own: (name, counts, findings, seconds)."
    worker, start = Worker(), time.monotonic()
    try: counts, failed = search(name, n_inputs, worker, seed)
    finally:
        worker.stop()
        worker.room.cleanup()
    return name, counts, failed, time.monotonic() - start

def main():
    p = argparse.ArgumentParser()
    p.add_argument("--inputs", type=int, default=100_000)
    p.add_argument("--formats", nargs="*", default=list(FORMATS))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--findings")
    p.add_argument("--report")
    p.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that try at once")
    a = p.parse_args()
    total, began, bad = Counter(), time.monotonic(), {}
    pool = ProcessPoolExecutor(a.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    each = a.inputs // len(a.formats)
    parts = max(1, min(each // 1000, -(-4 * a.jobs // len(a.formats)))) # what is slow must not be last
    tasks = [pool.submit(tried, name, each // parts + (i < each % parts), a.seed * 1000 + i)
             for i in range(parts)
             for name in a.formats]
    for task in as_completed(tasks):
        name, counts, failed, spent = task.result()
        total += counts
        print(f"{name:17} {sum(counts.values()):7,} inputs  accepted {counts['exit 0']:6,}  refused {counts['exit 2']:6,}"
              f"  bad {counts['bad']:5,}  {sum(counts.values()) / spent:6.0f}/s", flush=True)
        for kind, made, command in failed.values():
            if (name, kind) in bad: continue
            bad[name, kind] = made
            print(f"    {kind[:200]!r}  {' '.join(FORMATS[name][3][command % len(FORMATS[name][3])])}  {made[:120]!r}", flush=True)
            if a.findings:
                with open(a.findings, "a") as f:
                    f.write(f"{name} | {kind[:200]!r} | {FORMATS[name][3][command % len(FORMATS[name][3])]} | {base64.b64encode(made[:1500]).decode()}\n")
    pool.shutdown()
    n = sum(total.values())
    line = (f"{n:,} inputs of {len(a.formats)} formats in {time.monotonic() - began:,.0f} s: {total['exit 0']:,} accepted, "
            f"{total['exit 2']:,} refused in words, {total['bad']:,} bad (tracebacks, hangs over {SECONDS} s, over 1 GB, writes outside).")
    print(line)
    if a.report:
        Path(a.report).write_text(f"# Reliability\n\n`make fuzz` (`tools/fuzz.py --inputs {a.inputs} --seed {a.seed}`): {line}\n")
    return 1 if bad else 0

if __name__ == "__main__": sys.exit(main())
