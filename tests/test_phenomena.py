"The phenomena that the embedded zoo was engineered to show: on recorded figures always, recomputed from the shipped weights when slow tests run."
import sys
from pathlib import Path

import pandas as pd
import pytest

RECORDED = Path(__file__).parents[1]/"nbs"/"recorded"

def measure():
    "Phenomena (a)-(c) on the report split, from the shipped weights; (d) is in the comparison table of the demo run."
    from model_glue_nb.benchmarking.intervals import mean_interval, paired_gain
    from model_glue_nb.benchmarking.scores import ask_model
    from model_glue_nb.benchmarking.suites import load_suite
    from model_glue_nb.merging.recipes import recipe
    from model_glue_nb.searching.candidates import CandidateScorer
    from model_glue_nb.searching.search import search
    from model_glue_nb.zoo.zoo import read_zoo
    zoo, suite = read_zoo("demo"), load_suite("demo")
    family = [n for n in zoo.names if n.startswith("a-")]
    hot = [n for n in family if "hot" in n]
    calm = [n for n in family if n not in hot]
    told = CandidateScorer(zoo, suite.part("report"))
    def uniform(names): return recipe("linear", names, [1 / len(names)] * len(names))
    found = search(family, CandidateScorer(zoo, suite.part("search", 60)), "linear", "average")
    best = max(family, key=CandidateScorer(zoo, suite.part("search")))
    across, parents = told.items(uniform(["a-base", "b-base"])), [told.items(n) for n in ("a-base", "b-base")]
    parents_mean = mean_interval({t: (parents[0][t] + parents[1][t]) / 2 for t in across})
    rows = dict(across_clusters=mean_interval(across), parents=parents_mean,
                selective_gain=paired_gain(told.items(found.winner), told.items(best)),
                hot_in_uniform=paired_gain(told.items(uniform(family)), told.items(uniform(calm))))
    t = pd.DataFrame([dict(figure=k, mean=v.mean, low=v.low, high=v.high)
                      for k, v in rows.items()])
    return t.assign(members="+".join(s.model for s in found.winner.models))

def check(t):
    "What the zoo promises."
    f = t.set_index("figure")
    assert f.high["across_clusters"] < f.low["parents"] / 10, "a merge across clusters collapses to under a tenth of its parents"
    assert f.low["selective_gain"] > 0, "a selective merge beats the best single model of its family"
    assert "hot" not in t.members[0] and "+" in t.members[0], "the spoilt members are refused"
    assert f.high["hot_in_uniform"] < 0, "the spoilt members hurt the uniform merge"

def read(name): return pd.read_csv(RECORDED/f"{name}.csv", comment="#")

def test_recorded_phenomena(): check(read("demo_phenomena"))

def test_recorded_gain():
    t = read("demo_comparison").set_index("system")
    assert t.gain["model_glue"] >= 0.15 and t.gain_low["model_glue"] > 0.15
    gap = t["mean"]["oracle_task"] - t["mean"]["best_single"]
    assert t.gain["model_glue"] >= gap / 2, "at least half of the gap to the per-task oracle is closed"
    assert t.low["model_glue"] > t.high["full_merge"]
    report = [c for c in t.columns[t.columns.get_loc("ms_per_question") + 1:]]
    assert len(report) >= 7 and t.n["model_glue"] >= 500 * len(report)

def test_every_skill_is_mastered_by_some_specialist():
    t = read("demo_scores")
    t = t[t.split == "report"]
    assert (t.groupby("task").score.max() >= 0.9).all()

@pytest.mark.slow
def test_phenomena_from_the_weights():
    t = measure()
    check(t)
    assert (t.set_index("figure")["mean"] - read("demo_phenomena").set_index("figure")["mean"]).abs().max() < 0.01

if __name__ == "__main__":
    sys.stdout.write("# python tests/test_phenomena.py > nbs/recorded/demo_phenomena.csv\n" + measure().to_csv(index=False, float_format="%.6g"))
