"Pictures for README and gallery, made from recorded tables and from the built site: python tools/pictures.py result|home"
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

if __name__ == "__main__":
    for name in sys.argv[1:] or ["result", "home"]: dict(result=result, home=home)[name]()
