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
    if not CHROMIUM: pytest.fail("No Chromium was found. Install one (Debian: apt-get install chromium), or leave out this stage.")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()

@contextmanager
def watched(chromium, home, **context):
    "A page that must log no error and ask for nothing but `home`."
    page = chromium.new_context(viewport=dict(width=1400, height=1000), **context).new_page(); page.set_default_timeout(60_000)
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
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    own = {f"JUPYTER_{k}": str(tmp/k) for k in ("CONFIG_DIR", "RUNTIME_DIR", "DATA_DIR")}
    own |= {f"JUPYTERLAB_{k}": str(tmp/k) for k in ("WORKSPACES_DIR", "SETTINGS_DIR")}
    options = dict(ip="127.0.0.1", port=port) | {"ServerApp.port_retries": 0, "IdentityProvider.token": "a-token", "ServerApp.root_dir": folder,
        "LabApp.expose_app_in_browser": True, "LabApp.news_url": None, "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", *(f"--{k}={v}" for k, v in options.items())]
    home, log = f"http://127.0.0.1:{port}", open(tmp/"lab.log", "w")
    server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"{home}/api/status?token=a-token", timeout=2); break
            except OSError: time.sleep(.25)
        yield home
    finally:
        server.terminate()
        try: server.wait(60)
        except subprocess.TimeoutExpired: server.kill() # it may wait for kernels that a busy machine is slow to end
        log.close()

def with_sentinel(source, target):
    "Copy a notebook, empty of outputs, with a last cell that says that all cells ran."
    nb = json.loads(source.read_text()); slow = lambda c: "".join(c["source"]).startswith("#| slow")
    nb["cells"] = [c for c in nb["cells"] if not slow(c)]
    for c in nb["cells"]:
        if c["cell_type"] == "code": c.update(outputs=[], execution_count=None)
    nb["cells"].append(dict(cell_type="code", id="sentinel", metadata={}, source=DONE, outputs=[], execution_count=None))
    target.write_text(json.dumps(nb))

def small(target):
    "A notebook that explores an invented run."
    code = ["from tempfile import mkdtemp\nfrom model_glue_nb.dashboard import explore, invented_run\nrun = invented_run(mkdtemp())",
            "explore(run)", "from model_glue_nb.plots import plot_scores\nplot_scores(run.read_table('scores'))", DONE]
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(code)]
    kernel = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    target.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))

IDLE = """() => { const w = window.jupyterapp && window.jupyterapp.shell.currentWidget, s = w && w.sessionContext && w.sessionContext.session;
  return !!(s && s.kernel && s.kernel.status === 'idle') }"""

def run_all(page, home, name):
    "Open a notebook, run all its cells, wait for the last."
    page.goto(f"{home}/lab/tree/{name}?reset&token=a-token")
    page.wait_for_selector(".jp-NotebookPanel:visible .jp-Notebook .jp-CodeCell")
    page.wait_for_function(IDLE)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    done = page.locator(".jp-OutputArea-output", has_text="ALL-CELLS-DONE")
    try: done.wait_for(timeout=240_000)
    except Exception:
        errors = page.locator(".jp-OutputArea-output[data-mime-type*='error'], .jp-OutputArea-output:has-text('Traceback')")
        pytest.fail("not all cells ran: " + (errors.first.inner_text()[-800:] if errors.count() else "timed out"))

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("lab"); folder = tmp/"notebooks"; folder.mkdir()
    small(folder/"small.ipynb")
    shutil.copytree(root/"nbs"/"recorded", tmp/"recorded") # the walkthrough reads ../recorded
    with_sentinel(WALKTHROUGH, folder/"walkthrough.ipynb")
    with jupyterlab(folder, tmp) as home: yield home

def test_explorer_in_jupyterlab(chromium, lab):
    with watched(chromium, lab) as page:
        run_all(page, lab, "small.ipynb")
        page.locator(".jp-Notebook .js-plotly-plot .main-svg").first.wait_for()
        page.get_by_role("tab", name="similarity").click()
        words = page.locator(".widget-html-content:visible", has_text="clusters").first
        words.wait_for(); before = words.inner_text()
        handle = page.locator(".noUi-handle:visible").first; handle.focus()
        frames = lambda: page.evaluate("() => [...document.querySelectorAll('.js-plotly-plot .shapelayer path')].map(p => p.getAttribute('d')).join()")
        shapes = frames()
        for _ in range(60): handle.press("ArrowLeft")
        page.wait_for_function("t => ![...document.querySelectorAll('.widget-html-content')].some(e => e.innerText === t)", arg=before)
        assert before.startswith("4 clusters") and words.inner_text().startswith("3 clusters")
        page.wait_for_function("d => [...document.querySelectorAll('.js-plotly-plot .shapelayer path')].map(p => p.getAttribute('d')).join() !== d", arg=shapes)

def test_walkthrough_in_jupyterlab(chromium, lab):
    with watched(chromium, lab) as page:
        run_all(page, lab, "walkthrough.ipynb")
        assert page.locator(".jp-Notebook .js-plotly-plot .main-svg").count(), "no plot was drawn"

@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 400)])
def test_report(chromium, tmp_path, scheme, width):
    from model_glue_nb.dashboard import invented_run, write_report
    file = write_report(invented_run(tmp_path/"run")).absolute()
    with watched(chromium, file.as_uri(), color_scheme=scheme) as page:
        page.set_viewport_size(dict(width=width, height=900))
        page.goto(file.as_uri())
        page.wait_for_function("() => [...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
        assert page.locator(".plot").count() == 5
        assert "points" in page.locator("h1").inner_text()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, "wider than the screen"
