"""The docs site in _docs and README.md, from the notebooks and the one root _quarto.yml.

    python tools/build_docs.py            with Quarto where it is installed, else with smalldocs
    python tools/build_docs.py --check    the same, and fails on a broken link or an outside resource; README.md is compared, not written
    python tools/build_docs.py --readme   only README.md and the lists of notebooks, at once
"""
import argparse, json, os, posixpath, re, shutil, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/"tools"))
from check_site import problems  # noqa: E402
from site_map import HEAD, expand, stale  # noqa: E402
from static_outputs import make_static  # noqa: E402

def process():
    "Notebooks with signatures and links, as nbdev makes them, in _proc."
    import ast, nbdev.doclinks, nbdev.processors as steps
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.serve import proc_nbs
    runs, head = steps._do_eval, FrontmatterProc._update
    def only_definitions(cell): # nbdev would also run every example that holds an import, without what stands before it
        if cell.cell_type != "code" or not cell.source: return
        plain = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in cell.parsed_() or [])
        if plain or cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"} or steps._is_showdoc(cell):
            return runs(cell)
    def keep_prose(self, read, cell): # nbdev would drop what stands below title and quote in the first cell
        found = HEAD.match(cell.source or "") if cell.cell_type == "markdown" else None
        if not found: return head(self, read, cell)
        self.fm.update(dict(title=found["title"]) | (dict(description=found["quote"]) if found["quote"] else {}))
        cell.source = cell.source[found.end():].strip() or None
    qualified = nbdev.doclinks._qual_syms
    def by_stage(index): # a name that two modules have leads to the stage that is read first, not to the first in the alphabet
        def page(module): return min((page for page, _ in index["syms"][module].values()), default="")
        ours = index["settings"].get("lib_path") == "model_glue_nb"
        return qualified(index | dict(syms={m: index["syms"][m] for m in sorted(index["syms"], key=page)}) if ours else index)
    steps._do_eval, FrontmatterProc._update, nbdev.doclinks._qual_syms = only_definitions, keep_prose, by_stage
    nbdev.doclinks._build_modidx()
    shutil.rmtree(root/"_proc", ignore_errors=True)
    return Path(proc_nbs(force=True, n_workers=0))

def entries(contents, out, names, seen):
    "A sidebar's contents: patterns expanded, absent pages dropped, no page twice, pages under their final names."
    found = []
    for c in contents:
        if isinstance(c, str):
            found += [names.get(f, f) for f in expand([c], out, seen)]
        elif "contents" in c:
            found += [c | dict(contents=inside)] if (inside := entries(c["contents"], out, names, seen)) else []
        elif (out/c["href"]).exists(): found.append(c | dict(href=names.get(c["href"], c["href"])))
    return found

def final_names(out):
    "Notebook → the name that nbdev links to, for those that have another."
    found = {}
    for f in sorted(out.rglob("*.ipynb")):
        name = re.search(r"output-file: ([\w.-]+)\.html", f.read_text())
        if name and name[1] != f.stem:
            found[str(f.relative_to(out))] = str(f.with_name(name[1] + ".ipynb").relative_to(out))
    return found

def relink(text, folder, names, host):
    "Links of one page in a folder of the site: between notebooks under their final names, to our own site relative, none inside code."
    def final(link):
        file = posixpath.normpath(posixpath.join(folder, link[1]))
        return posixpath.relpath(names.get(file, file), folder or ".")
    text = re.sub(r"output-file: [\w.-]+\.html(\\n)?", "", text)
    text = re.sub(r"(?<=\()((?:\.\./)*(?:\w+/)?\w+\.ipynb)(?=[)#])", final, text)
    def code(m): return re.sub(r"\[`([^`\]]+)`\]\([^)\s]+\)", r"\1", m[0]) # a link in a signature's comment
    text = re.sub(r"```python.*?```", code, text, flags=re.S)
    return text.replace(host, "../" * len(Path(folder).parts))

def configure(out):
    "Give pages their final names and links, and list the pages that exist in the menus."
    import yaml
    from nbdev.config import get_config
    c = get_config()
    host = f"{c.doc_host}{c.doc_baseurl}".rstrip("/") + "/"
    config = yaml.safe_load((out/"_quarto.yml").read_text())
    site, names = config["website"], final_names(out)
    (out/"changelog.qmd").write_text("---\ntitle: Changelog\n---\n" + (root/"CHANGELOG.md").read_text().split("\n", 1)[1])
    site["sidebar"]["contents"] = entries(site["sidebar"]["contents"], out, names, set())
    site["navbar"]["left"] = entries(site["navbar"]["left"], out, names, set())
    for old, new in names.items(): (out/old).rename(out/new)
    for f in [*out.rglob("*.ipynb"), *out.rglob("*.qmd")]:
        f.write_text(relink(f.read_text(), f.relative_to(out).parent.as_posix().removeprefix("."), names, host))
    config["project"]["resources"] = ["assets/*"]
    (out/"_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False))

def maths(site):
    "TeX to MathML, which browsers draw by themselves; the script that smalldocs would fetch is taken out."
    from latex2mathml.converter import convert
    import html
    for page in site.rglob("*.html"):
        text = was = page.read_text()
        text = re.sub(r'<link[^>]+katex[^>]*>|<script[^>]+katex[^>]*>\s*</script>', "", text)
        tex = r'<span class="math (inline|display)">\s*(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])\s*</span>'
        text = re.sub(tex,
                      lambda m: convert(html.unescape(m[2]), display="block" if m[1] == "display" else "inline"),
                      text, flags=re.S)
        if text != was: page.write_text(text)

def render(out):
    "Render _proc into _docs."
    import plotly
    (out/"assets").mkdir(exist_ok=True)
    shutil.copy(Path(plotly.__file__).parent/"package_data/plotly.min.js", out/"assets/plotly.min.js")
    quarto = shutil.which("quarto")
    command = ([quarto, "render", str(out), "--no-execute"] if quarto
               else [str(Path(sys.executable).parent/"smalldocs"), "render", str(out), "-q"])
    print(f"docs: rendering with {'Quarto' if quarto else 'smalldocs'}", flush=True)
    subprocess.run(command, check=True, cwd=root)
    shutil.rmtree(root/"_docs", ignore_errors=True)
    shutil.move(out/"_docs", root/"_docs")
    maths(root/"_docs")

def readme():
    "README.md's text from the index notebook."
    from nbconvert import MarkdownExporter
    import nbformat
    nb = nbformat.read(root/"nbs/index.ipynb", 4)
    hidden = re.compile(r"#\|\s*(hide|exporti?|default_exp)\b")
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and hidden.match(c.source))]
    for c in nb.cells:
        if c.cell_type == "code" and "#| echo: false" in c.source: c.source = ""
        if c.cell_type == "code": c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
        for o in c.get("outputs", []): # a table is nicer as text than as nbconvert's styled HTML
            if "text/html" in o.get("data", {}) and "text/plain" in o["data"]: del o["data"]["text/html"]
    nb.metadata["language_info"] = dict(name="python") # names the language of code blocks
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"```python\s*```", "", text) # a cell that shows its output only
    text = re.sub(r"\]\(((?:\w+/)?\w+\.ipynb|assets/)", r"](nbs/\1", text) # README stands one folder higher than the notebook
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

def build():
    "The site into _docs; what is wrong with it."
    out = process()
    for f in out.rglob("*.ipynb"): make_static(f, depth=len(f.relative_to(out).parts) - 1)
    configure(out)
    render(out)
    shutil.rmtree(root/"_proc", ignore_errors=True)
    return problems(root/"_docs")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail on broken links, outside resources and an old README.md")
    parser.add_argument("--readme", action="store_true", help="only README.md and the lists that index, start and gallery hold")
    given = parser.parse_args()
    os.chdir(root)
    found = [f"{o}; run make docs" for o in stale(write=not given.check) if given.check]
    text, file = readme(), root/"README.md"
    if file.read_text() != text:
        if given.check: found.append("README.md is older than nbs/index.ipynb; run make docs")
        else: file.write_text(text)
    if not given.readme and not found: found = build() # what is old is said at once, not after minutes of building
    if found: sys.exit("\n".join(found))
    if given.readme: return print("README.md and the lists of notebooks are as the notebooks are")
    n = len(list((root/"_docs").rglob("*.html")))
    print(f"docs: {n} pages in _docs, every internal link resolves, nothing is asked from outside; to search, serve them: python -m http.server -d _docs")

if __name__ == "__main__": main()
