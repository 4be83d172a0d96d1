"Is the repository honest? Order of imports, sizes, hidden export cells, light imports."
import ast, io, json, re, subprocess, sys, tokenize
from collections import Counter
from functools import cache
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
LINE, MODULE, CELLS, NOTEBOOK, BINARY = 110, 400, 80, 300_000, 100_000
CELL, FUNCTION = 100, 65 # lines
# Soft limits: what exceeds one stands here, with how much. The numbers may fall and should not rise.
TOKENS, DENSITY = 25, dict(semicolons=0.0, lambdas=0.004, long=3.5) # fastcore 1.8: 0.12, 0.20 and 4.7
LONG_LINES = {"core": 5, "merging.live": 1, "merging.merge": 3, "merging.planner": 6, "merging.recipes": 2, "mixing.mixture": 3, "zoo.sources": 2}

@cache
def notebooks():
    return sorted(p for p in (root/"nbs").glob("**/*.ipynb") if not {".ipynb_checkpoints", "_proc"} & set(p.parts))
@cache
def cells(path): return json.loads(path.read_text())["cells"]
def source(cell): return "".join(cell["source"])
def directive(cell, names):
    return bool(re.match(rf"#\|\s*({names})\b", source(cell).lstrip())) if cell["cell_type"] == "code" else False
def exported(path): return [source(c) for c in cells(path) if directive(c, "export|exporti|exports")]

def module(path):
    "What a notebook exports, or None."
    found = [m[1] for c in cells(path) if (m := re.match(r"#\|\s*default_exp\s+(\S+)", source(c)))]
    return found[0] if found else None

@cache
def exporting(): return {module(p): p for p in notebooks() if module(p)}

def imported(code):
    "Modules of the package that some code may import at any depth: a name after `import` may be one, or stand in one."
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.M))):
        if isinstance(node, ast.ImportFrom):
            named = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import): named = [a.name for a in node.names]
        else: continue
        yield from (n.removeprefix("model_glue_nb.") for n in named if n.startswith("model_glue_nb."))

def place(path): # number of the folder, number in the folder
    return tuple(int(p[:2]) for p in path.relative_to(root/"nbs").parts)
def file_of(name): return root/"model_glue_nb"/f"{name.replace('.', '/')}.py"

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

@cache
def code_tokens(text):
    return [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in LAYOUT]

def tokens_by_line(text): return Counter(t.start[0] for t in code_tokens(text))

nb = pytest.mark.parametrize("path", notebooks(), ids=lambda p: f"{p.parent.name}/{p.stem}")
mod = pytest.mark.parametrize("name", sorted(exporting()))

@mod
def test_imports_go_downwards(name):
    "Folders in their order, and the rooms of a folder in theirs, are the order in which one imports the other; so nothing goes round."
    known = exporting()
    for used in {u for code in exported(known[name]) for u in imported(code)} & set(known) - {name}:
        assert place(known[used]) < place(known[name]), f"{name} imports {used}, which comes later"

@mod
def test_a_module_is_named_as_its_notebook(name):
    folder, room = exporting()[name].relative_to(root/"nbs").with_suffix("").parts
    stage = folder[3:] + "."
    made = "__init__" if room[:2] == "00" else room[3:] # a folder begins with its face
    assert name == ("" if stage == "ground." else stage) + made, f"{name} is made by {folder}/{room}"

def test_numbers_have_no_gaps():
    places = sorted(place(p) for p in exporting().values())
    folders = sorted({f for f, _ in places})
    assert folders == list(range(len(folders)))
    for folder in folders:
        rooms = [r for f, r in places if f == folder]
        assert rooms == list(range(len(rooms))), f"folder {folder:02}"

def test_one_notebook_per_module():
    names = [module(p) for p in notebooks() if module(p)]
    assert len(names) == len(set(names))
    files = (p.relative_to(root/"model_glue_nb").with_suffix("") for p in (root/"model_glue_nb").rglob("*.py"))
    made = {".".join(p.parts) for p in files} - {"_modidx"}
    assert made == set(names), "modules and notebooks differ; run nbdev_export"

@mod
def test_module_size(name):
    "Lines that hold code: blank lines, comments and the marks of cells are for the eye."
    n = len(tokens_by_line(file_of(name).read_text()))
    assert n <= MODULE, f"{n} lines; make two notebooks of it"

@mod
def test_line_length(name):
    long = [line for code in exported(exporting()[name]) for line in code.splitlines() if len(line) > LINE]
    assert len(long) <= LONG_LINES.get(name, 0), f"{len(long)} lines over {LINE} characters, the first: {long[0]}"

def density(texts):
    "How dense code is: statements joined by `;` and named lambdas per 100 lines, lines of more than 25 tokens in percent."
    lines, semicolons, lambdas, long = 0, 0, 0, 0
    for text in texts:
        counts = tokens_by_line(text)
        lines += len(counts)
        long += sum(n > TOKENS for n in counts.values())
        semicolons += sum(t.string == ";" for t in code_tokens(text))
        lambdas += sum(isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda) for n in ast.walk(ast.parse(text)))
    return dict(semicolons=100 * semicolons / lines, lambdas=100 * lambdas / lines, long=100 * long / lines)

def test_density():
    "One thought a line. These numbers may fall and must not rise."
    found = density([file_of(name).read_text() for name in exporting()])
    assert {k: v for k, v in found.items() if v > DENSITY[k]} == {}, found

def test_density_sees_what_it_should():
    dense = "x = 1; y = 2\nf = lambda a: a\nz = [" + "1, " * 20 + "]\n"
    assert density([dense]) == pytest.approx(dict(semicolons=100 / 3, lambdas=100 / 3, long=100 / 3))
    assert density(["x = 1\ndef f(a): return a\n"]) == dict(semicolons=0, lambdas=0, long=0)

@mod
def test_cells_and_functions_are_short(name):
    assert max((len(code.splitlines()) for code in exported(exporting()[name])), default=0) <= CELL
    for n in ast.walk(ast.parse(file_of(name).read_text())):
        if isinstance(n, ast.FunctionDef):
            assert n.end_lineno - n.lineno < FUNCTION, f"{n.name} is too long: name its parts"

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
        body = ast.parse(source(c)).body
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in body}
        guard = all(isinstance(n, (ast.Import, ast.ImportFrom)) or isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
                    for n in body)
        assert guard or len(kinds) == 1, f"imports and code are mixed in: {source(c)[:80]}"

def test_import_is_light():
    names = ("core tensors.native tensors.dtypes tensors.kernels tensors.streams zoo.zoo zoo.writer merging.methods merging.planner merging.merge "
             "reporting.plots reporting.dashboard cli.app cli.zoo cli.score cli.merge cli.glue cli.serve cli.chat cli.program").split()
    code = (f"import importlib, sys; [importlib.import_module('model_glue_nb.' + n) for n in {names}]; "
            "print(*[m for m in 'torch transformers pandas plotly sklearn lm_eval IPython fastapi uvicorn'.split() if m in sys.modules])")
    heavy = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True, check=True).stdout.split()
    assert not heavy, f"importing {', '.join(names)} pulls in {', '.join(heavy)}"

def test_no_large_binaries():
    skip = {".venv", ".git", "runs", "_proc", "_docs", "build", "dist"}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True)
    files = [root/f for f in listed.stdout.decode().split("\0") if f] if listed.returncode == 0 else root.rglob("*")
    for f in files:
        if not f.is_file() or set(f.relative_to(root).parts) & skip or f.is_relative_to(root/"model_glue_nb/data"):
            continue
        if f.stat().st_size > BINARY:
            assert b"\0" not in f.read_bytes()[:8192], f"{f.relative_to(root)} is a large binary"

def test_quarto_file_is_linked():
    link = root/"nbs/_quarto.yml"
    assert link.is_symlink() and link.resolve() == root/"_quarto.yml"

def test_version_is_one():
    import model_glue_nb
    assert f"version = {model_glue_nb.__version__}\n" in (root/"settings.ini").read_text()

def test_constraints_pin_what_is_tested():
    for line in (root/"constraints.txt").read_text().splitlines():
        if line and line[0] != "#": assert re.fullmatch(r"[\w.\-\[\]]+==[\w.]+", line), line

def test_every_folder_is_packaged():
    from setuptools import find_packages
    assert "find_packages" in (root/"setup.py").read_text()
    packages = {"model_glue_nb", *(f"model_glue_nb.{n.rpartition('.')[0]}".rstrip(".") for n in exporting())}
    assert set(find_packages(str(root), include=["model_glue_nb", "model_glue_nb.*"])) == packages

def test_data_is_packaged():
    manifest = (root/"MANIFEST.in").read_text()
    assert "recursive-include model_glue_nb/data" in manifest
    assert (root/"model_glue_nb/data/report.html.template").exists()

# ---- one way to extend a class, one manner of registries
def top_level(name): return ast.parse(file_of(name).read_text()).body

@mod
def test_methods_come_by_patch(name):
    "`@patch` says in one line which class a function belongs to; an assignment says it anywhere."
    targets = [t for n in top_level(name) if isinstance(n, ast.Assign) for t in n.targets]
    parts = [x for t in targets for x in (t.elts if isinstance(t, ast.Tuple) else [t])]
    hung = [ast.unparse(x) for x in parts if isinstance(x, ast.Attribute)]
    assert not hung, f"{', '.join(hung)}: use fastcore's @patch"

@mod
def test_public_names_are_words(name):
    public = [ast.literal_eval(n.value) for n in top_level(name)
              if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__" and isinstance(n.value, ast.List)]
    short = [x for names in public for x in names if len(x) < 2]
    assert not short, f"{', '.join(short)}: what is not meant for users begins with _, the rest has a name"

def registries():
    "Every registry of the package by name, all of its entries registered."
    from importlib import import_module
    from model_glue_nb.core import Registry
    text = {name: file_of(name).read_text() for name in exporting()}
    made = [n for n in text if re.search(r"^\w+ = \w+\(\"[\w ]+\"\)", text[n], re.M) and "Registry" in text[n]]
    found = {k: v for n in made for k, v in vars(import_module(f"model_glue_nb.{n}")).items() if isinstance(v, Registry)}
    adds = re.compile(rf"^@({'|'.join(found)})\b", re.M)
    for n in text:
        if adds.search(text[n]): import_module(f"model_glue_nb.{n}")
    return found

def test_registries_have_one_manner():
    "An entry is a function whose signature declares what it takes, with a docstring that is its line in a list."
    import inspect
    found = registries()
    assert set(found) >= {"merge_methods", "strategies", "routers", "metrics", "linkages", "executors", "loaders"}
    for kind, registry in found.items():
        assert registry, f"{kind} is empty"
        for name, f in registry.items():
            whole = inspect.unwrap(f)
            assert inspect.isfunction(whole) and f.__name__ == name, f"{kind}: '{name}' is not a function"
            assert whole.__doc__, f"{kind}: '{name}' has no docstring"
            bare = [p.name for p in inspect.signature(whole).parameters.values() if p.annotation is p.empty]
            assert not bare, f"{kind}: '{name}' leaves {', '.join(bare)} without annotation"

# Decorators that take nothing into a registry; what another decorator takes is reached by its name.
PLAIN_DECORATORS = set("cache cached_property classmethod contextmanager dataclass lru_cache native no_grad patch property staticmethod total_ordering wraps".split())
# Module → public names that nobody else uses, and stay: a line would be too long, or an example gives them another value.
AT_HOME = {"benchmarking.offline_suite": "write",
           "checkpoints.checkpoint": "LOADED_BY",
           "checkpoints.headers": "is_size",
           "cli.app": "DEBUG",
           "gluing.comparison": "ms_per_question",
           "mergeability.similarity": "one_blas_thread",
           "merging.canonical": "ALWAYS_NORMALIZED DIVIDES VOTES",
           "mixing.one_checkpoint": "CLASSES",
           "tensors.masks": "keep_chance",
           "zoo.adapters": "LORA_KEY",
           "zoo.outlet": "NOTICES",
           "zoos.smollm2": "GymSkill"}
# Public names of several modules: each room has its own; the list may only grow shorter.
TWICE = "count"

@cache
def rooms():
    "Modules that define something, each with its notebook."
    return {name: path for name, path in sorted(exporting().items()) if path.name[:2] != "00"}

@cache
def body(name): return ast.parse(file_of(name).read_text()).body

def exports(name):
    "`__all__` of a module."
    lists = [n.value for n in body(name)
             if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__" and isinstance(n.value, ast.List)]
    return set(ast.literal_eval(lists[0])) if lists else set()

def definitions(name): return [n for n in body(name) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]

def syntax(path):
    "The code of a notebook or a file, without IPython's commands."
    if path.suffix == ".py": return ast.parse(path.read_text())
    codes = [source(c) for c in cells(path) if c["cell_type"] == "code"]
    return ast.parse("\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M)
                               for code in codes
                               if not code.lstrip().startswith("%%")))

def taken(path):
    "Names that some code takes from elsewhere: imported, behind a dot, or in a text."
    found = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("model_glue_nb"):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.Attribute): found.add(node.attr)
        elif isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = "".join(n.value for n in getattr(node, "values", [node]) if isinstance(n, ast.Constant))
            if "model_glue_nb" in text or path.name[:2] == "00" or text.isidentifier():
                found |= set(re.findall(r"\w+", text))
    return found

def registered(node):
    "Is a definition taken into a registry?"
    return any(ast.unparse(d).partition("(")[0].rpartition(".")[2] not in PLAIN_DECORATORS for d in node.decorator_list)

def words_of_signatures(name, public):
    "Words in the annotations of what is public: a type that one meets has a public name."
    def owner(node): # of a method in a later cell: the class in its first annotation
        first = node.args.args[:1] if isinstance(node, ast.FunctionDef) and node.decorator_list else []
        return ast.unparse(first[0].annotation) if first and first[0].annotation else node.name
    met = [n for n in definitions(name) if {n.name, owner(n)} & public]
    inside = [x for n in met for x in ast.walk(n)]
    notes = [x.annotation for x in inside if isinstance(x, (ast.arg, ast.AnnAssign)) and x.annotation is not None]
    notes += [x.returns for x in inside if isinstance(x, ast.FunctionDef) and x.returns is not None]
    return set(re.findall(r"\w+", " ".join(map(ast.unparse, notes))))

def test_public_names_are_used_elsewhere():
    "What only its own notebook uses begins with an underscore."
    code = [*notebooks(), *(f for d in ("tests", "tools", "benchmarks") for f in (root/d).glob("*.py"))]
    spoken = {path: taken(path) for path in code}
    count = Counter(name for names in spoken.values() for name in names)
    prose = "".join(source(c) for p in notebooks() for c in cells(p) if c["cell_type"] == "markdown" and "import" in source(c))
    known, lonely = set(re.findall(r"\w+", prose)), {}
    for name, own in rooms().items():
        if name in ("mixing.modeling", "mixing.routing"): continue # their text is written into checkpoints
        public = exports(name)
        marked = {n.name for n in definitions(name) if registered(n)}
        errors = {n.name for n in definitions(name)
                  if isinstance(n, ast.ClassDef) and re.search("Error|Exception|Warning", " ".join(map(ast.unparse, n.bases)))}
        rest = public - known - marked - errors - words_of_signatures(name, public) - set(AT_HOME.get(name, "").split())
        rest = {n for n in rest if count[n] == (n in spoken[own])}
        if rest: lonely[name] = sorted(rest)
    assert not lonely, f"used in their own notebook only, so let them begin with an underscore: {lonely}"

def test_public_names_are_unique():
    "A name is defined by one module; stages and the front door hand it on, a registry or the command line may have its own."
    homes = {}
    for name in rooms():
        defined = {n.name for n in definitions(name) if not registered(n)}
        defined |= {t.id for n in body(name)
                    if isinstance(n, ast.Assign) for t in ast.walk(n)
                    if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}
        for n in defined & exports(name): homes.setdefault(n, []).append(name)
    def made_twice(names): # for torch's devices
        return "tensors.torch_kernels" in names and all(n.startswith("tensors.") for n in names)
    double = {n: names for n, names in homes.items() if len(names) > 1 and not made_twice(names)}
    new = {n: names for n, names in double.items() if n not in TWICE.split()}
    assert not new, f"names of several modules; rename one: {new}"
