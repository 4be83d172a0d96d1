"In the comparison a mixture's answers are its experts' answers; where they are not, the run says so and stops."
import json

import pytest
import yaml
from forked import command

from model_glue_nb.benchmarking.scores import asked_through
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError
from model_glue_nb.gluing.comparison import check_agreement
from model_glue_nb.gluing.pipeline import glue
from model_glue_nb.gluing.recipe import begin, read_recipe
from model_glue_nb.zoo.zoo import demo_zoo_path, open_model

def recipe_of(room, names, mixture):
    "Two experts, and a report of few questions."
    rows = {t.name: [json.dumps(dict(question=q.prompt, answer=q.answer)) for q in t.questions[:90]]
            for t in load_suite("demo").only(["sort", "reverse"]).tasks}
    for name, lines in rows.items(): (room/f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tasks = [dict(name=n, file=f"{n}.jsonl", max_new_tokens=8, stop=["\n"]) for n in rows]
    (room/"suite.yaml").write_text(json.dumps(dict(name="few", search_share=.4, tasks=tasks)))
    return dict(zoo=[str(demo_zoo_path()/n) for n in names], suite=str(room/"suite.yaml"), evidence=0, mixture=mixture,
                clusters=dict(threshold=1), merge=dict(methods=["linear"], strategy="average", budget=1))

@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    "A finished run whose experts are models of their own, and its recipe."
    room = tmp_path_factory.mktemp("apart")
    recipe = recipe_of(room, ["a-sort", "b-swap"], dict(router="knn"))
    return glue(recipe, room/"run"), recipe

def asked_otherwise(run, recipe, name, n, word="!"):
    "Add a word to what lm-eval heard of a mixture, as if it had been asked with other settings."
    task = begin(read_recipe(recipe), run.path).report.tasks[0]
    key = open_model(run.path/"models"/name).fingerprint()
    known = run.store.items(key, task.asked) | run.store.items(key, asked_through(task))
    said = {q.key: known[q.key] for q in task.questions} # all: a task that is open is asked once more
    run.store.add_items(key, asked_through(task),
                        said | {q.key: (v, a + word) for q in task.questions[:n] for v, a in [said[q.key]]})
    return lambda: run.store.add_items(key, asked_through(task), said)

def test_a_wrong_answer_stops_the_run(apart, tmp_path):
    run, recipe = apart
    before = run.read_table("comparison")
    undo = asked_otherwise(run, recipe, "full-mixture", 5)
    with pytest.raises(InputError, match="answers 5 of .* questions of 'sort' differently from the expert it sends them to"):
        glue(recipe, run.path)
    (tmp_path/"r.yaml").write_text(yaml.safe_dump(recipe))
    done = command("run", tmp_path/"r.yaml", "--out", run.path)
    assert done.returncode == 2 and "Its scores would be wrong" in done.stderr and "Traceback" not in done.stderr
    undo()
    assert glue(recipe, run.path).read_table("comparison").equals(before)

def test_one_answer_may_be_rounded_otherwise(apart):
    run, recipe = apart
    undo = asked_otherwise(run, recipe, "full-mixture", 1)
    glue(recipe, run.path)
    undo()

def test_a_wrong_value_of_the_same_answer_counts(apart):
    run, recipe = apart
    work = begin(read_recipe(recipe), run.path)
    task = work.report.tasks[0]
    mixture = open_model(run.path/"models"/"full-mixture")
    key = mixture.fingerprint()
    said = run.store.items(key, task.asked)
    few = {q.key: said[q.key] for q in task.questions[:3]}
    run.store.add_items(key, asked_through(task), {k: (1 - v, a) for k, (v, a) in few.items()})
    with pytest.raises(InputError, match="scored"): check_agreement(work, mixture)
    run.store.add_items(key, asked_through(task), few)
    assert check_agreement(work, mixture).differ.sum() == 0

def test_whole_experts_in_one_checkpoint_are_compared_too(tmp_path):
    recipe = recipe_of(tmp_path, ["a-sort", "a-reverse"], dict(level="model", router="knn", base="a-sort"))
    run = glue(recipe, tmp_path/"run")
    work = begin(read_recipe(recipe), run.path)
    mixture = open_model(run.path/"models"/"full-mixture")
    table = check_agreement(work, mixture)
    assert table.compared.sum() == work.report.n_questions and table.differ.sum() == 0
    assert (table.groupby("expert").routed.sum() > 0).all()
    asked_otherwise(run, recipe, "full-mixture", 4)
    with pytest.raises(InputError, match="differently from the expert"): glue(recipe, run.path)
