"What the site's menu lists, as tables for notebooks: read from _quarto.yml and the notebooks' own titles and quotes."
import json, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]
HEAD = re.compile(r"(?:---\n.*?\n---\s*)?# (?P<title>[^\n]+)\n*(?:> (?P<quote>[^\n]+))?", re.S) # a notebook's title and quote
GROUND = "what does everything stand on?" # the other stages ask in their own overview

def expand(contents, folder, seen):
    "A menu's files: patterns expanded in the order of their names, which is the reading order; absent ones dropped, none twice."
    for c in contents:
        for f in sorted(folder.glob(c)) if "*" in c else [folder/c] * (folder/c).exists():
            if (name := str(f.relative_to(folder))) not in seen:
                seen.add(name)
                yield name

def sections():
    "Title of each section of the menu → its notebooks in reading order."
    import yaml
    menu = yaml.safe_load((root/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    seen = set()
    return {s["section"]: list(expand(s["contents"], root/"nbs", seen)) for s in menu if "section" in s}

def head(file):
    "Title and quote of a notebook."
    text = "".join(json.loads((root/"nbs"/file).read_text())["cells"][0]["source"])
    found = HEAD.match(text)
    return found["title"], found["quote"] or ""

def lower(title): return title[0].lower() + title[1:]

def stages():
    "Folder, title in the menu and question of each stage, in reading order."
    found = []
    for title, files in sections().items():
        folder, _, first = files[0].partition("/")
        if not re.match(r"\d\d_", folder): continue
        asks = lower(head(files[0])[1]) if first == "00_overview.ipynb" else GROUND
        found.append((folder, title, asks))
    return found

def reference():
    "Stages, what each asks, and their notebooks in reading order."
    rows, files = [], sections()
    for _, title, asks in stages():
        links = [f"[{lower(head(f)[0])}]({f})" for f in files[title] if not f.endswith("/00_overview.ipynb")]
        rows.append(f"| [**{title}**]({files[title][0]}) | {asks} | {' · '.join(links)} |")
    return "\n".join(["| stage | its question | notebooks, in reading order |", "|---|---|---|", *rows])

def tutorials():
    "Walkthroughs in reading order, each with what it tells."
    rows = [f"| {i} | [**{head(f)[0]}**]({f}) | {head(f)[1]} |"
            for i, f in enumerate((f for f in sections()["Tutorials"] if f.startswith("tutorials/")), 1)]
    return "\n".join(["| | walkthrough | what it shows |", "|---|---|---|", *rows])

def screens(only=""):
    "Pictures of screens in nbs/assets, each named for what it shows."
    files = sorted(f for f in (root/"nbs/assets").iterdir() if f.suffix in (".png", ".jpg", ".webp") and only in f.stem)
    def name(f): return re.sub(r"[-_]", " ", f.stem).capitalize()
    return "\n\n".join(f"![{name(f)}](assets/{f.name})" for f in files)

def dashboard(): # the first of the explorers
    return next(iter(screens("explore").split("\n\n")))

LISTS = "reference|tutorials|screens|dashboard|front_door|names|rooms"
TABLE = re.compile(rf"^Markdown\(({LISTS})\((?:\"(\w+)\")?\)\)", re.M)
FIGURE = re.compile(r"^(stage_graph)\(\)", re.M)

def made_by(
    code, # Of a cell
): # What its output shows, by kind; nothing for another cell
    "The list or figure that a cell shows."
    import house
    if m := TABLE.search(code):
        function = globals().get(m[1]) or getattr(house, m[1])
        return {"text/markdown": function(*filter(None, [m[2]])).splitlines(keepends=True)}
    if m := FIGURE.search(code):
        figure = json.loads(getattr(house, m[1])().to_json())
        return {"application/vnd.plotly.v1+json": figure | dict(config=dict(plotlyServerURL="https://plot.ly"))}
    return {}

def stale(write=False):
    "Lists stored in notebooks that are older than the files; with `write` they are renewed."
    found = []
    pages = [root/"nbs"/f"{n}.ipynb" for n in ("index", "start", "gallery")]
    for file in [*pages, *sorted((root/"nbs").glob("[0-9]*/00_*.ipynb"))]:
        nb = json.loads(file.read_text())
        changed = False
        for c in nb["cells"]:
            made = made_by("".join(c["source"]))
            if not made or any(o["data"].get(k) == v for o in c["outputs"] for k, v in made.items()): continue
            kind = "execute_result" if "text/markdown" in made else "display_data"
            output = dict(output_type=kind, data=made, metadata={})
            if kind == "execute_result":
                output["data"] = made | {"text/plain": ["<IPython.core.display.Markdown object>"]}
                output["execution_count"] = None
            c["outputs"] = [output]
            changed = True
        if changed:
            found.append(f"{file.parent.name}/{file.name} lists other notebooks or pictures than there are")
        if changed and write: file.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + "\n")
    return found
