"The front door and the faces of stages: light, complete, and each name is what its home module defines."
import ast, inspect, json, re, subprocess, sys
from importlib import import_module
from pathlib import Path
import pytest
import model_glue_nb
from model_glue_nb.core import silent

root = Path(__file__).resolve().parents[1]
STAGES = sorted(p.parent.name for p in (root/"model_glue_nb").glob("*/__init__.py"))
HOMES = model_glue_nb._homes(model_glue_nb.FACE)
HEAVY = {"numpy", "pandas", "torch", "transformers", "plotly", "scipy", "sklearn"}

def homes(stage): return model_glue_nb._stage_homes(stage, import_module(f"model_glue_nb.{stage}").FACE)
def rooms(stage): return {p.stem for p in (root/"model_glue_nb"/stage).glob("*.py")}

def fresh(code):
    "What a new process prints."
    done = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True)
    assert not done.returncode, done.stderr
    return done.stdout.split()

def defined(module):
    "Names that a module gives to something itself."
    source = (root/f"{module.replace('.', '/')}.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        if isinstance(node, ast.Assign): yield from (t.id for t in node.targets if isinstance(t, ast.Name))

def test_the_door_and_the_faces_load_nothing():
    modules = ", ".join(f"model_glue_nb.{s}" for s in STAGES)
    loaded = fresh(f"import sys, model_glue_nb, {modules}; print(*sys.modules)")
    assert not HEAVY & set(loaded)
    ours = {m for m in loaded if m.startswith("model_glue_nb")}
    assert ours == {"model_glue_nb", *(f"model_glue_nb.{s}" for s in STAGES)}, "no room is loaded either"

@pytest.mark.parametrize("name", HOMES)
def test_a_name_is_what_its_home_defines(name):
    thing, home = getattr(model_glue_nb, name), HOMES[name]
    assert thing is getattr(import_module(home), name) and name in set(defined(home))
    assert callable(thing) and thing.__doc__

@pytest.mark.parametrize("stage", STAGES)
def test_a_face_agrees_with_the_door(stage):
    face = import_module(f"model_glue_nb.{stage}")
    assert face.__doc__.endswith("?"), "the question of the stage"
    assert not set(face.__all__) & rooms(stage), "a name would be a room as soon as the room is imported"
    assert set(dir(face)) >= set(face.__all__) == set(homes(stage))
    assert len(face.__all__) == len(set(face.__all__))
    at_the_door = {n for n, home in HOMES.items() if home.startswith(f"model_glue_nb.{stage}.")}
    assert at_the_door - rooms(stage) <= set(face.__all__)
    assert not at_the_door & {n for names in face.FACE.values() for n in names.split()}, "written twice"
    for name, home in homes(stage).items():
        assert name in set(defined(home)), f"{home} does not define {name}"
    for name in at_the_door & set(face.__all__): assert getattr(face, name) is getattr(model_glue_nb, name)
    with pytest.raises(AttributeError, match=f"'model_glue_nb.{stage}' has no attribute 'quux'"): face.quux

def test_no_name_of_the_door_is_a_folder_or_a_module():
    taken = {p.stem for p in (root/"model_glue_nb").iterdir()}
    assert not taken & set(HOMES), "the import of that module would take the name's place"
    listed = " ".join(model_glue_nb.FACE.values()).split()
    assert len(HOMES) == len(listed), "a name stands twice"
    assert 35 <= len(HOMES) <= 50, "a door, not a list of everything"

def test_importing_a_room_hides_no_function():
    code = ("from model_glue_nb import merge, search; "
            "import model_glue_nb.merging.merge, model_glue_nb.searching.search; "
            "import model_glue_nb as g; from model_glue_nb.merging import merge as room; "
            "print(g.merge is merge, g.search is search, callable(merge), room.merge is merge)")
    assert fresh(code) == ["True"] * 4

def test_a_star_brings_all():
    code = ("from model_glue_nb import *; import model_glue_nb as g; "
            "print(all(n in globals() for n in g.__all__), g.__version__)")
    assert fresh(code) == ["True", model_glue_nb.__version__]

def test_registries_are_full_when_they_come_through_the_door():
    code = ("from model_glue_nb import merge_methods, strategies, routers; "
            "print(*map(len, (merge_methods, strategies, routers)))")
    add = {"merge_methods": 0, "strategies": 0, "routers": 0}
    decorator = re.compile(r"^@(merge_methods|strategies|routers)\b", re.M)
    for path in (root/"model_glue_nb").rglob("*.py"):
        for name in decorator.findall(path.read_text()): add[name] += 1
    assert list(map(int, fresh(code))) == list(add.values())

def test_names_are_listed_and_a_wrong_one_has_a_hint():
    assert set(dir(model_glue_nb)) >= {*HOMES, "__version__"} and model_glue_nb.__all__ == list(HOMES)
    with pytest.raises(AttributeError, match=r"'similarty'\. Did you mean 'similarity'\?"):
        model_glue_nb.similarty
    with pytest.raises(AttributeError, match="no attribute 'quux'$"): model_glue_nb.quux
    with pytest.raises(ImportError, match="cannot import name 'read_zo'"):
        exec("from model_glue_nb import read_zo")

def test_the_names_are_typed_for_others():
    assert (root/"model_glue_nb/py.typed").exists() and "py.typed" in (root/"setup.py").read_text()
    assert "model_glue_nb/py.typed" in (root/"MANIFEST.in").read_text()

def test_every_name_has_a_line_and_floors_are_few(monkeypatch):
    monkeypatch.syspath_prepend(str(root/"tools"))
    import house
    assert all(house.doc(home, name) for name, home in HOMES.items())
    assert all(house.doc(home, name) for stage in STAGES for name, home in homes(stage).items())
    floors = house.floors() # an arrow upwards stops it
    assert set(floors) == {"ground", *STAGES} and max(floors.values()) <= 12

def test_the_figure_is_the_one_of_today(monkeypatch):
    monkeypatch.syspath_prepend(str(root/"tools"))
    import house
    nb = json.loads((root/"nbs/00_ground/00_front_door.ipynb").read_text())
    stored, = [o["data"]["application/vnd.plotly.v1+json"] for c in nb["cells"] for o in c.get("outputs", [])
               if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert stored["data"] == json.loads(house.stage_graph().to_json())["data"], "make docs draws it anew"

def doors():
    "The functions among the names at the front door, with their parameters."
    found = {n: getattr(model_glue_nb, n) for n in model_glue_nb.__all__}
    return {n: inspect.signature(f).parameters.values() for n, f in found.items() if inspect.isfunction(f)}

def test_what_comes_first_then_where_from_then_where_to_then_keywords():
    wrong = []
    for name, parameters in doors().items():
        placed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        order = [p for p in ("spec", "recipe", "grid", "zoo", "out") if p in placed]
        sound = len(placed) <= 4 and not {"progress", "given"} & set(placed)
        if not sound or [p for p in placed if p in order] != order:
            wrong.append(f"{name}({', '.join(placed)})")
    assert not wrong

def test_progress_is_silent_unless_someone_watches():
    defaults = {n: p.default for n, ps in doors().items() for p in ps if p.name == "progress"}
    assert {"ask", "similarity", "merge", "glue", "bench"} <= set(defaults)
    assert all(d is silent for d in defaults.values()), defaults
