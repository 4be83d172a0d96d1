"Pictures for README and gallery, made from recorded tables and from the built site: python tools/pictures.py result|home|frontier"
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
assets = root/"nbs/assets"

def result():
    "The frontier of the demo run as SVG, drawn by the package's own plot."
    import pandas as pd
    from model_glue_nb.reporting.plots import plot_frontier
    frontier, comparison = (pd.read_csv(root/f"nbs/recorded/demo_{n}.csv", comment="#") for n in ("frontier", "comparison"))
    fig = plot_frontier(frontier, comparison, suite="demo").update_layout(width=860, height=420)
    fig.write_image(assets/"result.svg")

def home():
    "The site's first page in Chromium; build the site before."
    from browser import find
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=dict(width=1280, height=800))
        page.goto((root/"_docs/index.html").as_uri())
        page.wait_for_timeout(1000)
        page.screenshot(path=assets/"site-home.jpg", type="jpeg", quality=60)
        browser.close()

def frontier(budget="1.25x"):
    "The frontier explorer over the recorded demo run, in JupyterLab."
    import tempfile
    import yaml
    sys.path.insert(0, str(root/"tests"))
    from playwright.sync_api import sync_playwright
    from test_browser import CHROMIUM, DONE, FLAGS, jupyterlab, run_all, write_notebook
    with tempfile.TemporaryDirectory() as d:
        folder, run = Path(d), Path(d)/"runs/demo"
        run.mkdir(parents=True)
        (run/"recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load((root/"recipes/demo.yaml").read_text()) | dict(budget=budget)))
        for table in ("frontier", "comparison"):
            text = (root/f"nbs/recorded/demo_{table}.csv").read_text().splitlines(keepends=True)
            (run/f"{table}.csv").write_text("".join(x for x in text if not x.startswith("#")))
        code = ["from model_glue_nb.reporting.frontier_explorer import FrontierExplorer", "FrontierExplorer('runs/demo')", DONE]
        write_notebook(folder/"frontier.ipynb", code)
        with jupyterlab(folder, folder) as home, sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport=dict(width=1280, height=1100))
            page.set_default_timeout(240_000)
            run_all(page, home, "frontier.ipynb")
            page.wait_for_timeout(3000)
            page.add_style_tag(content=".Toastify { display: none }") # JupyterLab asks about its news
            page.locator(".jp-OutputArea-output:has(.js-plotly-plot)").screenshot(path=assets/"frontier_explorer.jpg", type="jpeg", quality=60)
            browser.close()

if __name__ == "__main__":
    for name in sys.argv[1:] or ["result", "home"]: dict(result=result, home=home, frontier=frontier)[name]()
