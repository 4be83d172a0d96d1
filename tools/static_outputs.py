"Outputs that only Jupyter can show, as HTML that any renderer passes through: Plotly figures and widgets."
import json
from pathlib import Path

PLOTLY, VIEW = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"

def make_static(
    file:Path, # A processed notebook, changed in place
    depth:int, # Folders between it and the site's root, for the path of plotly.js
):
    "Replace figures and widgets by HTML, and drop the stored widget state."
    nb = json.loads(file.read_text())
    plots = False
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data") or {}
            if PLOTLY in data:
                data["text/html"] = figure(data.pop(PLOTLY))
                plots = True
            elif data.pop(VIEW, None):
                data["text/html"] = "<em>An interactive widget: open this notebook in JupyterLab.</em>"
    if plots: # one script per page, before the first figure
        at = next(i for i, c in enumerate(nb["cells"])
                  if any("plotly-static" in str(o.get("data")) for o in c.get("outputs", [])))
        out = next(o for o in nb["cells"][at]["outputs"] if "plotly-static" in str(o.get("data")))
        out["data"]["text/html"] = f'<script src="{"../" * depth}assets/plotly.min.js"></script>\n' + out["data"]["text/html"]
    file.write_text(json.dumps(nb, ensure_ascii=False, indent=1))

def figure(fig, count=[0]):
    "A figure that draws itself with the page's own plotly.js."
    count[0] += 1
    name = f"plotly-static-{count[0]}"
    data = json.dumps({k: fig[k] for k in ("data", "layout")}).replace("</", "<\\/")
    height = fig["layout"].get("height", 450)
    return (f'<div id="{name}" class="plotly-graph-div" style="height:{height}px"></div>'
            f'<script>(function(){{var f={data};f.layout.autosize=true;'
            f'Plotly.newPlot("{name}",f.data,f.layout,{{responsive:true,displaylogo:false}});}})();</script>')
