"What people, pipes and programs see: tables of 80 columns, TSV, JSON, stages, help; and the one judgement of a pair."
import json, os, re, shutil, subprocess, sys
from typing import get_args

import pytest
import typer
from rich.cells import cell_len

from forked import MAIN

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LONG = [f"Meta-Llama-3.1-8B-Instruct-finetuned-on-{i:02}-maths-v0.{i}" for i in range(15)]
JAPANESE = [f"日本語の言語モデル・第{i}版・とても長い名前の微調整" for i in range(15)]

@pytest.fixture(scope="module")
def named(tmp_path_factory):
    "Thirty models with names as the hub has them, and Japanese ones; every third is a stranger."
    from model_glue_nb.zoo.zoo import tiny_zoo
    source, home = tiny_zoo(tmp_path_factory.mktemp("source"), ["a", "b"]), tmp_path_factory.mktemp("named")
    for i, name in enumerate(LONG + JAPANESE): shutil.copytree(source["b" if i % 3 == 2 else "a"].path, home/name)
    return home

@pytest.fixture
def shown(command, monkeypatch):
    "Runs a command as in a terminal of some columns: lines of standard output, without colors."
    def run(*args, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        code, out, err = command(*args)
        assert code == 0, err
        return [line.rstrip() for line in ESCAPES.sub("", out).splitlines()]
    return run

def in_pty(*args, columns=80):
    "All that a real terminal of some columns gets."
    import fcntl, pty, struct, termios
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | dict(TERM="xterm")
    p = subprocess.Popen([sys.executable, "-c", MAIN, *map(str, args)], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    out = b""
    while True:
        try: more = os.read(ours, 65536)
        except OSError: break # the other end is closed
        if not more: break
        out += more
    assert p.wait() == 0, out.decode()
    return ESCAPES.sub("", out.decode())

# ---- tables

@pytest.mark.parametrize("columns", [80, 60, 120])
@pytest.mark.parametrize("args", [("similarity",), ("clusters",), ("doctor",), ("similarity", "--by", "role"), ("doctor", "--pairs", "--headers")], ids=" ".join)
def test_a_table_fits_and_says_how_to_see_more(shown, named, args, columns):
    lines = shown(args[0], named, *args[1:], columns=columns)
    body = [line for line in lines if str(named) not in line] # a path stays whole
    assert max(map(cell_len, body)) <= columns
    whole = all(n in "\n".join(lines) for n in LONG)
    assert any("--wide or --json" in line for line in lines) != (whole and args != ("similarity",))

def test_no_number_is_folded(shown, named):
    lines = shown("similarity", named)
    rows = [line for line in lines if re.match(r" *\d+  ", line)]
    assert len(rows) == 30
    for row in rows: assert all(re.fullmatch(r"-?\d\.\d{3}", x) for x in row.split()[2:]), row
    names = [row.split()[1] for row in rows]
    assert len({*names}) == 30, "names stay different when they are cut"
    assert re.search(r"^\d+ columns more, names are shortened: --wide or --json$", lines[-1])

def test_wide_shows_everything(shown, named):
    lines = shown("similarity", named, "--wide")
    assert all(n in "\n".join(lines) for n in LONG + JAPANESE) and not any("more" in line for line in lines)
    assert len(lines[2].split()) == 31

def test_a_real_terminal_gets_no_line_that_is_too_long(named):
    text = in_pty("similarity", named)
    lines = text.rstrip().replace("\r", "\n").splitlines()
    assert max(map(cell_len, lines)) <= 80 and "--wide or --json" in lines[-1]

def test_a_pipe_gets_tab_separated_text(command, named):
    code, out, err = command("similarity", named)
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and "\r" not in err and "column_cosine" in err and "\x1b" not in out + err
    assert rows[0] == ["model", *sorted(LONG + JAPANESE)] and {len(r) for r in rows} == {31} and len(rows) == 31
    assert [r[0] for r in rows[1:]] == rows[0][1:] and float(rows[1][1]) == 1
    assert len(rows[1][3].lstrip("-")) > 8, "all digits"
    assert "\t" not in command("similarity", named, "--wide")[1]

def test_json_has_lists_and_whole_numbers(command, named):
    found = json.loads(command("clusters", named, "--json")[1])
    assert isinstance(found[0]["members"], list) and sorted(n for c in found for n in c["members"]) == sorted(LONG + JAPANESE)
    assert all(type(c["n"]) is int and c["n"] == len(c["members"]) and isinstance(c["outliers"], list) for c in found)
    (named/"broken").mkdir()
    try: models = {m["model"]: m for m in json.loads(command("doctor", named, "--json")[1])}
    finally: (named/"broken").rmdir()
    assert models["broken"]["params"] is None and models["broken"]["problems"]
    assert all(type(models[LONG[0]][k]) is int for k in "layers hidden params bytes vocabulary".split())
    assert isinstance(models[LONG[0]]["notes"], list) and models[LONG[0]]["base"] is None
    text = command("similarity", "demo", "--json")[1]
    assert "NaN" not in text and json.loads(text)[0]["c-base"] is None

# ---- one judgement of a pair

@pytest.fixture(scope="module")
def relatives(tmp_path_factory):
    "Models that headers and weights judge differently: strangers of one shape, equal weights that mean something else, other words, a spoilt one."
    import torch
    from safetensors.torch import load_file, save_file
    from model_glue_nb.zoo.zoo import tiny_zoo
    home = tmp_path_factory.mktemp("relatives")
    zoo = tiny_zoo(home, ["a", "stranger"])
    def copy(name, config=(), change=None, words=None):
        out = home/name
        shutil.copytree(zoo["a"].path, out)
        settings = json.loads((out/"config.json").read_text()) | dict(config)
        (out/"config.json").write_text(json.dumps(settings))
        file = out/"model.safetensors"
        if change: save_file({k: change(v) for k, v in load_file(file).items()}, file, metadata=dict(format="pt"))
        tokens = json.loads((out/"tokenizer.json").read_text())
        if words: tokens["model"]["vocab"] = {words(k): v for k, v in tokens["model"]["vocab"].items()}
        (out/"tokenizer.json").write_text(json.dumps(tokens))
    copy("twin")
    copy("other-heads", dict(num_attention_heads=8, head_dim=4, num_key_value_heads=4))
    copy("other-act", dict(hidden_act="gelu"))
    copy("other-words", words=lambda t: t.replace("w1", "v1"))
    rng = torch.Generator().manual_seed(0)
    def near(v): # a cosine of some .94, below the threshold
        x = v.float()
        return (x + .36 * x.std() * torch.randn(x.shape, generator=rng)).to(v.dtype)
    copy("at-the-limit", change=near)
    return home

@pytest.mark.parametrize("more", [(), ("--threshold", "0.9"), ("--threshold", "0.05"), ("--linkage", "first_fit")], ids=" ".join)
def test_doctor_and_clusters_never_contradict_each_other(command, relatives, more):
    pairs = json.loads(command("doctor", relatives, "--pairs", "--json", *more)[1])
    clusters = [{*c["members"]} for c in json.loads(command("clusters", relatives, "--json", *more)[1])]
    for p in pairs:
        together = any({p["a"], p["b"]} <= c for c in clusters)
        assert not together or p["verdict"] in ("as is", "with a tokenizer choice"), p
        assert together or p["verdict"] != "as is", p
    found = {(p["a"], p["b"]): p["verdict"] for p in pairs}
    assert found["a", "twin"] == "as is" and found["a", "other-words"] == "with a tokenizer choice"
    assert found["a", "stranger"] == found["a", "other-act"] == found["a", "other-heads"] == "mix only"
    assert (found["a", "at-the-limit"] == "as is") == (more in [("--threshold", "0.9"), ("--threshold", "0.05")])

def test_headers_alone_let_strangers_pass(command, relatives):
    found = {(p["a"], p["b"]): p["verdict"] for p in json.loads(command("doctor", relatives, "--pairs", "--headers", "--json")[1])}
    assert found["a", "stranger"] == "as is"

def test_a_run_finds_the_clusters_that_are_shown(command, relatives):
    from model_glue_nb.gluing.recipe import open_work, read_recipe
    work = open_work(read_recipe(dict(zoo=str(relatives), suite="demo")))
    near = work.nearness(work.compare())
    shown = [c["members"] for c in json.loads(command("clusters", relatives, "--json")[1])]
    assert [list(c.members) for c in work.clusters(near)] == shown

# ---- commands, their help and their options

def commands():
    import model_glue_nb.cli.program # all commands
    from model_glue_nb.cli.app import app
    group = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}

def words_of(text): return " ".join(re.sub(r"[│╭╮╰╯─]", " ", ESCAPES.sub("", text)).split())

def test_commands_stand_in_the_order_of_work(command):
    from model_glue_nb.cli.app import GROUPS, app
    registered = {c.name for c in app.registered_commands}
    listed = " ".join(GROUPS.values()).split()
    assert registered == {*listed} and len(listed) == len(registered)
    text = words_of(command("--help")[1])
    places = [text.index(part) for group, names in GROUPS.items() for part in (group, f" {names.split()[0]} ")]
    assert all(text.index(g) < text.index(h) for g, h in zip(list(GROUPS), list(GROUPS)[1:])) and len(places) == 2 * len(GROUPS)

@pytest.mark.parametrize("name", sorted(commands()))
def test_help_says_everything(command, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    entry, text = commands()[name], words_of(command(name, "--help")[1])
    for p in entry.params:
        if p.name == "help": continue
        assert p.help, f"{name} {p.name} has no help"
        for choice in getattr(p.type, "choices", ()): assert str(choice) in text, f"{name} {p.name} does not list {choice}"
    examples = re.findall(rf"model-glue {name}\b[^\n]*", entry.epilog)
    assert examples and all(" ".join(e.split()) in text for e in examples)
    for e in examples: # what is shown can be parsed
        given = e.split("   ")[0].split()[2:]
        assert entry.make_context(name, given).params

@pytest.mark.parametrize("name", sorted(commands()))
def test_no_option_does_nothing(name):
    "Each parameter is read in the body of its command, and each command that prints has JSON."
    import ast, inspect, textwrap
    function = commands()[name].callback
    function = getattr(function, "__wrapped__", function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    read = {n.id for statement in tree.body for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    given = {a.arg for a in tree.args.args}
    assert given <= read, f"{name}: {given - read} has no effect"
    assert name in ("zoo", "serve", "chat") or "as_json" in given
    shows = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert ("wide" in given) == ("show" in shows or name == "compare")

def test_choices_are_those_of_the_library():
    from model_glue_nb.benchmarking.suites import _SPLITS
    from model_glue_nb.cli import glue, merge, score, zoo
    from model_glue_nb.cli.app import METHOD
    from model_glue_nb.gluing.recipe import _DTYPES
    from model_glue_nb.mergeability.clusters import linkages
    from model_glue_nb.mergeability.similarity import METRICS, _BY
    from model_glue_nb.merging.methods import merge_methods
    from model_glue_nb.merging.sign_differences import DIFFERENCE_FORMS
    from model_glue_nb.cli.differences import _KIND
    from model_glue_nb.cli.serve import DTYPES
    from model_glue_nb.searching.executors import executors
    from model_glue_nb.searching.strategies import strategies
    from model_glue_nb.zoos.smollm2 import SMOLLM2_ZOOS
    import model_glue_nb.searching.search
    for choices, names in ((METHOD, merge_methods), (merge._STRATEGY, strategies), (merge._EXECUTOR, executors), (zoo._METRIC, METRICS),
                           (zoo._BY, _BY), (zoo._LINKAGE, linkages), (zoo._ZOOS, ["demo", "demo-broken", *SMOLLM2_ZOOS]), (DTYPES, _DTYPES),
                           (glue._DTYPE, _DTYPES), (score._SPLIT, [*_SPLITS, "all"]), (_KIND, DIFFERENCE_FORMS)):
        assert {*get_args(choices)} == {*names}

@pytest.mark.parametrize("args,near", [(("search", "demo", "--out", "x", "--strategy", "racin"), "racing"), (("clusters", "demo", "--linkage", "averag"), "average"),
                                       (("zoo", "dem", "x"), "demo"), (("score", "demo", "--split", "serch"), "search")])
def test_a_wrong_choice_is_answered_with_the_nearest(command, args, near):
    code, out, err = command(*args)
    assert code == 2 and f"Did you mean '{near}'?" in err and err.count("\n") == 1

# ---- stages

def test_stages_of_a_search_are_counted(command, tmp_path):
    zoo = tmp_path/"zoo.yaml"
    from model_glue_nb.zoo.zoo import demo_zoo_path
    zoo.write_text("".join(f"- {demo_zoo_path()/n}\n" for n in ("a-base", "a-sort", "a-shift")))
    code, out, err = command("search", zoo, "--out", tmp_path/"run", "--questions", "2", "--budget", "2", "--executor", "local")
    assert code == 0, err
    stages = re.findall(r"^\[(\d)/(\d)\] (\w+) +[\d.]+ (?:s|min)", err, re.M)
    assert stages == [("1", "4", "cluster"), ("2", "4", "score"), ("3", "4", "search"), ("4", "4", "evidence")]
    assert "\r" not in err and {len(line.split("\t")) for line in out.splitlines()} == {13}

class Heard:
    "A progress that remembers what it was told, by stage."
    def __init__(self): self.name, self.told, self.seconds = None, [], {}
    def __call__(self, done, total, what): self.told.append((self.name, done, total, what))
    def expect(self, seconds): self.seconds |= seconds
    def stage(self, name, number, of):
        from contextlib import contextmanager
        @contextmanager
        def go():
            self.name = name, number, of
            yield
        return go()

def test_a_run_counts_questions_and_expects_the_rest(tmp_path):
    from model_glue_nb.gluing.pipeline import glue
    from model_glue_nb.zoo.zoo import demo_zoo_path
    heard = Heard()
    zoo = [str(demo_zoo_path()/n) for n in ("a-base", "a-sort", "c-base")]
    glue(dict(zoo=zoo, suite="demo", tasks=["sort"], search_questions=4, evidence=2,
              merge=dict(methods=["linear", "ties"], strategy="average", budget=3, executor="local")), tmp_path/"run", progress=heard)
    names = list(dict.fromkeys(n for n, *_ in heard.told))
    stages = "open score cluster search evidence merge mix choose report".split()
    assert names == [n for i, s in enumerate(stages, 1) if (n := (s, i, 9)) in names] and len(names) > 5
    of = {n: [(d, t) for (name, *_), d, t, _ in heard.told if name == n and d is not None] for n, *_ in names}
    assert (3 * 4, 3 * 4) in of["score"], "three models, four questions each"
    asked = [d for d, _ in of["search"]]
    assert {t for _, t in of["search"]} == {2 * 3 * 4} and asked == sorted(asked) and 0 < asked[-1] <= 24
    assert all(0 <= d <= t for told in of.values() for d, t in told)
    assert {"search", "evidence", "report"} <= {*heard.seconds} and all(s > 0 for s in heard.seconds.values())

# ---- one line where many tensors differ

@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    "A model, one of other shapes, one that lacks tensors, one that holds NaN in many."
    import torch
    from safetensors.torch import load_file, save_file
    from model_glue_nb.zoo.zoo import tiny_zoo
    home = tmp_path_factory.mktemp("unlike")
    zoo = tiny_zoo(home, ["a", "fewer", "spoilt"])
    tiny_zoo(home, ["wide"], intermediate_size=64)
    def change(name, f):
        file = zoo[name].path/"model.safetensors"
        save_file(f(load_file(file)), file, metadata=dict(format="pt"))
    change("fewer", lambda t: {k: v for k, v in t.items() if "mlp" not in k})
    change("spoilt", lambda t: {k: torch.full_like(v, float("nan")) if "mlp" in k else v for k, v in t.items()})
    return home

@pytest.mark.parametrize("other,said", [("wide", "has shape"), ("fewer", "has no tensor"), ("spoilt", "NaN or infinite")])
def test_many_tensors_are_one_line(command, unlike, tmp_path, other, said):
    from model_glue_nb.zoo.zoo import open_model
    problems = open_model(unlike/other).bad_weights() if other == "spoilt" else None
    if problems is None:
        (tmp_path/"r.yaml").write_text(json.dumps(dict(merge_method="linear", models=[str(unlike/"a"), str(unlike/other)])))
        found = command("merge", tmp_path/"r.yaml", tmp_path/"out", "--dry-run", "--json")
        assert found[0] == 2
        problems = [p for p in json.loads(found[1])["problems"] if said in p]
    assert len(problems) == 1 and said in problems[0] and problems[0].count("mlp") == 2
    assert "(the same with 5 more tensors, such as '" in problems[0]
