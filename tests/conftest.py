"Slow, GPU and browser tests run only when they are asked for by name: pytest -m slow."
import os
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1"); os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive"); os.environ.setdefault("MODEL_GLUE_STORE", "none") # runs share no answers
MARKS = dict(slow="minutes of computing", gpu="needs a CUDA device", browser="drives a real Chromium")

def pytest_configure(config):
    for mark, why in MARKS.items(): config.addinivalue_line("markers", f"{mark}: {why}")

LONGEST = "pipeline bench search_ray search sandbox mixture_architectures zoo_as_found mixture benchmark phenomena".split()

def pytest_collection_modifyitems(config, items):
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda i: place.get(i.path.name, len(place))) # files are handed to two workers: the longest must not be last
    asked = config.getoption("-m") or ""
    out = [i for i in items if any(i.get_closest_marker(m) and m not in asked for m in MARKS)]
    items[:] = [i for i in items if i not in out]
    if out: config.hook.pytest_deselected(items=out)
