"A run over members that read other tokens: what extends its base is merged with it, what does not is set aside with its reason."
import json

import pytest
from test_search_vocabulary import member

from model_glue_nb.gluing.dry_run import estimate_run
from model_glue_nb.gluing.pipeline import glue
from model_glue_nb.gluing.recipe import begin, read_recipe
from model_glue_nb.gluing.steps import Glued, tell_aside
from model_glue_nb.mergeability.clusters import Cluster
from model_glue_nb.searching.search import SearchResult
from model_glue_nb.zoo.zoo import open_model

MEMBERS = dict(base=(0, {}), plain=(1, {}),
               chat=(2, dict(added=["<im>", "</im>"])),
               odd=(3, dict(swapped=True)))

@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    "Four members of one base: one has two more tokens, one reads two words the other way round."
    room = tmp_path_factory.mktemp("vocabularies")
    for name, (seed, more) in MEMBERS.items(): member(room, name, seed, **more)
    def words(i): return " ".join(f"w{3 + (7 * i + k) % 60}" for k in range(5))
    for task, first in (("x", 0), ("y", 50)):
        rows = [json.dumps(dict(question=words(i + first), answer=f"w{3 + i}")) for i in range(24)]
        (room/f"{task}.jsonl").write_text("\n".join(rows) + "\n")
    tasks = [dict(name=t, file=f"{t}.jsonl", max_new_tokens=2) for t in "xy"]
    (room/"suite.yaml").write_text(json.dumps(dict(name="words", search_share=.5, tasks=tasks)))
    merge = dict(methods=["linear", "task_arithmetic"], strategy="stepwise", budget=5)
    return dict(zoo=[str(room/n) for n in MEMBERS],
                suite=str(room/"suite.yaml"), evidence=4,
                merge=merge, clusters=dict(threshold=.3))

def tokens_of(run, model): return set(open_model(run.path/"models"/model).tokenizer.tokens)

def merges_of(run, start):
    "Names of the merges that a run wrote."
    return [p.name for p in sorted((run.path/"models").glob(f"{start}*")) if p.is_dir()]

def test_a_tune_with_more_tokens_is_merged_and_a_stranger_set_aside(recipe, tmp_path):
    run = glue(recipe, tmp_path/"run")
    clusters = [sorted(c["members"]) for c in run.read_json("clusters")]
    assert sorted(clusters) == [["base", "chat", "plain"], ["odd"]]
    table = run.read_table("vocabulary").set_index("model")
    assert table.tokenizer[["base", "chat", "plain"]].eq("union").all()
    assert "'odd' uses different tokens than 'base'" in table.why["odd"] and table.why.notna().sum() == 1
    trials = run.read_table("trials")
    assert trials.candidate.str.contains("chat").any() and not trials.candidate.str.contains("odd").any()
    assert trials.failed.isna().all(), trials.failed
    full = merges_of(run, "all-")
    assert len(full) == 1, "the full merge is that of all three"
    said = run.read_json(f"models/{full[0]}.recipe")["recipe"]
    assert {s["model"] for s in said["models"]} == {"base", "plain", "chat"}
    assert {"<im>", "</im>"} <= tokens_of(run, full[0])
    search = run.read_table("search")
    assert {"winner", "best_single", "uniform"} <= set(search.system) and search.report.notna().all()
    comparison = run.read_table("comparison").set_index("system")
    assert {"full_merge", "full_mixture", "model_glue", "chosen"} <= set(comparison.index)
    assert comparison["mean"].notna().all()

def test_the_dry_run_says_it_all_before(recipe):
    plan = estimate_run(read_recipe(recipe)).groupby("step").what.agg(list)
    aside = {w.partition(": ")[0]: w for w in plan["set aside"]}
    assert set(aside) == {"odd"} and "uses different tokens than 'base'" in aside["odd"]
    assert plan["vocabulary"] == ["base: merges use tokenizer: union"]
    assert [w for w in plan["search"] if "3 members" in w] and len(plan["search"]) == 1
    assert plan["merge"] == ["1 full merge on search, that of 3 with tokenizer: union"]
    assert plan["budget"], "a budget of 5 does not reach λ with three members"

def test_a_wish_joins_the_stranger_too(recipe, tmp_path):
    run = glue(recipe | dict(merge=recipe["merge"] | dict(tokenizer="base")), tmp_path/"run")
    assert [sorted(c["members"]) for c in run.read_json("clusters")] == [["base", "chat", "odd", "plain"]]
    table = run.read_table("vocabulary")
    assert set(table.model) == set(MEMBERS) and set(table.tokenizer) == {"base"} and table.why.isna().all()
    trials = run.read_table("trials")
    assert trials.failed.isna().all() and trials.candidate.str.contains("odd").any()
    full = merges_of(run, "all-")
    assert len(full) == 1 and not {"<im>", "</im>"} & tokens_of(run, full[0])

def test_who_only_a_search_sets_aside_stands_in_the_table(recipe, tmp_path):
    work = begin(read_recipe(recipe), tmp_path/"run")
    found = SearchResult("base", .5, (), aside=dict(odd="it reads other tokens"))
    with work.run.lock():
        tell_aside(work, [Cluster("base", ("base", "odd"))], [Glued("base", searches=(found,))])
        tell_aside(work, [Cluster("base", ("base",))], [Glued("base")])
    told = work.run.read_table("vocabulary").to_dict("records")
    assert [(t["model"], t["merged_with"], t["why"]) for t in told] == [("odd", "base", "it reads other tokens")]
