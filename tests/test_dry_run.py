"A recipe is planned from names: without a network, without data of the tasks, and without any of its models."
import json, subprocess, sys
from pathlib import Path

import pytest
import yaml

RECIPE = Path(__file__).parent.parent/"recipes"/"paper.yaml"

def plan(recipe, out):
    "Rows of a dry run; the machine's caches are empty."
    env = dict(PATH="/usr/bin:/bin", HF_HUB_OFFLINE="1", HF_HOME=str(out/"hub"),
               XDG_CACHE_HOME=str(out/"cache"), MODEL_GLUE_STORE="none", PYTHONPATH=str(RECIPE.parent.parent))
    done = subprocess.run([sys.executable, "-c", "from model_glue_nb.cli.program import main; main()", "run", recipe, "--out", out/"run", "--dry-run", "--json"],
                          capture_output=True, text=True, env=env)
    assert not (out/"run").exists()
    return done

def test_the_papers_zoo_is_planned_from_names(tmp_path):
    done = plan(RECIPE, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    def of(step): return [r for r in rows if r["step"] == step]
    assert of("score")[0]["questions"] == 12 * 4 * 50
    assert of("search")[0]["questions"] == 2 * 24 * 4 * 50, "two methods, 24 evaluations each"
    sizes = 1172, 1267, 14042, 1319
    assert of("report")[0]["questions"] == pytest.approx(12 * .8 * sum(sizes), rel=.001)
    assert all(isinstance(r["minutes"], (int, float)) for r in rows) and of("score")[0]["minutes"] > 0
    said = " ".join(r["what"] for r in of("assume"))
    assert said.count("7e+09 parameters") == 12 and all(t in said for t in ("arc_challenge", "winogrande", "mmlu", "gsm8k"))
    assert len(of("fetch")) == 12 and {r["what"].split(":")[0] for r in of("skip")} == {"mbpp", "humaneval"}

def test_what_is_wrong_is_refused_all_the_same(tmp_path):
    given = yaml.safe_load(RECIPE.read_text())
    (tmp_path/"r.yaml").write_text(yaml.safe_dump(given | dict(tasks=["arc_chalenge"])))
    done = plan(tmp_path/"r.yaml", tmp_path)
    assert done.returncode == 2 and "Did you mean 'arc_challenge'?" in done.stderr
