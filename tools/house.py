"The house as it stands: public names, rooms, and who imports whom; as tables and a figure for notebooks."
import ast, re
from functools import cache
from importlib import import_module
from pathlib import Path

import site_map
from site_map import head, lower, root

PACKAGE = "model_glue_nb"

@cache
def stages():
    "Folder, title and question of each stage, read once."
    return site_map.stages()

@cache
def tree(
    module, # With the package's name
): # Its lines and its syntax tree
    "The source of a module, read without running it."
    path = root/f"{module.replace('.', '/')}.py"
    text = (path if path.exists() else path.with_suffix("")/"__init__.py").read_text()
    return text.splitlines(), ast.parse(text)

def targets(
    node, # Statement
): # Names that it gives to something
    "What a statement assigns."
    if isinstance(node, ast.AnnAssign): return [getattr(node.target, "id", "")]
    if not isinstance(node, ast.Assign): return []
    return [t.id for t in node.targets if isinstance(t, ast.Name)]

def doc(
    module, # Where a name is defined
    name,
): # One line, or nothing
    "What a public name does: the first line of its docstring, what a registry holds, a constant's comment."
    lines, source = tree(module)
    for node in source.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if name not in targets(node): continue
        kind = re.search(r"= \w+\(\"([\w -]+)\"\)", lines[node.lineno - 1])
        if kind: return f"Every {kind[1]} by name; as a decorator it takes in one more."
        return lines[node.lineno - 1].partition(" # ")[2]
    return ""

def top():
    "Names of the front door → their home modules, in reading order."
    door = import_module(PACKAGE)
    return door._homes(door.FACE)

def face(
    stage, # Its folder in the package
): # Name → home module
    "What a stage offers."
    door = import_module(PACKAGE)
    return door._stage_homes(stage, import_module(f"{PACKAGE}.{stage}").FACE)

def table(
    homes, # Name → home module
    known=(), # Names to be set in bold
):
    "Names, what they do, and where they live."
    def row(name, module):
        shown = f"**`{name}`**" if name in known else f"`{name}`"
        return f"| {shown} | {doc(module, name)} | `{module.removeprefix(PACKAGE + '.')}` |"
    rows = [row(*x) for x in homes.items()]
    return "\n".join(["| name | what it does | lives in |", "|---|---|---|", *rows])

def names(stage):
    "The face of a stage as a table; what stands at the front door too is bold."
    return table(face(stage), top())

def stage_of(
    parts, # Of a module's dotted name, the package first
):
    "The stage that a module belongs to."
    folders = {f[3:] for f, *_ in stages()}
    return parts[1] if len(parts) > 1 and parts[1] in folders else "ground"

def front_door():
    "The names of the front door, stage by stage."
    found = []
    for folder, title, _ in stages():
        stage = folder[3:]
        here = {n: m for n, m in top().items() if stage_of(m.split(".")) == stage}
        if not here: continue
        at = f"../{folder}/00_overview.ipynb"
        found.append(f"### {title}" if stage == "ground" else f"### [{title}]({at})")
        found.append(table(here))
    return "\n\n".join(found)

def rooms(stage):
    "The notebooks of a stage in reading order, each with what it says of itself."
    folder = next(f for f, *_ in stages() if f[3:] == stage)
    files = [f for f in sorted((root/"nbs"/folder).glob("*.ipynb")) if not f.name.startswith("00_")]
    rows = [f"| [{lower(head(f)[0])}]({f.name}) | {head(f)[1]} |" for f in files]
    return "\n".join(["| module | what it is about |", "|---|---|", *rows])

def imported(
    path, # Of a module
    package, # Its package, in parts
):
    "Modules of the package that a module imports, at any depth of its code, in parts."
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: yield [*package[:len(package) - node.level + 1], *(node.module or "").split(".")]
        elif (node.module or "").startswith(PACKAGE): yield node.module.split(".")

@cache
def arrows():
    "Who imports whom: (stage, stage below) → by how many pairs of rooms."
    found = {}
    for path in (root/PACKAGE).rglob("*.py"):
        if path.name.startswith("_"): continue
        package = [PACKAGE, *path.relative_to(root/PACKAGE).parts[:-1]]
        used = {tuple(u) for u in imported(path, package)}
        for below in map(stage_of, used):
            pair = stage_of(package), below
            if len(set(pair)) == 2: found[pair] = found.get(pair, 0) + 1
    return found

def floors():
    "Stage → its floor: one more than the highest that it imports from; a circle stops here."
    found, order = {}, [f[3:] for f, *_ in stages()]
    for stage in order:
        below = [b for a, b in arrows() if a == stage]
        later = [b for b in below if b not in found]
        if later: raise ValueError(f"{stage} imports {later[0]}, which comes later")
        found[stage] = 1 + max((found[b] for b in below), default=0)
    return found

def needed():
    "Arrows that no longer way replaces: the others are told by going down step by step."
    found = set(arrows())
    below = {}
    for stage in floors(): below[stage] = {b for a, b in found if a == stage}
    def reach(stage): return below[stage].union(*(reach(b) for b in below[stage]))
    return {(a, b) for a, b in found if not any(b in reach(c) for c in below[a] - {b})}

def places():
    "Stage → where it is drawn: its floor upwards; two on one floor stand side by side."
    found, floor = {}, floors()
    for stage, y in floor.items():
        beside = [s for s, f in floor.items() if f == y]
        found[stage] = (beside.index(stage) - (len(beside) - 1) / 2, y)
    return found

def curve(
    start, # x and y of the upper stage
    end, # Of the lower one
    points=12,
): # Lists of x and y
    "An arrow's way, bent outwards the more floors it skips."
    (x0, y0), (x1, y1) = start, end
    side = 1 if x0 + x1 >= 0 else -1
    bend = side * .16 * (y0 - y1 - 1)
    steps = [i / points for i in range(points + 1)]
    x = [round(x0 + (x1 - x0) * t + 4 * bend * t * (1 - t), 3) for t in steps]
    return x, [round(y0 + (y1 - y0) * t, 3) for t in steps]

def stage_graph():
    "Who imports whom, by stages: every line goes down."
    import plotly.graph_objects as go
    from model_glue_nb.reporting.figures import finish
    place, must, fig = places(), needed(), go.Figure()
    title = {f[3:]: t for f, t, _ in stages()}
    for strong in (False, True):
        x, y = [], []
        for pair in sorted(p for p in arrows() if (p in must) == strong):
            way = curve(place[pair[0]], place[pair[1]])
            x += [*way[0], None]
            y += [*way[1], None]
        label = "by this way only" if strong else "over other stages too"
        line = dict(color="#4c78a8", width=2.2) if strong else dict(color="rgba(130,130,130,.35)", width=1)
        fig.add_scatter(x=x, y=y, mode="lines", name=label, line=line, hoverinfo="skip")
    says = []
    for stage in place:
        below = [f"{title[b]} ({n})" for (a, b), n in sorted(arrows().items()) if a == stage]
        says.append(f"<b>{title[stage]}</b><br>imports " + (", ".join(below) or "nothing of the package"))
    spots = dict(x=[x for x, _ in place.values()], y=[y for _, y in place.values()])
    marker = dict(size=15, color="#f58518", line=dict(width=1, color="white"))
    fig.add_scatter(**spots, mode="markers", showlegend=False, marker=marker,
                    hovertext=says, hoverinfo="text")
    for stage, (x, y) in place.items():
        left = x < 0 or stage == "ground"
        fig.add_annotation(x=x, y=y, text=title[stage], showarrow=False, xanchor="right" if left else "left",
                           xshift=-12 if left else 12, bgcolor="rgba(255,255,255,.8)", font_color="#222")
    n_floors = max(floors().values())
    about = [f"{len(place)} stages", f"{n_floors} floors", f"{len(arrows())} pairs of stages", "no line goes up"]
    hidden = dict(visible=False, range=[-2.4, 2.4])
    floor = dict(title="floor", dtick=1, range=[.5, n_floors + .5])
    return finish(fig, "Who imports whom", about, height=620, xaxis=hidden, yaxis=floor)
