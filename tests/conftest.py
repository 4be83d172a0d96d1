"Slow, GPU and browser tests run only when they are asked for by name: pytest -m slow."
import os, sys
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("LOKY_MAX_CPU_COUNT", "1") # tests run side by side, each on one core
os.environ.setdefault("MODEL_GLUE_STORE", "none") # runs share no answers
LONGEST = """test_bench test_search test_benchmark test_pipeline test_sandbox test_mixture test_mixture_architectures test_search_ray
  test_frontier test_fuzz test_mixture_served test_mergekit test_mergekit_forms test_certificate test_mixture_uses test_repo test_merge
  test_decoding test_zoo_as_found test_differences test_per_sample""".split() # files that take longest start first, so that no core waits at the end
MARKS = dict(slow="minutes of computing", gpu="needs a CUDA device", browser="drives a real Chromium")

def pytest_configure(config):
    for mark, why in MARKS.items(): config.addinivalue_line("markers", f"{mark}: {why}")

def pytest_collection_modifyitems(config, items):
    asked = config.getoption("-m") or ""
    out = [i for i in items if any(i.get_closest_marker(m) and m not in asked for m in MARKS)]
    rank = {f"{name}.py": i for i, name in enumerate(LONGEST)}
    items[:] = sorted((i for i in items if i not in out),
                      key=lambda i: rank.get(i.path.name, len(rank)))
    if out: config.hook.pytest_deselected(items=out)

@pytest.fixture
def command(monkeypatch, capsys):
    "Runs `model-glue` in this process: exit code, standard output, standard error."
    from model_glue_nb.cli.program import main
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["model-glue", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end: main()
        return end.value.code or 0, *capsys.readouterr()
    return run

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub on this machine, and the client of the hub told to ask it, with an empty cache."
    from fake_hub import Hub
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session
    hub = Hub()
    cache = tmp_path/"hub-cache"
    known = dict(ENDPOINT=hub.url, HUGGINGFACE_CO_URL_TEMPLATE=hub.url + "/{repo_id}/resolve/{revision}/{filename}", HF_HUB_OFFLINE=False,
                 HF_HUB_CACHE=str(cache), HF_TOKEN_PATH=str(tmp_path/"no token"), HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True)
    for name, value in known.items(): monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield hub
    hub.close()
    close_session()
