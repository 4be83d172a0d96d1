"What the site's menu lists, as tables for notebooks: read from _quarto.yml and the notebooks' own titles and quotes."
import json, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]
HEAD = re.compile(r"(?:---\n.*?\n---\s*)?# (?P<title>[^\n]+)\n*(?:> (?P<quote>[^\n]+))?", re.S) # a notebook's title and quote
ASKS = {"Ground": "what does everything stand on?", "Tensors": "how fast can numbers be read, changed and written?",
        "Checkpoints": "what do a model's files say?", "Zoo": "which models are there, and what fits together?",
        "Benchmarking": "how good is each model, and how sure are we?", "Merge-ability": "which models can be merged?",
        "Merging": "how are they merged?", "Searching": "which merge is best?",
        "Mixing": "how do strangers work together?", "Gluing": "what did it gain, in one command?",
        "Reporting": "what does it look like?", "Experiments": "what does each way of gluing gain, on any zoo?",
        "Zoos that ship with us": "where do the models come from?", "Command line": "how is it asked from a shell?"}

def expand(contents, folder, seen):
    "A menu's files: patterns expanded in the order of their names, which is the reading order; absent ones dropped, none twice."
    for c in contents:
        for f in sorted(folder.glob(c)) if "*" in c else [folder/c] * (folder/c).exists():
            if (name := str(f.relative_to(folder))) not in seen: seen.add(name); yield name

def sections():
    "Title of each section of the menu → its notebooks in reading order."
    import yaml
    menu = yaml.safe_load((root/"_quarto.yml").read_text())["website"]["sidebar"]["contents"]; seen = set()
    return {s["section"]: list(expand(s["contents"], root/"nbs", seen)) for s in menu if "section" in s}

def head(file):
    "Title and quote of a notebook."
    text = "".join(json.loads((root/"nbs"/file).read_text())["cells"][0]["source"])
    found = HEAD.match(text)
    return found["title"], found["quote"] or ""

def lower(title): return title[0].lower() + title[1:]

def reference():
    "Stages, what each asks, and their notebooks in reading order."
    rows = [f"| **{name}** | {ASKS[name]} | " + " · ".join(f"[{lower(head(f)[0])}]({f})" for f in files) + " |"
            for name, files in sections().items() if name in ASKS]
    return "\n".join(["| stage | its question | notebooks, in reading order |", "|---|---|---|", *rows])

def tutorials():
    "Walkthroughs in reading order, each with what it tells."
    rows = [f"| {i} | [**{head(f)[0]}**]({f}) | {head(f)[1]} |"
            for i, f in enumerate((f for f in sections()["Tutorials"] if f.startswith("tutorials/")), 1)]
    return "\n".join(["| | walkthrough | what it tells |", "|---|---|---|", *rows])

def screens(only=""):
    "Pictures of screens in nbs/assets, each named for what it shows."
    files = sorted(f for f in (root/"nbs/assets").iterdir() if f.suffix in (".png", ".jpg", ".webp") and only in f.stem)
    name = lambda f: re.sub(r"[-_]", " ", f.stem).capitalize()
    return "\n\n".join(f"![{name(f)}](assets/{f.name})" for f in files)

def dashboard(): # the first of the explorers
    return next(iter(screens("explore").split("\n\n")))

TABLE = re.compile(r"^Markdown\((reference|tutorials|screens|dashboard)\(\)\)", re.M)

def stale(write=False):
    "Lists stored in notebooks that are older than the files; with `write` they are renewed."
    found = []
    for file in (root/"nbs"/f"{n}.ipynb" for n in ("index", "start", "gallery")):
        nb = json.loads(file.read_text()); changed = False
        for c in nb["cells"]:
            made = TABLE.search("".join(c["source"]))
            if not made: continue
            lines = globals()[made[1]]().splitlines(keepends=True)
            for o in c["outputs"]:
                if o["data"]["text/markdown"] != lines: o["data"]["text/markdown"] = lines; changed = True
        if changed: found.append(f"{file.name} lists other notebooks or pictures than there are")
        if changed and write: file.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + "\n")
    return found
