"The docs site and JupyterLab's first page in a real Chromium: every page opens, nothing is asked from outside, all is readable."
import functools, http.server, shutil, threading
from pathlib import Path
import pytest
from test_browser import IDLE, chromium, jupyterlab, watched  # noqa: F401

root = Path(__file__).resolve().parents[1]
site = root/"_docs"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not site.exists(), reason="no site in _docs; make docs builds it")]
DRAWN = "() => [...document.querySelectorAll('.plotly-graph-div')].every(p => p.querySelector('.main-svg'))"
FAINT = """() => { // texts whose contrast to the colour behind them is under 4.5 to 1, as WCAG 2 reckons
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return {rgb: m.slice(0, 3), a: m.length > 3 ? m[3] : 1} }
  const mix = (top, a, under) => top.map((v, i) => a * v + (1 - a) * under[i])
  const light = rgb => { const [r, g, b] = rgb.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
  const known = f => { const seen = new Map(); return e => { if (!seen.has(e)) seen.set(e, f(e)); return seen.get(e) } } // once per element
  const style = known(e => getComputedStyle(e))
  const behind = known(e => { const c = parse(style(e).backgroundColor); return mix(c.rgb, c.a, e.parentElement ? behind(e.parentElement) : [255, 255, 255]) })
  const faded = known(e => +style(e).opacity * (e.parentElement ? faded(e.parentElement) : 1))
  const found = new Set()
  for (const e of document.querySelectorAll('main *, nav *, header *')) {
    if (e.closest('svg, .plotly-graph-div, math, button') || !e.checkVisibility() || !e.getClientRects().length) continue
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue
    const bg = behind(e), ink = parse(style(e).color), a = light(mix(ink.rgb, ink.a * faded(e), bg)), b = light(bg)
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
    if (ratio < 4.5 && faded(e) > .1) found.add(`${e.tagName}.${e.className} '${e.textContent.trim().slice(0, 30)}' ${ratio.toFixed(1)}`)
  }
  return [...found].slice(0, 8) }"""

@pytest.fixture(scope="module")
def home():
    "The site on 127.0.0.1: search reads a file, which browsers allow over HTTP only."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def end_headers(self): # what pages share is fetched and compiled once
            self.send_header("Cache-Control", "max-age=3600")
            super().end_headers()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()

SWITCHED = """dark => (!!document.querySelector('html.quarto-dark, body.quarto-dark') === dark || !document.querySelector('.quarto-color-scheme'))
  && [...document.querySelectorAll('link[rel=stylesheet]')].every(l => l.media === 'not all' || l.sheet)
  && !document.getAnimations().some(a => a.playState === 'running')""" # colours that fade are awaited

@pytest.mark.parametrize("first", ["light", "dark"])
def test_every_page(chromium, home, first): # noqa: F811
    "Each page is opened once, half of them in each scheme and at each width, and measured in both schemes at both."
    pages = sorted(str(p.relative_to(site)) for p in site.rglob("*.html"))
    wrong = []
    assert {"index.html", "start.html", "gallery.html", "faq.html", "how_it_compares.html", "changelog.html", "06_merging/merge.html"} <= set(pages)
    second = dict(light="dark", dark="light")[first]
    with watched(chromium, home, color_scheme=first, reduced_motion="reduce") as page: # as colours end, without the way there
        def dress(scheme):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(SWITCHED, arg=scheme == "dark")
        def measure(name, scheme, width):
            if width == 1280: wrong.extend(f"{name}, {scheme}: {f}" for f in page.evaluate(FAINT))
            elif (wide := page.evaluate("() => document.documentElement.scrollWidth")) > 400:
                wrong.append(f"{name}, {scheme}, is {wide} wide at 400")
        for i, name in enumerate(pages[first == "dark"::2]):
            widths = (400, 1280) if i % 2 else (1280, 400) # it opens at the width at which the last one ended
            page.set_viewport_size(dict(width=widths[0], height=900))
            page.goto(f"{home}/{name}")
            page.wait_for_function(DRAWN)
            measure(name, first, widths[0])
            dress(second)
            measure(name, second, widths[0])
            page.set_viewport_size(dict(width=widths[1], height=900))
            measure(name, second, widths[1])
            dress(first)
            measure(name, first, widths[1])
    assert not wrong, "\n".join(wrong)

def test_gallery_is_live(chromium, home): # noqa: F811
    with watched(chromium, home) as page:
        page.goto(f"{home}/gallery.html")
        page.wait_for_function(DRAWN)
        assert page.locator(".plotly-graph-div").count() >= 7
        bar = page.locator(".plotly-graph-div").first.locator(".bars .point path").first
        bar.hover(force=True)
        page.locator(".hoverlayer .hovertext").first.wait_for()

@pytest.mark.parametrize("width", [1280, 400])
def test_search_finds_merge(chromium, home, width): # noqa: F811
    with watched(chromium, home) as page:
        page.set_viewport_size(dict(width=width, height=900))
        page.goto(f"{home}/index.html")
        if width < 992: page.locator(".navbar-toggler").click()
        page.get_by_role("searchbox").first.fill("merge")
        page.locator(".search-result").first.wait_for()
        links = page.locator(".search-result").evaluate_all("a => a.map(x => x.getAttribute('href'))")
        assert any("merge.html" in h for h in links), links
        page.locator(".search-result").first.click()
        page.wait_for_load_state()
        assert "merge" in page.locator("main").inner_text().lower()

def test_dark_is_kept(chromium, home): # noqa: F811
    "The switch turns the page dark, and the next page stays so."
    ground = "() => getComputedStyle(document.body).backgroundColor"
    with watched(chromium, home, color_scheme="light") as page:
        page.goto(f"{home}/index.html")
        light = page.evaluate(ground)
        page.locator(".quarto-color-scheme-toggle").first.click()
        page.wait_for_function(f"c => ({ground})() !== c", arg=light)
        dark = page.evaluate(ground)
        page.goto(f"{home}/start.html")
        page.wait_for_function(f"c => ({ground})() === c", arg=dark)

def test_start_page_in_jupyterlab(chromium, tmp_path): # noqa: F811
    "The page that `make lab` opens lists every walkthrough, and its links open them inside Lab."
    shutil.copytree(root/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns("_quarto.yml", ".ipynb_checkpoints"))
    with jupyterlab(tmp_path, tmp_path) as lab, watched(chromium, lab) as page:
        page.goto(f"{lab}/lab/tree/nbs/start.ipynb?reset&token=a-token")
        page.wait_for_selector(".jp-NotebookPanel:visible .jp-RenderedMarkdown a[href*='glue_a_small_zoo']")
        shown = page.locator(".jp-RenderedMarkdown a").evaluate_all("a => a.map(x => x.getAttribute('href')).join(' ')")
        assert not [f.name for f in (root/"nbs/tutorials").glob("*.ipynb") if f.name not in shown]
        page.locator(".jp-NotebookPanel:visible a", has_text="Glue a small zoo").first.click()
        page.locator(".lm-TabBar-tabLabel", has_text="glue_a_small_zoo.ipynb").wait_for()
        page.wait_for_function(IDLE, arg=2)
