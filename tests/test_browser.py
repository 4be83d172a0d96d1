"A real JupyterLab and the report in a real Chromium: plots drawn, no console errors, nothing asked from outside."
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.browser
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
WALKTHROUGH = root/"nbs/tutorials/glue_a_small_zoo.ipynb"
DONE = "print('ALL-CELLS' + '-DONE')"

@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright
    if not CHROMIUM:
        pytest.fail("No Chromium was found. Install one (Debian: apt-get install chromium), or leave out this stage.")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()

@contextmanager
def watched(chromium, home, **context):
    "A page that must log no error and ask for nothing but `home`."
    page = chromium.new_context(viewport=dict(width=1400, height=1000), **context).new_page()
    page.set_default_timeout(60_000)
    errors, outside = [], []
    page.on("console", lambda m: errors.append(m.text[:300]) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)[:300]))
    ours = (home, "data:", "blob:", home.replace("http://", "ws://"))
    page.on("request", lambda r: None if r.url.startswith(ours) else outside.append(r.url[:200]))
    page.on("websocket", lambda w: None if w.url.startswith(ours) else outside.append(w.url[:200]))
    try:
        yield page
        assert not outside, f"asked from outside: {outside[:5]}"
        assert not errors, f"console errors: {errors[:5]}"
    finally: page.context.close()

@contextmanager
def jupyterlab(folder, tmp):
    "A JupyterLab of its own on 127.0.0.1."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {f"JUPYTER_{k}": str(tmp/k) for k in ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR")}
    own |= {f"JUPYTERLAB_{k}": str(tmp/k) for k in ("WORKSPACES_DIR", "SETTINGS_DIR")}
    options = dict(ip="127.0.0.1", port=port) | {"ServerApp.port_retries": 0, "IdentityProvider.token": "a-token", "ServerApp.root_dir": folder,
        "LabApp.expose_app_in_browser": True, "LabApp.news_url": None, "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", *(f"--{k}={v}" for k, v in options.items())]
    home, log = f"http://127.0.0.1:{port}", open(tmp/"lab.log", "w")
    server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{home}/api/status?token=a-token", timeout=2)
                break
            except OSError: time.sleep(.25)
        yield home
    finally:
        server.terminate()
        try: server.wait(60)
        except subprocess.TimeoutExpired: # it may wait for kernels that a busy machine is slow to end
            server.kill()
        log.close()

def with_sentinel(source, target):
    "Copy a notebook, empty of outputs, with a last cell that says that all cells ran."
    nb = json.loads(source.read_text())
    def slow(c): return "".join(c["source"]).startswith("#| slow")
    nb["cells"] = [c for c in nb["cells"] if not slow(c)]
    for c in nb["cells"]:
        if c["cell_type"] == "code": c.update(outputs=[], execution_count=None)
    nb["cells"].append(dict(cell_type="code", id="sentinel", metadata={}, source=DONE, outputs=[], execution_count=None))
    target.write_text(json.dumps(nb))

def small(target):
    "A notebook that explores an invented run, and asks a real mixture of two of the demo zoo's models."
    code = ["""from tempfile import mkdtemp
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.reporting.dashboard import explore, invented_run
from model_glue_nb.reporting.example_run import invented_tables
from model_glue_nb.zoo.zoo import read_zoo
zoo = read_zoo("demo"); part = load_suite("demo").only(["reverse", "swap"]).part("search", 16)
spec = MixtureSpec(("a-reverse", "b-swap"), dict(name="linear"), prompt_encoder="a-reverse")
mixed = mix(spec, zoo, mkdtemp() + "/mixed", part).load()
tables = invented_tables(); more = {k: tables[k] for k in "items routes coefficients".split()}""",
            "explore(invented_run(mkdtemp()), mixture=mixed, **more)", DONE]
    write_notebook(target, code)

def write_notebook(target, code):
    "A notebook of some cells."
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, source=s, outputs=[], execution_count=None)
             for i, s in enumerate(code)]
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    target.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))

IDLE = """n => { const open = window.jupyterapp ? [...window.jupyterapp.shell.widgets('main')].filter(w => w.sessionContext) : [];
  const kernels = open.map(w => w.sessionContext.session && w.sessionContext.session.kernel);
  return open.length >= n && kernels.every(k => k && k.status === 'idle') }""" # a server ends at once when no kernel is starting, else after a minute

def run_all(page, home, name):
    "Open a notebook, run all its cells, wait for the last."
    page.goto(f"{home}/lab/tree/{name}?reset&token=a-token")
    page.wait_for_selector(".jp-NotebookPanel:visible .jp-Notebook .jp-CodeCell")
    page.wait_for_function(IDLE, arg=1)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    done = page.locator(".jp-OutputArea-output", has_text="ALL-CELLS-DONE")
    try: done.wait_for(timeout=240_000)
    except Exception:
        errors = page.locator(".jp-OutputArea-output[data-mime-type*='error'], .jp-OutputArea-output:has-text('Traceback')")
        pytest.fail("not all cells ran: " + (errors.first.inner_text()[-800:] if errors.count() else "timed out"))

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("lab")
    folder = tmp/"notebooks"
    folder.mkdir()
    small(folder/"small.ipynb")
    shutil.copytree(root/"nbs"/"recorded", tmp/"recorded") # the walkthrough reads ../recorded
    with_sentinel(WALKTHROUGH, folder/"walkthrough.ipynb")
    with jupyterlab(folder, tmp) as home: yield home

SEEN = """() => [...document.querySelectorAll('.jp-Notebook .js-plotly-plot')].filter(p => p.offsetParent)
  .map(p => p.querySelector('.gtitle') ? p.querySelector('.gtitle').textContent : '').join(' | ')"""
TRACES = "() => [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.offsetParent).map(p => p.data.map(t => t.name)).flat().join()"
FRAMES = "() => [...document.querySelectorAll('.js-plotly-plot .shapelayer path')].map(p => p.getAttribute('d')).join()"

def until(page, script, said):
    "Wait until a script's answer holds some words."
    page.wait_for_function(f"w => ({script})().includes(w)", arg=said)

def test_explorers_in_jupyterlab(chromium, lab):
    with watched(chromium, lab) as page:
        run_all(page, lab, "small.ipynb")
        def button(name): return page.locator("button:visible", has_text=name).first.click()
        until(page, SEEN, "Who is good at what") # performance: choosing models changes the figure's data
        button("profiles")
        until(page, TRACES, "a-inc")
        page.locator("select[multiple]:visible").select_option(["b-rev", "c-inc"])
        until(page, TRACES, "the others,b-rev,c-inc")
        assert "a-inc" not in page.evaluate(TRACES)
        button("A against B")
        until(page, SEEN, "What one gets")
        page.locator("td:visible").first.wait_for()
        page.get_by_role("tab", name="clusters").click() # clusters: the keyboard moves the threshold
        words = page.locator(".widget-html-content:visible", has_text="where column-mean cosine").first
        words.wait_for()
        assert words.inner_text().startswith("4 clusters")
        page.wait_for_function(f"() => ({FRAMES})().length > 0")
        frames = page.evaluate(FRAMES)
        handle = page.locator(".noUi-handle:visible").first
        handle.focus()
        for _ in range(60): handle.press("ArrowLeft")
        page.wait_for_function("() => [...document.querySelectorAll('.widget-html-content')].some(e => e.innerText.startsWith('3 clusters'))")
        page.wait_for_function(f"d => ({FRAMES})() !== d", arg=frames)
        a, b = (page.locator(".widget-dropdown:visible").filter(has=page.get_by_text(k, exact=True)).locator("select") for k in "ab")
        b.select_option("a-hot")
        until(page, SEEN, "a-hot") # a pair is chosen from lists, or by a click on its cell
        cell = page.locator(".js-plotly-plot:visible .nsewdrag").first
        size = cell.bounding_box()
        cell.click(position=dict(x=size["width"] / 22, y=size["height"] * 1.5 / 11))
        until(page, SEEN, "differa-inc and a-base")
        assert [x.evaluate("s => s.options[s.selectedIndex].text") for x in (a, b)] == ["a-inc", "a-base"]
        page.get_by_role("tab", name="search").click()
        until(page, SEEN, "How the search went")
        for view, title in (("coefficients", "What the search tried"), ("importance", "What mattered"),
                            ("Pareto front", "What could be chosen"), ("attribution", "What each part contributes")):
            button(view)
            until(page, SEEN, title)
        page.get_by_role("tab", name="routing").click()
        until(page, SEEN, "Who answers what") # routing: a prompt is routed as it is typed
        box = page.get_by_placeholder("Type a prompt")
        state = page.locator(".widget-html-content:visible code")
        box.press_sequentially("swap QRST =")
        state.filter(has_text="swap QRST =").wait_for()
        until(page, SEEN, "b-swap answers")
        box.fill("turn SJHBC around =")
        until(page, SEEN, "a-reverse answers")
        page.get_by_role("tab", name="frontier").click() # frontier: arrow keys go from point to point, and the command follows
        until(page, SEEN, "What each size buys")
        command = page.locator(".widget-html-content:visible pre")
        command.filter(has_text="--budget 1.11x").wait_for()
        handle = page.locator(".noUi-handle:visible").first
        handle.focus()
        handle.press("ArrowRight")
        command.filter(has_text="--budget 2.11x").wait_for()
        button("tasks")
        until(page, SEEN, "What this size is good at")
        until(page, TRACES, "2.11 models,best single model")

def test_walkthrough_in_jupyterlab(chromium, lab):
    with watched(chromium, lab) as page:
        run_all(page, lab, "walkthrough.ipynb")
        assert page.locator(".jp-Notebook .js-plotly-plot .main-svg").count(), "no plot was drawn"

@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 400)])
def test_report(chromium, tmp_path, scheme, width):
    from model_glue_nb.reporting.dashboard import invented_run, write_report
    file = write_report(invented_run(tmp_path/"run")).absolute()
    with watched(chromium, file.as_uri(), color_scheme=scheme) as page:
        page.set_viewport_size(dict(width=width, height=900))
        page.goto(file.as_uri())
        page.wait_for_function("() => [...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
        assert page.locator(".plot").count() == 12
        assert "points" in page.locator("h1").inner_text()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, "wider than the screen"
