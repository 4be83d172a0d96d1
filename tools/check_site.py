"Does every internal link of a rendered site resolve, and does no page ask for anything outside?"
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = dict(script="src", img="src", iframe="src", source="src", video="src", audio="src", embed="src", object="data")
OUTSIDE = re.compile(r"^(https?:)?//", re.I)

class Page(HTMLParser):
    "Ids, links and loaded resources of one page."
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.style = set(), [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.style = tag == "style"
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in LOADS and a.get(LOADS[tag]): self.loads.append(a[LOADS[tag]])
        if tag == "link" and a.get("href") and not set((a.get("rel") or "").split()) & {"canonical", "next", "prev"}:
            self.loads.append(a["href"])
        if a.get("style"): self.loads += re.findall(r"url\([\"']?([^)\"']+)", a["style"])

    def handle_data(self, data):
        if self.style: self.loads += css_loads(data)

    def handle_endtag(self, tag): self.style = False

def css_loads(text):
    return re.findall(r"@import\s+(?:url\()?[\"']?([^)\"';]+)", text) + re.findall(r"url\([\"']?([^)\"']+)", text)

def problems(
    site:Path, # The folder of a rendered site
)->list[str]: # One sentence per problem
    "Broken internal links and outside resources."
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    found = []
    if not pages: return [f"{site.name} holds no page"]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        found += [f"{name} asks for {u[:90]}" for u in page.loads if OUTSIDE.match(u)]
        for link in [*page.links, *(u for u in page.loads if not OUTSIDE.match(u))]:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//") or link in ("#", ""): continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target = target/"index.html"
            if not target.exists(): found.append(f"{name} links to {link}, which does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{name} links to {link}, a heading that does not exist")
    for css in site.rglob("*.css"):
        found += [f"{css.relative_to(site)} asks for {u[:90]}" for u in css_loads(css.read_text()) if OUTSIDE.match(u)]
    return list(dict.fromkeys(found))

if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "ok")
    sys.exit(bool(wrong))
