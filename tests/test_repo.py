"Is the repository honest? Order of imports, sizes, hidden export cells, light imports."
import ast, json, re, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
LINE, MODULE, CELLS, NOTEBOOK, BINARY = 110, 400, 80, 300_000, 100_000
# Soft limits: what exceeds one stands here, with how much. The numbers may fall and should not rise.
LONG_LINES = dict(adapters=3, core=6, engine=2, inputs=2, jobs=20, live=2, merge=7, mixture=5, recipes=6, token_files=1, unions=4, vocabularies=2)
LONG_MODULES = {}

def notebooks(): return sorted(p for p in (root/"nbs").glob("**/*.ipynb") if not {".ipynb_checkpoints", "_proc"} & set(p.parts))
def cells(path): return json.loads(path.read_text())["cells"]
def source(cell): return "".join(cell["source"])
def directive(cell, names): return bool(re.match(rf"#\|\s*({names})\b", source(cell).lstrip())) if cell["cell_type"] == "code" else False
def exported(path): return [source(c) for c in cells(path) if directive(c, "export|exporti|exports")]

def module(path):
    "What a notebook exports, or None."
    found = [m[1] for c in cells(path) if (m := re.match(r"#\|\s*default_exp\s+(\S+)", source(c)))]
    return found[0] if found else None

def exporting(): return {module(p): p for p in notebooks() if module(p)}

def imported(code):
    "Modules of the package that some code imports at any depth."
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.M))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("model_glue_nb."): yield node.module.split(".")[1]
        if isinstance(node, ast.ImportFrom) and node.module == "model_glue_nb": yield from (a.name for a in node.names)
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("model_glue_nb."))

nb = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
mod = pytest.mark.parametrize("name", sorted(exporting()))

@mod
def test_imports_go_downwards(name):
    known = exporting(); number = lambda n: int(re.match(r"\d+", known[n].name)[0])
    for used in {u for code in exported(known[name]) for u in imported(code)} & set(known):
        assert number(used) <= number(name), f"{known[name].name} imports {known[used].name}, which comes later"

def test_no_cycles():
    known = exporting(); uses = {n: {u for c in exported(p) for u in imported(c)} & set(known) - {n} for n, p in known.items()}
    done = set()
    while ready := [n for n in uses if n not in done and uses[n] <= done]: done |= set(ready)
    assert done == set(uses), f"import each other: {sorted(set(uses) - done)}"

def test_one_notebook_per_module():
    names = [module(p) for p in notebooks() if module(p)]
    assert len(names) == len(set(names))
    made = {p.stem for p in (root/"model_glue_nb").glob("*.py")} - {"__init__", "_modidx"}
    assert made == set(names), "modules and notebooks differ; run nbdev_export"

@mod
def test_module_size(name):
    n = len((root/f"model_glue_nb/{name}.py").read_text().splitlines())
    assert n <= LONG_MODULES.get(name, MODULE), f"{n} lines; make two notebooks of it"

@mod
def test_line_length(name):
    long = [line for code in exported(exporting()[name]) for line in code.splitlines() if len(line) > LINE]
    assert len(long) <= LONG_LINES.get(name, 0), f"{len(long)} lines over {LINE} characters, the first: {long[0]}"

@nb
def test_notebook_size(path):
    assert len(cells(path)) <= CELLS and path.stat().st_size <= NOTEBOOK
    assert "widgets" not in json.loads(path.read_text())["metadata"], "widget state is stored; it is 5 MB per figure"

@nb
def test_last_cell_exports(path):
    if module(path): assert source(cells(path)[-1]).split() == "#| hide import nbdev; nbdev.nbdev_export()".split()

@nb
def test_exported_imports_stand_alone(path):
    for c in cells(path):
        if not directive(c, "export|exporti|exports"): continue
        body = ast.parse(source(c)).body; kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in body}
        guard = all(isinstance(n, (ast.Import, ast.ImportFrom)) or isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
                    for n in body)
        assert guard or len(kinds) == 1, f"imports and code are mixed in: {source(c)[:80]}"

def test_import_is_light():
    names = [n for n in "core native values zoo writer kernels streams methods jobs merge plots dashboard terminal commands_zoo commands_score commands_merge commands_glue cli".split() if (root/f"model_glue_nb/{n}.py").exists()]
    code = (f"import importlib, sys; [importlib.import_module('model_glue_nb.' + n) for n in {names}]; "
            "print(*[m for m in 'torch transformers pandas plotly sklearn lm_eval IPython'.split() if m in sys.modules])")
    heavy = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True, check=True).stdout.split()
    assert not heavy, f"importing {', '.join(names)} pulls in {', '.join(heavy)}"

def test_no_large_binaries():
    skip = {".venv", ".git", "runs", "_proc", "_docs", "build", "dist"}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True)
    files = [root/f for f in listed.stdout.decode().split("\0") if f] if listed.returncode == 0 else root.rglob("*")
    for f in files:
        if not f.is_file() or set(f.relative_to(root).parts) & skip or f.is_relative_to(root/"model_glue_nb/data"): continue
        if f.stat().st_size > BINARY: assert b"\0" not in f.read_bytes()[:8192], f"{f.relative_to(root)} is a large binary"

def test_quarto_file_is_linked():
    link = root/"nbs/_quarto.yml"
    assert link.is_symlink() and link.resolve() == root/"_quarto.yml"

def test_version_is_one():
    import model_glue_nb
    assert f"version = {model_glue_nb.__version__}\n" in (root/"settings.ini").read_text()

def test_constraints_pin_what_is_tested():
    for line in (root/"constraints.txt").read_text().splitlines():
        if line and line[0] != "#": assert re.fullmatch(r"[\w.\-\[\]]+==[\w.]+", line), line

def test_data_is_packaged():
    manifest = (root/"MANIFEST.in").read_text()
    assert "recursive-include model_glue_nb/data" in manifest
    assert (root/"model_glue_nb/data/report.html.template").exists()
