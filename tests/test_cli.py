"What the command line says and writes, whatever it is given."
import json, os, re, sys
import pytest

from model_glue_nb.core import NAME_BYTES, InputError, Run, file_name

# ---- names from files, tables

@pytest.mark.parametrize("text", ["../../x", "/etc/x", "a/b", "a\\b", ".x", "-rf", "a\x1b[2J", "a\0b", "a\nb", "", ".", "..", "\ud800",
                                  "x" * 256, "é" * 200, "a.", "a ", "\u202eabc", "ﬁ", "~", "CON:", "*?"])
def test_names_from_files_are_safe_names_of_files(text, tmp_path):
    name = file_name(text)
    assert name != text and len(name.encode()) <= NAME_BYTES and name[0] not in ".-"
    assert not re.search(r"[\x00-\x1f\x7f/\\]", name)
    (tmp_path/f".{name}.recipe.json.abcdefgh.part").write_text("") # beside it there is room for temporary names
    assert file_name(name) != name, "a made name is never taken for a given one"

def test_other_names_give_other_files():
    names = ["a/b", "a\\b", "a-b", "a:b", "a//b", "x" * 300, "x" * 301]
    assert len({file_name(n) for n in names}) == len(names)
    for plain in ("c1-merged", "all-LlamaForCausalLM-0", "Qwen2.5-0.5B", "模型"):
        assert file_name(plain) == plain

def test_nothing_leads_out_of_a_run(tmp_path):
    run = Run.start(tmp_path/"run", {})
    (tmp_path/"out").mkdir()
    (tmp_path/"out.json").write_text("{}")
    (run.path/"models").symlink_to(tmp_path/"out")
    (run.path/"zoo.json").symlink_to(tmp_path/"out.json")
    for step in (lambda: run.place("models/x"), lambda: run.write_json("../out", {}),
                 lambda: run.read_json("zoo"), lambda: run.place("/etc")):
        with pytest.raises(InputError, match="leads out of the run"): step()
    assert (tmp_path/"out.json").read_text() == "{}" and not any((tmp_path/"out").iterdir())

def test_cells_are_never_formulas_and_come_back(tmp_path):
    import pandas as pd
    names = ["=HYPERLINK(1)", "+1", "-a", "@x", "\tx", "\rx", "'=x", "''-", "'a", "nan", "NULL", "a=b"]
    table = pd.DataFrame({"model": names, "score": [-1.5] * len(names), "=task": range(len(names))}).assign(
        mixed=[None, *names[1:]])
    run = Run.start(tmp_path/"run", {})
    file = run.write_table("t", table)
    import csv
    rows = list(csv.reader(file.open(newline="")))
    assert not any(c[:1] in set("=+-@\t\r") and not re.fullmatch(r"-?[\d.]+", c) for row in rows for c in row)
    assert {r[1] for r in rows[1:]} == {"-1.5"}
    pd.testing.assert_frame_equal(run.read_table("t"), table)
    square = pd.DataFrame([[1., .5], [.5, 1.]], ["=a", "b"], ["=a", "b"])
    run.write_table("s", square, index=True)
    pd.testing.assert_frame_equal(run.read_table("s", index=True), square)

# ---- how a command ends

@pytest.fixture
def failing(monkeypatch, command):
    "Runs `model-glue doctor demo`, in which something goes wrong."
    def run(error, *more):
        import model_glue_nb.mergeability.doctor
        def fail(*args): raise error
        monkeypatch.setattr(model_glue_nb.mergeability.doctor, "examine_zoo", fail)
        return command("doctor", "demo", *more)
    return run

def kinds():
    import sqlite3
    def disk(number, *more): return OSError(number, os.strerror(number), *more)
    import errno as e
    yield InputError("It is wrong. Mend it."), 2, "It is wrong. Mend it."
    for number in (e.ENOSPC, e.EDQUOT):
        yield disk(number, "/x\x1b[2J/y"), 2, r"The disk filled up at '/x\x1b[2J/y'"
    for number in (e.EROFS, e.EACCES, e.EPERM):
        yield disk(number, "/x"), 2, "The place '/x' cannot be read or written"
    for number in (e.ENAMETOOLONG, e.ENOTDIR, e.ELOOP, e.EISDIR):
        yield disk(number, "/x"), 2, "cannot be used"
    yield disk(e.EMFILE), 2, "Too many files"
    yield disk(e.EIO, "/x"), 1, "--debug"
    yield sqlite3.OperationalError("database or disk is full"), 2, "The disk filled up"
    yield sqlite3.OperationalError("database is locked"), 2, "Another process holds"
    yield sqlite3.OperationalError("attempt to write a readonly database"), 2, "cannot be read or written"
    yield sqlite3.DatabaseError("file is not a database"), 2, "The results store"
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        yield error, 1, "not enough memory"
    yield RecursionError("maximum"), 1, "nested too deeply"
    yield ModuleNotFoundError("No module named 'x'", name="x"), 1, "The package 'x' is missing"
    yield ValueError("The checkpoint of type `x` is not known. Update with\n`pip install`.\n" * 30), 1, "ValueError: The checkpoint of type `x` is not known. This should"
    yield ValueError("x" * 5000), 1, "…"
    yield KeyError("a\x1b]0;t\x07"), 1, "KeyError: "
    yield AssertionError(), 1, "AssertionError. This should"
    yield ExceptionGroup("two", [InputError("inner")]), 2, "inner"
    yield KeyboardInterrupt(), 130, "continues from here"
    yield EOFError(), 2, "--yes"

@pytest.mark.parametrize("error,code,said", list(kinds()), ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "")
def test_whatever_goes_wrong_is_one_line(failing, error, code, said):
    got, out, err = failing(error)
    assert (got, out) == (code, "") and said in err and "Traceback" not in err
    assert err.count("\n") == 1 and len(err) < 600 and not re.search(r"[\x00-\x08\x0b-\x1f]", err)

def test_debug_shows_where(failing, command):
    for more in (("--debug",), ()):
        assert ("in fail" in failing(ValueError("x"), *more)[2]) == bool(more)
    assert "in fail" in command("--debug", "doctor", "demo")[2] and "--debug" in command("--help")[1]

@pytest.mark.parametrize("args,said", [(["merg"], "No such command"), (["merge"], "Missing argument"), (["doctor", "demo", "--no"], "No such option"),
                                       (["score", "demo", "--split"], "requires an argument"), (["bench", "demo", "--out", "x", "--workers", "0"], "'--workers': 0 is not in the range x>=1"),
                                       (["doctor\x1b[2J"], r"doctor\x1b[2J")])
def test_wrong_options_are_one_line_with_the_way_to_help(command, args, said):
    code, out, err = command(*args)
    assert (code, out) == (2, "") and said in err and "--help` " not in err and "--help`." in err and err.count("\n") == 1 and "\x1b" not in err

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_as_ctrl_c_does(monkeypatch, command, tmp_path, name):
    import signal, model_glue_nb.mergeability.doctor
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN: # nohup around the tests
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    from model_glue_nb.core import atomic_path
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    def busy(*args):
        with atomic_path(tmp_path/"out") as tmp:
            tmp.mkdir()
            signal.raise_signal(getattr(signal, name))
    monkeypatch.setattr(model_glue_nb.mergeability.doctor, "examine_zoo", busy)
    code, out, err = command("doctor", "demo")
    assert code == 130 and "Finished work is kept; the same command continues from here." in err and err.count("\n") == 1
    assert not any(tmp_path.iterdir()), "temporary folders are gone"
    assert before == {s: signal.getsignal(s) for s in before}

def test_a_reader_that_leaves_is_no_error():
    import subprocess
    code = "import sys; sys.argv = ['model-glue', 'doctor', 'demo', '--json']; from model_glue_nb.cli.program import main; main()"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.close()
    assert (p.stderr.read().decode(), p.wait()) == ("", 141)

def test_nobody_is_asked(monkeypatch, command):
    import io, model_glue_nb.mergeability.doctor
    said = []
    def ask(*args):
        said.append(os.read(0, 9))
        return input("run it? [y/N] ")
    monkeypatch.setattr(model_glue_nb.mergeability.doctor, "examine_zoo", ask)
    monkeypatch.setattr(sys, "stdin", yes := io.StringIO("y\n"))
    code, _, err = command("doctor", "demo")
    assert code == 2 and said == [b""] and yes.read() == "y\n" and sys.stdin is yes and "--yes" in err

def test_libraries_are_quiet_but_for_debug(monkeypatch, command):
    import logging, warnings, model_glue_nb.mergeability.doctor
    def noisy(*args):
        warnings.warn("old")
        logging.getLogger("lib").warning("loud")
        raise InputError("bad")
    monkeypatch.setattr(model_glue_nb.mergeability.doctor, "examine_zoo", noisy)
    before = os.environ.get("TRANSFORMERS_VERBOSITY"), logging.root.manager.disable
    assert command("doctor", "demo")[2] == "bad\n"
    assert (os.environ.get("TRANSFORMERS_VERBOSITY"), logging.root.manager.disable) == before

# ---- what reaches the terminal

def test_names_never_act_on_the_terminal(capsys):
    import pandas as pd
    from model_glue_nb.cli.app import say, show, tell_skipped
    name = "x\x1b[2J\x1b]0;t\x07\x9b\u202e[red]y[/red]"
    table = pd.DataFrame({"model": [name], name: [name], "n": [1]})
    for step in (lambda: show(table, name, False),
                 lambda: show(table, name, True), lambda: say(name),
                 lambda: tell_skipped({name: name})):
        step()
        text = "".join(capsys.readouterr())
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text), text
        assert "[red]" in text.replace("\n", "")
    tell_skipped({"a\nskipped b": "why"})
    assert capsys.readouterr().err == "skipped a\\nskipped b: why\n"

def test_a_terminal_of_few_characters():
    import subprocess
    for code in ("utf-8", "ascii", "latin-1"):
        run = "from model_glue_nb.cli.app import *; import sys; @app.command()\ndef x(): say('é…模')\nsys.exit(answer(app, ['x']))"
        run = run.replace("; @app", "\n@app")
        p = subprocess.run([sys.executable, "-c", run], capture_output=True, env=os.environ | dict(PYTHONIOENCODING=code))
        assert (p.returncode, p.stderr) == (0, b""), p.stderr

# ---- options, run folders, the store

@pytest.mark.parametrize("size", [".", "1.2.3", "1e400", "0", "-5GB", "nan", "", "1e-9", "5XB", "1e99T"])
def test_odd_sizes(size):
    from model_glue_nb.cli.app import n_bytes
    with pytest.raises(InputError, match="is not a size"): n_bytes(size)

@pytest.mark.parametrize("option", ["steps=[[", "steps", "a=!!python/object:os.system x", "x=&a [*a]", "a=" + "[" * 9000])
def test_odd_settings(option):
    from model_glue_nb.cli.app import settings
    with pytest.raises(InputError): settings([option])

@pytest.mark.parametrize("name,text",
                         [("recipe.yaml", "[1, 2]"), ("recipe.yaml", "a: [["), ("recipe.yaml", "\xff\xfe"), ("recipe.yaml", "x"), ("clusters.json", "[" * 9999), ("clusters.json", "{"),
                          ("zoo.json", "[1]"), ("environment.json", "5"), ("clusters.json", '[{"a": 1}, 5]'), ("comparison.csv", ""), ("comparison.csv", 'a,b\n"1,2\n3,4,5,6'), ("scores.csv", "\0\0\0")])
def test_damaged_run_folders_are_one_line(command, tmp_path, name, text):
    run = tmp_path/"run"
    run.mkdir()
    (run/"recipe.yaml").write_text("zoo: demo\n")
    (run/name).write_bytes(text.encode("latin-1"))
    code, out, err = command("report", run)
    assert "Traceback" not in err and "--debug" not in err and code in (0, 2), err
    assert code == 0 or err.count("\n") <= 3

def test_places_that_are_no_run(command, tmp_path):
    (tmp_path/"file").write_text("")
    for where in (tmp_path/"none", tmp_path/"file", "x" * 300):
        code, _, err = command("report", where)
        assert code == 2 and err.count("\n") == 1
    (tmp_path/"run").mkdir()
    os.mkfifo(tmp_path/"run"/"recipe.yaml")
    assert command("report", tmp_path/"run")[0] == 2 and command("similarity", "demo", "--out", tmp_path/"run")[0] == 2

SCHEMAS = dict(view="create view results as select 1", columns="create table results (a, b)", more="create table facts (kind, key, value, more)",
               items="create table items (a)", responses="create table responses (request, model, response)")

@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_store_of_another_schema_is_refused(tmp_path, kind):
    import sqlite3
    from model_glue_nb.store import Store
    db = sqlite3.connect(tmp_path/"s.sqlite")
    db.executescript(SCHEMAS[kind])
    db.close()
    with pytest.raises(InputError, match="cannot be used as a results store"): Store(tmp_path/"s.sqlite")

def test_facts_that_are_not_ours_are_unknown(tmp_path):
    from model_glue_nb.store import Store
    store = Store(tmp_path/"s.sqlite")
    store.db.execute("insert into facts values ('speed', 'own', 'no json'), ('speed', 'x', null)")
    assert store.remembered("speed", "own") is None and store.remembered("speed", "x") is None and store.remembered("speed", "own", lambda: 1.5) == 1.5
    (tmp_path/"folder").mkdir()
    with pytest.raises(InputError): Store(tmp_path/"folder")

# ---- members that fail

def test_members_that_fail_are_set_aside(tmp_path, command):
    "One that cannot be loaded, and one that fails when it is asked; with nothing left, one clear error."
    from model_glue_nb.zoo.zoo import tiny_zoo
    zoo = tiny_zoo(tmp_path/"zoo", ["good", "odd", "rope"])
    def change(name, **settings):
        file = zoo[name].path/"config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    change("odd", hidden_act="nonsense")
    change("rope", rope_parameters=dict(rope_theta=10000.0, rope_type="nonsense"))
    (tmp_path/"q.jsonl").write_text("".join(json.dumps(dict(question=f"w{i}", answer="w3")) + "\n" for i in range(12)))
    (tmp_path/"s.yaml").write_text(
        json.dumps(dict(name="s", search_share=.5, tasks=[dict(name="t", file="q.jsonl", max_new_tokens=1)])))
    code, out, err = command("score", tmp_path/"zoo", "--suite", tmp_path/"s.yaml", "--out", tmp_path/"run", "--json")
    assert code == 0 and {r["model"] for r in json.loads(out)} == {"good"}, err
    assert all(f"skipped {n}: " in err for n in ("odd", "rope")) and "Traceback" not in err
    code, out, err = command("score", zoo["odd"].path, "--suite", tmp_path/"s.yaml", "--out", tmp_path/"none")
    assert code == 2 and err.splitlines()[-1].startswith("odd: ") and "--debug" not in err

def test_a_full_disk_is_no_members_fault(tmp_path, monkeypatch):
    import errno, model_glue_nb.benchmarking.scores as b
    from model_glue_nb.benchmarking.suites import load_suite
    from model_glue_nb.zoo.zoo import tiny_zoo
    zoo, part = tiny_zoo(tmp_path, ["a"]), load_suite("demo").part("search", 2)
    for error, raised in ((OSError(errno.ENOSPC, "full"), True), (MemoryError(), False), (RuntimeError("shapes"), False)):
        def ask(*args, **how): raise error
        monkeypatch.setattr(b, "ask_model", ask)
        with pytest.raises(OSError if raised else InputError): b.ask_zoo(zoo, part, aside={})
        with pytest.raises(type(error)): b.ask_zoo(zoo, part)

def test_security_is_told():
    from pathlib import Path
    root = Path(__file__).resolve().parents[1]
    text = (root/"SECURITY.md").read_text()
    assert "SECURITY.md" in (root/"MANIFEST.in").read_text()
    mail = re.search(r"author_email = (\S+)", (root/"settings.ini").read_text())[1]
    assert set(re.findall(r"[\w.]+@[\w.-]+\w", text)) == {mail}
    for switch in ("--allow-code-execution", "--allow-nan", "--overwrite", "--debug"): assert switch in text

def test_the_version_says_what_computes(command):
    import torch, transformers
    code, out, _ = command("--version")
    assert code == 0 and out.startswith("model-glue ") and f"torch {torch.__version__}" in out and f"transformers {transformers.__version__}" in out

def test_a_shell_is_told_what_may_follow(command, monkeypatch):
    monkeypatch.setenv("_MODEL_GLUE_COMPLETE", "complete_bash")
    for words, place, wanted in (("model-glue comp", "1", ["compare"]), ("model-glue merge --over", "2", ["--overwrite"])):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", place)
        assert command()[1].split() == wanted
