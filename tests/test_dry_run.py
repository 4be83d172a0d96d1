"Recipes are planned from names: without a network, without data of the tasks, and without any of their models."
import json, subprocess, sys
from pathlib import Path

import pytest
import yaml

from model_glue_nb.benchmarking.import_scores import published_scores
from model_glue_nb.benchmarking.sandbox import run_program
from model_glue_nb.benchmarking.suites import suites_path
from model_glue_nb.checkpoints.hub import hub_name
from model_glue_nb.checkpoints.recorded import recorded
from model_glue_nb.core import InputError
from model_glue_nb.gluing.recipe import mixture_spec, read_recipe

RECIPES = Path(__file__).parent.parent/"recipes"
PAPER = ["which2", "which4_chat", "which4_domain", "which12", "which16", "mistral"]
SIXTEEN = """Synthia-7B-v1.2 OpenHermes-7B Llama-2-7b-chat-hf vicuna-7b-v1.5 Llama-2-7b-evolcodealpaca pygmalion-2-7b BeingWell_llama2_7b
MetaMath-7B-V1.0 Platypus2-7B GOAT-7B-Community Llama-2-7b-WikiChat-fused dolphin-llama2-7b MetaMath-Llemma-7B CodeLlama-7b-Instruct-hf
Magicoder-S-CL-7B CrystalChat""".split()

def members(recipe):
    return [hub_name(n).repo.split("/")[1] for n in read_recipe(RECIPES/f"{recipe}.yaml").zoo]

def plan(recipe, out):
    "A dry run; the machine's caches are empty."
    env = dict(PATH="/usr/bin:/bin", HF_HUB_OFFLINE="1", HF_HOME=str(out/"hub"),
               XDG_CACHE_HOME=str(out/"cache"), MODEL_GLUE_STORE="none", PYTHONPATH=str(RECIPES.parent))
    done = subprocess.run([sys.executable, "-c", "from model_glue_nb.cli.program import main; main()", "run", recipe, "--out", out/"run", "--dry-run", "--json"],
                          capture_output=True, text=True, env=env)
    assert not (out/"run").exists()
    return done

@pytest.mark.parametrize("name", PAPER)
def test_every_recipe_of_the_paper_is_planned_from_records(name, tmp_path):
    done = plan(RECIPES/f"{name}.yaml", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    def of(step): return [r for r in rows if r["step"] == step]
    recipe = read_recipe(RECIPES/f"{name}.yaml")
    n, n_asked = len(recipe.zoo), 50 + 50 + 20 + 50 # a fifth of the 100 questions of mmlu_tiny
    assert of("score")[0]["questions"] == n * n_asked
    clusters = {"which16": 2}.get(name, 1) # of more than one member
    assert [r["questions"] for r in of("search")] == [recipe.merge["budget"] * n_asked] * clusters
    assert all(isinstance(r["minutes"], (int, float)) for r in rows) and of("score")[0]["minutes"] > 0
    said = " ".join(r["what"] for r in of("assume"))
    assert said.count("as recorded, not fetched") == n and "as its name says" not in said
    assert len(of("fetch")) == n and all(r["what"].endswith(" GB") for r in of("fetch"))
    assert {r["what"].split(":")[0] for r in of("skip")} == {"mbpp", "humaneval_js"}
    pickled = [m for m in map(recorded, recipe.zoo) if m.has_pickles_only]
    assert len(of("convert")) == len(pickled)

def test_what_would_be_fetched_is_counted_to_the_byte():
    zoo = read_recipe(RECIPES/"which12.yaml").zoo
    assert sum(recorded(n).n_bytes for n in zoo) == 12 * 2 * 6_738_415_616
    assert sum(recorded(n).n_bytes for n in read_recipe(RECIPES/"which16.yaml").zoo) / 1e9 == pytest.approx(255.4, abs=.05)

def test_the_zoos_are_the_authors():
    assert members("which16") == SIXTEEN
    assert set(members("which12")) == set(SIXTEEN[:12])
    assert members("which4_chat") == SIXTEEN[:4]
    assert set(members("which4_domain")) <= set(SIXTEEN[:12]) and set(members("which2")) < set(members("which4_chat"))
    published = {m.split("/")[1] for m in published_scores().index}
    assert published - set(SIXTEEN[:12]) == {"Llama-2-ko-7b-Chat"} and set(SIXTEEN[:12]) - published == {"GOAT-7B-Community"}

@pytest.mark.parametrize("name", ["which2", "which4_chat", "which4_domain"])
def test_prompts_belong_to_the_experts_that_are_named(name):
    r = read_recipe(RECIPES/f"{name}.yaml")
    experts = r.mixture["experts"]
    assert [hub_name(n).name for n in r.zoo] == experts
    spec = mixture_spec(r, experts, base=experts[0])
    assert (spec.dense_layers, spec.top_k) == (16, 1 if name == "which2" else 2)
    assert len(spec.router["positive"]) == len(spec.router["negative"]) == len(experts)
    code = experts.index({"which2": "vicuna-7b-v1.5@refs-pr-13", "which4_chat": "OpenHermes-7B", "which4_domain": "Llama-2-7b-evolcodealpaca@92a6a3b"}[name])
    assert "python" in spec.router["positive"][code] and "chat" in spec.router["negative"][code]

def test_a_run_mixes_whom_the_recipe_names(tmp_path):
    "The paper's kind of mixture on the embedded zoo: the merge below layer 1, two named members above, a router from prompts."
    from model_glue_nb.gluing.recipe import begin
    from model_glue_nb.gluing.steps import choose_experts, dense_model, find_clusters, glue_cluster, mixture_of
    prompts = dict(name="prompt", positive=[["sort bca ="], ["rev abc ="]], negative=[["rev abc ="], ["sort bca ="]])
    mixture = dict(level="ffn", experts=["a-sort", "a-reverse"], dense_layers=1, input="token", top_k=2, router=prompts)
    zoo = [str(suites_path().parent/"zoo"/n) for n in ("a-base", "a-reverse", "a-sort")]
    small = dict(zoo=zoo, tasks=["sort", "reverse"], search_questions=6, evidence=0, merge=dict(methods=["linear"], strategy="average", budget=3))
    work = begin(read_recipe(small | dict(mixture=mixture)), tmp_path/"run")
    merged = [glue_cluster(work, c).model for c in find_clusters(work)]
    experts = choose_experts(work, merged)
    name = mixture_of(work, experts, "model-glue", dense_model(work, merged))
    assert experts == ["a-sort", "a-reverse"]
    card = (work.zoo[name].path/"README.md").read_text()
    assert "2 experts at level `ffn`, 1 dense layers, top 2, token routing by `prompt`" in card and f"Dense model: {merged[0]}" in card
    with pytest.raises(InputError, match="no member of the zoo to mix 'b-skip'"):
        begin(read_recipe(small | dict(mixture=mixture | dict(experts=["a-sort", "b-skip"]))), tmp_path/"other")
    assert not (tmp_path/"other").exists()

def test_what_is_wrong_is_refused_all_the_same(tmp_path):
    given = yaml.safe_load((RECIPES/"which4_domain.yaml").read_text())
    for change, says in ((dict(tasks=["arc_chalenge"]), "Did you mean 'arc_challenge'?"),
                         (dict(zoo=given["zoo"][:3]), "There is no member of the zoo to mix 'MetaMath-7B-V1.0'")):
        (tmp_path/"r.yaml").write_text(yaml.safe_dump(given | change))
        done = plan(tmp_path/"r.yaml", tmp_path)
        assert done.returncode == 2 and says in done.stderr, done.stderr

DOC = dict(declaration="const add = (a, b) => {\n", test="console.assert(add(2, 3) === 5)\nconsole.assert(add('a', `<&'\"`) === `a<&'\"`)")

@pytest.mark.parametrize("answer, passes", [("  return a + b\n}\n", True), ("  return a - b\n}\n", False), ("  throw new Error(a)\n}", False), ("  return a +", False)])
def test_programs_in_javascript_are_judged_in_the_sandbox(answer, passes):
    "As humaneval_js judges them; skipped where there is no node."
    from shutil import which
    from lm_eval.utils import apply_template
    if not which("node", path="/usr/bin:/bin"): pytest.skip("node is not installed")
    suite = yaml.safe_load((suites_path()/"paper_proxies"/"suite.yaml").read_text())
    task = next(t for t in suite["tasks"] if t["name"] == "humaneval_js")
    code, tests = (apply_template(task[k], DOC | dict(answer=answer)) for k in ("code", "tests"))
    done = run_program(code, tests)
    assert done.passed is passes, done
