"Objects show what they are, whatever they hold: never answers, never more than a screen."
import shutil
from pathlib import Path
import numpy as np
from model_glue_nb.benchmarking.intervals import ItemScores
from model_glue_nb.benchmarking.suites import Question, Suite, Task, load_suite
from model_glue_nb.core import Run
from model_glue_nb.gluing.recipe import read_recipe
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.searching.protocol import Answer
from model_glue_nb.searching.search import SearchResult
from model_glue_nb.shown import Shown
from model_glue_nb.zoo.zoo import Zoo, ZooModel, read_zoo

LONG = "組織/とても長い名前の言語モデル-" + "v" * 200

def looks(x):
    "Both forms, of a size that a person can read."
    assert isinstance(x, Shown)
    text, html = repr(x), x._repr_html_()
    assert len(text) < 300 and "\n" not in text and text.startswith(type(x).__name__) and len(html) < 20_000
    return text, html

def test_a_zoo_says_who_is_in_it_and_what_is_wrong(tmp_path):
    zoo = read_zoo("demo")
    text, html = looks(zoo)
    assert text.startswith("Zoo: 15 models: a-base, ") and "<td>c-expand</td><td>c-base</td>" in html and "LlamaForCausalLM" in html
    broken = tmp_path/"broken"
    shutil.copytree(zoo["a-sort"].path, broken)
    (broken/"config.json").write_text("{")
    many = Zoo((ZooModel("broken", broken), ZooModel("gone", tmp_path/"gone"), *(ZooModel(f"{LONG}{i}", zoo["b-swap"].path) for i in range(300))), dict(other="it is a GGUF file"))
    text, html = looks(many)
    assert "1 set aside" in text and '<th scope="col">problem</th>' in html and html.count("parameters") == 1 and "and 283 more" in html

def test_a_model_says_where_it_is_from():
    model = read_zoo("demo")["a-sort"]
    text, html = looks(model)
    assert text.startswith("ZooModel: a-sort, tuned from a-base, a checkpoint in ") and f"{model.n_params:,}" in html
    looks(ZooModel("<script>alert(1)</script>", model.path, LONG))
    assert "<script>" not in ZooModel("<script>alert(1)</script>", model.path)._repr_html_()

def test_a_suite_never_shows_questions_or_answers():
    secret = Task("t", tuple(Question(f"what is it {i}?", f"SECRET{i}") for i in range(5000)))
    for x in (Suite("s", (secret,)), secret, load_suite("demo")):
        text, html = looks(x)
        assert "SECRET" not in text + html and "what is it" not in text + html
    assert "5,000 questions" in looks(secret)[0] and "s, 1 tasks" in looks(Suite("s", (secret,)))[0]
    assert "<td>t</td><td>5000</td>" in Suite("s", (secret,))._repr_html_()

def test_recipes_and_specs_say_what_is_asked_for():
    assert "budget 1.5x" in looks(read_recipe(dict(budget="1.5x")))[0]
    assert "2 experts at level model behind tfidf_linear" in looks(MixtureSpec(("a", LONG)))[0]

def test_a_search_shows_its_best_candidates():
    own = {f"m{i}": Answer(ItemScores({"t": np.repeat([1., 0.], [i, 100 - i])})) for i in range(60)}
    text, html = looks(SearchResult("m59", .59, (), own))
    assert "59.0 on search questions after 0 trials" in text and "<td>m59</td><td>0.59</td>" in html and "m58" not in html # it beats all others

def test_a_run_shows_its_comparison(tmp_path):
    run = Run.start(tmp_path/"run", dict(zoo="demo"))
    assert "recipe.yaml" in looks(run)[0]
    recorded = (Path(__file__).parents[1]/"nbs/recorded/demo_comparison.csv").read_text()
    (run.path/"comparison.csv").write_text(recorded.partition("\n")[2]) # without the command that it was made by
    html = looks(run)[1]
    assert "<td>best_single</td><td>50.8</td><td>[49.5, 52.1]</td>" in html and "nan" not in html

def test_a_mixture_lists_its_experts(tmp_path):
    zoo = read_zoo("demo")
    live = mix(MixtureSpec(("a-sort", "b-swap"), dict(name="random")), zoo, tmp_path/"mixed").load()
    text, html = looks(live)
    assert text.startswith("MixtureLM: mixed, 2 experts behind random") and "<td>b-swap</td><td>565,248</td>" in html
