"What the site's menu lists, as tables for notebooks: read from _quarto.yml and the notebooks' own titles and quotes."
import json, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]
HEAD = re.compile(r"(?:---\n.*?\n---\s*)?# (?P<title>[^\n]+)\n*(?:> (?P<quote>[^\n]+))?", re.S) # a notebook's title and quote
ASKS = {"Zoo and loops": "what is in the files, and how fast can it be read?", "Benchmarking": "how good is each model, and how sure are we?",
        "Merge-ability": "which models can be merged?", "Merging": "how are they merged?", "Search": "which merge is best?",
        "Mixture": "how do strangers work together?", "Pipeline": "what did it gain, in one command?",
        "Dashboards": "what does it look like?", "Zoos that ship with us": "where do the models come from?"}

def expand(contents, folder, seen):
    "A menu's files: patterns expanded, absent ones dropped, none twice."
    for c in contents:
        for f in sorted(str(p.relative_to(folder)) for p in folder.glob(c)) if "*" in c else [c] * (folder/c).exists():
            if f not in seen: seen.add(f); yield f

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

def reference():
    "Stages, what each asks, and their notebooks in reading order."
    rows = [f"| **{name}** | {ASKS[name]} | " + " · ".join(f"[{head(f)[0].lower()}]({f})" for f in files) + " |"
            for name, files in sections().items() if name in ASKS]
    return "\n".join(["| stage | its question | notebooks, in reading order |", "|---|---|---|", *rows])

def tutorials():
    "Walkthroughs in reading order, each with what it tells."
    rows = [f"| {i} | [**{head(f)[0]}**]({f}) | {head(f)[1]} |"
            for i, f in enumerate((f for f in sections()["Tutorials"] if f.startswith("tutorials/")), 1)]
    return "\n".join(["| | walkthrough | what it tells |", "|---|---|---|", *rows])

def stale(write=False):
    "Tables stored in notebooks that are older than the files; with `write` they are renewed."
    found = []
    for file in (root/"nbs/index.ipynb", root/"nbs/start.ipynb"):
        nb = json.loads(file.read_text()); changed = False
        for c in nb["cells"]:
            made = re.search(r"^Markdown\((reference|tutorials)\(\)\)", "".join(c["source"]), re.M)
            if not made: continue
            lines = globals()[made[1]]().splitlines(keepends=True)
            for o in c["outputs"]:
                if o["data"]["text/markdown"] != lines: o["data"]["text/markdown"] = lines; changed = True
        if changed: found.append(f"{file.name} lists other notebooks than there are")
        if changed and write: file.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + "\n")
    return found
