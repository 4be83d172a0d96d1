"""Do the tests bite? Changes one line of a module at a time and sees whether a test notices.

    python tools/mutate.py                                    every change of tools/mutants.py
    python tools/mutate.py tensors.kernels merging.methods    only these modules
    python tools/mutate.py --list                             what would be changed, and by which tests it is tried

Nothing is changed in the working tree: each change is made in a copy. Torch and its like are imported once; each trial is a fork.
"""
import argparse, hashlib, importlib.util, json, os, re, shutil, signal, struct, sys, tempfile, time, traceback
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))
from mutants import MUTANTS, WHY # noqa: E402

PACKAGE, LEAST, WANTED = "model_glue_nb", 200, .95 # seconds that every trial has, compiling included; share that must be noticed
MEMORY = ROOT/".pytest_cache"/"mutation.json" # verdicts of earlier runs
HEAVY = ("numpy torch transformers transformers.models.qwen2 transformers.models.llama tokenizers pandas sklearn.linear_model sklearn.cluster scipy.stats "
         "numba llvmlite.binding optuna cmaes peft pytest hypothesis IPython.core.interactiveshell execnb.shell nbdev.process "
         "fastcore.all yaml typer rich.console safetensors.torch huggingface_hub plotly.graph_objects")
Mutant = namedtuple("Mutant", "room old new tests")
Result = namedtuple("Result", "mutant verdict said seconds")

# --- the list

def mutants(rooms=()):
    "Every change of the list, with the tests that should notice it."
    for room, (tests, changes) in MUTANTS.items():
        if rooms and room not in rooms: continue
        for old, new, *own in changes: yield Mutant(room, old, new, tuple(own[0] if own else tests))

def module_of(room, root=ROOT): return root/PACKAGE/f"{room.replace('.', '/')}.py"

WORD = re.compile(r"\w+|[^\w\s]")

def pattern_of(old):
    "A change's text as an expression that doesn't see where lines are broken: `a; b` is also `a` above `b`."
    words, gaps, margin = WORD.findall(old), [], old[:len(old) - len(old.lstrip())] # a margin says which of two lines is meant
    for a, b in zip(words, words[1:]):
        both = re.match(r"\w", a[-1]) and re.match(r"\w", b)
        gaps.append(r"\s+" if both else r"\s*")
    parts = [r";?" if w == ";" else re.escape(w) for w in words]
    return re.compile(margin + "".join(p + g for p, g in zip(parts, [*gaps, ""])))

def places(text, old): return list(pattern_of(old).finditer(text))

def replaced(text, mutant):
    "A text with the change made, wherever its place is laid out over several lines."
    return pattern_of(mutant.old).sub(lambda _: mutant.new, text)

def out_of_step(all_mutants):
    "What is wrong with the list: a text that does not stand once in its module, a test that isn't there, a change twice."
    seen = set()
    for m in all_mutants:
        name = f"{m.room}: {m.old!r}"
        count = len(places(module_of(m.room).read_text(), m.old)) if module_of(m.room).exists() else 0
        if count != 1: yield f"{name} occurs {count} times"
        if "\n" in m.old + m.new or m.old == m.new: yield f"{name} isn't a change of one line"
        if (m.room, m.old, m.new) in seen: yield f"{name} stands there twice"
        seen.add((m.room, m.old, m.new))
        for test in m.tests:
            file, _, function = test.partition("::")
            if not (ROOT/file).is_file(): yield f"{name}: there is no {file}"
            elif function and f"def {function.partition('[')[0]}(" not in (ROOT/file).read_text():
                yield f"{name}: there is no {test}"

# --- what is remembered

def fingerprint(mutant):
    "What a verdict depends on first of all: the module, the change, the tests. (--fresh asks about the rest of the package too.)"
    files = [module_of(mutant.room), *(ROOT/t.partition("::")[0] for t in mutant.tests)]
    text = "\0".join([mutant.old, mutant.new, *mutant.tests, *(f.read_text() for f in files)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]

def remembered(): return json.loads(MEMORY.read_text()) if MEMORY.exists() else {}

def remember(results):
    "Keep what was noticed; what survived is tried again."
    known = remembered() | {fingerprint(r.mutant): r[1:] for r in results if r.verdict in ("killed", "hung")}
    MEMORY.parent.mkdir(exist_ok=True)
    MEMORY.write_text(json.dumps(known))

# --- the copy

def plant(tree):
    "Copy what the tests read; big folders of data are linked."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "data", "_proc")
    for folder in (PACKAGE, "nbs", "tests", "tools", "recipes", "benchmarks"):
        shutil.copytree(ROOT/folder, tree/folder, symlinks=True, ignore=skip)
    (tree/PACKAGE/"data").symlink_to(ROOT/PACKAGE/"data")
    for file in ("settings.ini", "setup.py", "README.md", "_quarto.yml", "constraints.txt", "MANIFEST.in"):
        shutil.copy(ROOT/file, tree/file)
    (tree/"tmp").mkdir()
    for folder in (*beside_modules(ROOT), *machine_code(tree)): folder.mkdir(parents=True, exist_ok=True)
    for source in beside_modules(ROOT): share_machine_code(source, *machine_code(tree))

def beside_modules(root):
    "Where the compiled loops of a tree's modules lie."
    return sorted({p.parent/"__pycache__" for p in (root/PACKAGE).rglob("*.py") if "\n@native" in p.read_text()})

def machine_code(tree): return *beside_modules(tree), tree/"cache"/PACKAGE # of modules, of notebooks

def share_machine_code(source, *folders):
    "Copy compiled loops, whose names are fingerprints of what they are made of: compiling them takes a minute."
    for file in source.glob("*.o"):
        for folder in folders:
            if not (folder/file.name).exists(): shutil.copy(file, folder)

def forget(tree):
    "Take away what a trial remembered, or the next one would believe it."
    for path in (tree/"cache").rglob("*"):
        if path.is_file() and path.suffix != ".o": path.unlink()
    shutil.rmtree(tree/"tmp", ignore_errors=True)
    (tree/"tmp").mkdir()

def compile_all(tree):
    "Byte code that is never compared with its source, so that a change within the same second counts; a changed file has none."
    import py_compile
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for file in (tree/PACKAGE).rglob("*.py"): py_compile.compile(file, invalidation_mode=mode, quiet=1)

def bytecode(file): return Path(importlib.util.cache_from_source(str(file)))

class changed:
    "One change in the copy, taken back at the end."
    def __init__(self, tree, mutant): self.file, self.mutant = module_of(mutant.room, tree), mutant
    def __enter__(self):
        self.text = self.file.read_text()
        self.file.write_text(replaced(self.text, self.mutant))
        self.aside = bytecode(self.file).rename(self.file.with_suffix(".aside"))
    def __exit__(self, *_):
        self.file.write_text(self.text)
        self.aside.rename(bytecode(self.file))

# --- one trial, in a fork

def run_notebook(path, mutant):
    "Run a notebook's cells; its own exported cells carry the change too. Gives what went wrong, or None."
    from execnb.shell import CaptureShell
    from nbdev.process import NBProcessor
    processor = NBProcessor(path, process=True)
    own = any(re.match(rf"#\|\s*default_exp\s+{re.escape(mutant.room)}\s*$", c.source) for c in processor.nb.cells) if mutant else False
    shell = CaptureShell(path)
    os.chdir(path.parent)
    for number, cell in enumerate(processor.nb.cells):
        directives = getattr(cell, "directives_", {})
        if cell.cell_type != "code" or "nbdev_export(" in cell.source: continue
        if directives.get("eval:", [""])[0].lower() == "false" or {"slow", "gpu"} & directives.keys():
            continue
        if own and {"export", "exporti", "exports"} & directives.keys():
            cell.source = replaced(cell.source, mutant)
        shell.cell(cell)
        if shell.exc:
            return f"{path.parent.name}/{path.name} cell {number}: {type(shell.exc).__name__}: {shell.exc}"

class Failures:
    "The first failure that pytest reports."
    def __init__(self): self.first = None
    def pytest_runtest_logreport(self, report):
        if report.failed and not self.first:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.first = f"{report.nodeid}: {crash.message if crash else report.longrepr}"
    def pytest_collectreport(self, report):
        if report.failed and not self.first:
            self.first = f"{report.nodeid}: {str(report.longrepr).splitlines()[-1]}"

def run_tests(tests, tree, mutant):
    "Notebooks in turn, pytest's together. Gives what went wrong first, or None."
    for notebook in (t for t in tests if t.endswith(".ipynb")):
        if said := run_notebook(tree/notebook, mutant): return said
    named = [t for t in tests if not t.endswith(".ipynb")]
    if not named: return None
    import pytest
    os.chdir(tree)
    failures = Failures()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(tree), *named], plugins=[failures])
    if code == 5: return "no test was found"
    return None if code == 0 else failures.first or f"pytest ended with {int(code)}"

def trial(tree, tests, mutant=None, seconds=600):
    "Run tests in a fork; gives (verdict, what was said, seconds)."
    began, said = time.perf_counter(), tree/"said"
    said.write_text("")
    child = os.fork()
    if child == 0: in_child(tree, tests, mutant, said)
    verdict = wait(child, seconds)
    forget(tree)
    if not mutant:
        for folder in machine_code(tree):
            share_machine_code(folder, *beside_modules(ROOT), *machine_code(tree))
    text = " ".join(said.read_text().split())[:200]
    return verdict, text or ("" if verdict == "survived" else verdict), time.perf_counter() - began

def in_child(tree, tests, mutant, said):
    "What the fork does; it never returns."
    code = 1
    try:
        os.setsid()
        null = os.open(tree/"output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(null, 1), os.dup2(null, 2)
        os.environ |= dict(PYTHONPATH=str(tree), TMPDIR=str(tree/"tmp"), XDG_CACHE_HOME=str(tree/"cache"))
        tempfile.tempdir = str(tree/"tmp")
        sys.path.insert(0, str(tree))
        result = run_tests(tests, tree, mutant)
        said.write_text(result or "")
        code = 1 if result else 0
        loaded = sys.modules.get(PACKAGE)
        if loaded and not loaded.__file__.startswith(str(tree)):
            code, _ = 3, said.write_text(f"{loaded.__file__} was tested")
    except BaseException:
        said.write_text(traceback.format_exc()[-300:])
    os._exit(code)

def wait(child, seconds):
    "How a fork ends: survived, killed, hung, broken."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: break
        time.sleep(.02)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hung"
    try: os.killpg(child, signal.SIGKILL) # what it started and left
    except (ProcessLookupError, PermissionError): pass
    code = os.waitstatus_to_exitcode(status)
    return {0: "survived", 3: "broken"}.get(code, "killed")

# --- all trials

def warm():
    "Import once what every fork would import."
    import importlib
    for name in HEAVY.split():
        try: importlib.import_module(name)
        except ImportError: print(f"not there: {name}", file=sys.stderr)
    assert not any(n.partition(".")[0] == PACKAGE for n in sys.modules), f"{PACKAGE} must be imported by the forks only"

def serve(jobs, numbers, answers):
    "Take the next job until there is none; one copy of the tree per server."
    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        tree = Path(folder)/"tree"
        tree.mkdir()
        plant(tree)
        compile_all(tree)
        while token := os.read(numbers, 4):
            index = struct.unpack("<I", token)[0]
            tests, mutant, seconds = jobs[index]
            if mutant:
                with changed(tree, mutant): verdict = trial(tree, tests, mutant, seconds)
            else: verdict = trial(tree, tests)
            os.write(answers, (json.dumps([index, *verdict]) + "\n").encode())

def run_all(jobs, workers, progress):
    "The answers to all jobs, in their order."
    numbers, feed = os.pipe()
    answers, answer = os.pipe()
    os.write(feed, b"".join(struct.pack("<I", i) for i in range(len(jobs))))
    os.close(feed)
    servers = []
    for _ in range(workers):
        if not (pid := os.fork()):
            os.close(answers)
            try: serve(jobs, numbers, answer)
            except BaseException: traceback.print_exc()
            os._exit(0)
        servers.append(pid)
    os.close(answer)
    out = {}
    with os.fdopen(answers) as lines:
        for line in lines:
            index, *verdict = json.loads(line)
            out[index] = verdict
            progress(len(out), jobs[index], *verdict)
    for pid in servers: os.waitpid(pid, 0)
    if len(out) < len(jobs): sys.exit(f"{len(jobs) - len(out)} trials came to no end.")
    return [out[i] for i in range(len(jobs))]

def show(done, job, verdict, said, seconds):
    tests, mutant, _ = job
    name = f"{mutant.room}: {mutant.old.strip()} → {mutant.new.strip()}" if mutant else f"unchanged: {' '.join(tests)}"
    print(f"{done:4} {verdict:9}{seconds:6.1f} s  {name[:170]}" + (f"\n{'':22}{said[:150]}" if said and verdict != "survived" else ""), flush=True)

# --- the report

def cell(text): return text.strip().replace("|", "\\|")

def report(results, seconds):
    "The table by room, and the survivors with the reason why."
    rooms = list(dict.fromkeys(r.mutant.room for r in results))
    killed = [r for r in results if r.verdict in ("killed", "hung")]
    alive = [r for r in results if r.verdict == "survived"]
    by_notebook = sum(".ipynb" in r.said for r in killed)
    lines = ["# Mutation", "", f"`make mutate`: {len(results)} one-line changes of {len(rooms)} modules, each tried against the tests that should notice it. "
             f"**{len(killed)} of {len(results)} ({len(killed) / len(results):.1%}) were noticed**, {by_notebook} by a notebook, "
             f"{len(killed) - by_notebook} by pytest; {seconds:,.0f} s of trials.", "", "| module | changes | noticed | survived |", "|---|---:|---:|---:|"]
    for room in rooms:
        here, gone = [r for r in results if r.mutant.room == room], [r for r in killed if r.mutant.room == room]
        lines.append(f"| {room} | {len(here)} | {len(gone)} | {len(here) - len(gone)} |")
    if alive:
        lines += ["", "## What no test noticed", "", "| module | line | became | why |", "|---|---|---|---|"]
    for r in alive:
        why = WHY.get((r.mutant.room, r.mutant.new), "not looked into")
        lines.append(f"| {r.mutant.room} | `{cell(r.mutant.old)}` | `{cell(r.mutant.new)}` | {why} |")
    return "\n".join(lines) + "\n", len(killed) / len(results)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", help="modules; all when none is given")
    parser.add_argument("--workers", type=int, default=1, help="trials at a time")
    parser.add_argument("--report", type=Path, help="file for the table")
    parser.add_argument("--match", default="", help="only changes whose text holds this")
    parser.add_argument("--fresh", action="store_true", help="try again what was noticed before, though neither module nor tests changed")
    parser.add_argument("--list", action="store_true", help="show the changes and stop")
    given = parser.parse_args()
    if wrong := [r for r in given.rooms if r not in MUTANTS]:
        parser.error(f"no changes for '{wrong[0]}'; known: {', '.join(MUTANTS)}")
    if faults := list(out_of_step(mutants())):
        sys.exit("tools/mutants.py is out of step:\n" + "\n".join(faults))
    chosen = [m for m in mutants(given.rooms) if given.match in m.old + m.new]
    if given.list:
        return print(*(f"{m.room}: {m.old} → {m.new}\n    {' '.join(m.tests)}" for m in chosen), sep="\n")
    os.environ |= dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="passive", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    warm()
    known = {} if given.fresh else remembered()
    open_ = [m for m in chosen if fingerprint(m) not in known]
    sets = list(dict.fromkeys(m.tests for m in open_))
    limits = {}
    for tests, (verdict, said, took) in zip(sets, run_all([(t, None, 600) for t in sets], given.workers, show)):
        if verdict != "survived": sys.exit(f"Without any change {' '.join(tests)} fail: {said}")
        limits[tests] = LEAST + 5 * took # a loop that never ends is noticed too
    def keep(done, job, *verdict):
        show(done, job, *verdict)
        remember([Result(job[1], *verdict)]) # an interrupted run goes on where it was
    verdicts = run_all([(m.tests, m, limits[m.tests]) for m in open_], given.workers, keep)
    tried = {m: Result(m, *v) for m, v in zip(open_, verdicts)}
    results = [tried.get(m) or Result(m, *known[fingerprint(m)]) for m in chosen]
    if broken := [r for r in results if r.verdict == "broken"]:
        sys.exit(f"The change was not tested: {broken[0].said}")
    text, share = report(results, sum(r.seconds for r in results))
    print(text)
    if given.report: given.report.write_text(text)
    return 0 if share >= WANTED else 1

if __name__ == "__main__": sys.exit(main())
