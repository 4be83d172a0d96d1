"Intervals hold the truth as often as they say, near certainty too; a race spares the leader's equals. Exact sums where answers are right or wrong."
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, binomtest

from model_glue_nb.benchmarking.intervals import ItemScores, behind, chance_of_lead, mean_interval, mean_score, paired_gain, rank_models, spread_of
from model_glue_nb.core import InputError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"benchmarks"))
from intervals import PAIRS, runners, simulate

@lru_cache
def limits(n):
    "The interval after k of n right answers, for every k."
    made = [mean_interval(dict(t=np.arange(n) < k)) for k in range(n + 1)]
    return np.array([i.low for i in made]), np.array([i.high for i in made])

def covers(n, p):
    "Probability that the interval holds p: a sum over all that may happen."
    low, high = limits(n)
    return binom.pmf(np.arange(n + 1), n, p)[(low <= p) & (p <= high)].sum()

@pytest.mark.parametrize("n", [25, 60, 100, 250, 500])
def test_one_task_is_covered_exactly(n):
    for p in (.5, .6, .7, .8, .85, .9, .95, .97, .98, .99, .995):
        held = covers(n, p)
        assert held >= .93, (n, p, held)
        if n >= 100 and p <= .9: assert held <= .97, (n, p, held)

def test_no_interval_is_a_point():
    for n in (1, 2, 25, 500):
        for value in (0., 1., .5, 7., -3.):
            i = mean_interval(dict(t=np.full(n, value)))
            assert i.low < i.high and i.low <= value <= i.high
            same = dict(t=np.full(n, value))
            g = paired_gain(same, same)
            assert g.low < 0 < g.high
            ahead = paired_gain(dict(t=np.full(n, value)), dict(t=np.full(n, value - 1)))
            assert ahead.low < 1 <= ahead.high + 1e-12

DRAWS = 500 # two standard errors at 95 %: two points

@pytest.mark.parametrize("n_tasks", [2, 9])
@pytest.mark.parametrize("accuracy, n", [(.5, 100), (.9, 200), (.98, 60), (.995, 25)])
@pytest.mark.parametrize("how",
                         [dict(), dict(spread=True), dict(graded=True),
                          *(dict(gap=g, shared=s) for g, s in PAIRS[1:4])],
                         ids=str)
def test_coverage_by_simulation(n_tasks, accuracy, n, how):
    held = simulate(accuracy, n_tasks, n, DRAWS, seed=3, **how)
    assert held["coverage"] >= .925 and held["least"] > 0
    if n >= 100 and accuracy <= .9 and held["differ"] >= 15 or how == {} and n >= 100:
        assert held["coverage"] <= .985

def test_recorded_coverage_keeps_the_promise():
    t = pd.read_csv(ROOT/"nbs/recorded/interval_coverage.csv", comment="#")
    draws = 300
    assert ({*t.tasks} == {1, 3, 9}
            and {*t.questions} >= {25, 100, 500}
            and t.accuracy.max() == .995 and (t.least > 0).all())
    slack = 3 * (.05 * .95 / draws)**.5 # 644 settings: the lowest lies three standard errors of the simulation down
    assert t.coverage.min() >= .95 - slack and (t.coverage < .93).mean() <= .02
    told = t[(t.accuracy <= .9) & (t.questions >= 100) & ((t.kind == "single") | (t.differ >= 20))]
    assert (told.coverage > .97).mean() <= .05 and .945 < told.coverage.mean() < .957

def test_an_uncertain_task_counts_by_its_weight():
    "A task of three questions decides how sure the mean is; pooling all questions would hide it."
    rng = np.random.default_rng(0)
    many, few = (rng.random(400) < .9) * 1., np.array([1., 0., 1.])
    even, light = (mean_interval(ItemScores(dict(many=many, few=few))),
                   mean_interval(ItemScores(dict(many=many, few=few), dict(many=99, few=1))))
    assert even.high - even.low > .4 and light.high - light.low < .1
    gone = mean_interval(ItemScores(dict(many=many, few=few), dict(many=1, few=0)))
    alone = mean_interval(dict(many=many))
    assert (gone.low, gone.high) == (alone.low, alone.high)

def test_tasks_that_differ_are_no_noise():
    "Between tasks nothing was drawn: specialists' intervals are as narrow as their tasks allow."
    specialist = dict(a=np.r_[np.ones(95), np.zeros(5)],
                      b=np.r_[np.ones(5), np.zeros(95)])
    even = dict(a=np.tile([1., 0.], 50), b=np.tile([1., 0.], 50))
    def width(i): return i.high - i.low
    assert width(mean_interval(specialist)) < .5 * width(mean_interval(even))
    gain = paired_gain(specialist, dict(a=np.zeros(100), b=np.r_[np.ones(5), np.zeros(95)]))
    assert gain.mean == .475 and width(gain) < .07

def test_pairs_know_more_than_two_means():
    luck = np.random.default_rng(0).random(400)
    a, b = dict(t=(luck < .64) * 1.), dict(t=(luck < .6) * 1.)
    g = paired_gain(a, b)
    assert g.low > 0 and mean_interval(a).low < mean_interval(b).high
    turned = paired_gain(b, a)
    np.testing.assert_allclose([-turned.high, -turned.low], [g.low, g.high], atol=1e-7)

def test_scale_and_place_do_not_matter_for_scores_of_any_range():
    x = np.random.default_rng(0).normal(-3, 1, 80)
    i, j = mean_interval(dict(t=x)), mean_interval(dict(t=10 * x))
    np.testing.assert_allclose([i.low, i.high],
                               [x.mean() - 1.99 * x.std(ddof=1) / 80**.5,
                                x.mean() + 1.99 * x.std(ddof=1) / 80**.5],
                               atol=.03)
    np.testing.assert_allclose([j.low, j.high], [10 * i.low, 10 * i.high], atol=.3)

def test_one_question_per_task_leans_on_all_tasks():
    s = spread_of([np.array([v]) for v in (1., 0., 1., 1.)], np.full(4, .25))
    assert s.variance == pytest.approx(.25) and s.n == 4

def test_differences_are_known_to_their_formula():
    "The ends of Tango's interval lie Student's t standard errors from what was seen, each under its own likeliest shares."
    from scipy.optimize import minimize_scalar
    wins, losses, n = 30, 10, 400
    ours = dict(t=np.r_[np.ones(wins), np.zeros(losses), np.ones(n - wins - losses)])
    theirs = dict(t=np.r_[np.zeros(wins), np.ones(losses), np.ones(n - wins - losses)])
    g = paired_gain(ours, theirs)
    assert g.mean == pytest.approx(.05)
    for end, sign in ((g.low, 1), (g.high, -1)):
        def unlikely(lost): # minus the logarithm of the likelihood, where `end` is the true difference
            return -(wins * np.log(lost + end) + losses * np.log(lost)
                     + (n - wins - losses) * np.log(1 - 2 * lost - end))
        lost = minimize_scalar(unlikely, bounds=(1e-9, (1 - end) / 2 - 1e-9), method="bounded", options=dict(xatol=1e-9)).x
        error = np.sqrt(n * (2 * lost + end * (1 - end)))
        assert sign * (wins - losses - n * end) / error == pytest.approx(1.966, abs=.01)
    tenfold = paired_gain(dict(t=10 * ours["t"]), dict(t=10 * theirs["t"]))
    np.testing.assert_allclose([tenfold.low, tenfold.high], [10 * g.low, 10 * g.high], rtol=1e-3)

def test_three_questions_that_decide_leave_three_degrees_of_freedom():
    many, few = np.tile([1., 1., 1., 0.], 100), np.array([1., 0., 1.])
    assert spread_of([many, few], np.array([.5, .5])).t == pytest.approx(3.18, abs=.1)
    assert spread_of([many], np.ones(1)).t == pytest.approx(1.966, abs=.01)

def test_few_graded_differences_say_little():
    "Two of a hundred differ, as if three more had: the error is that of the mean, times the root of 1 + 3/2."
    d = np.r_[.5, .25, np.zeros(98)]
    g, s = paired_gain(dict(t=d), dict(t=0 * d)), spread_of([d], np.ones(1))
    assert (g.high - g.low) / 2 == pytest.approx(s.t * np.sqrt(s.variance / 100 * 2.5), rel=.02)

def test_bad_answers_are_refused():
    for items, says in (({}, "no answers"), (dict(t=[]), "'t' has no questions"),
                        (dict(t=[1., np.inf]), "not a number")):
        with pytest.raises(InputError, match=says): mean_interval({t: np.array(v) for t, v in items.items()})
    with pytest.raises(InputError, match="answered different questions"):
        paired_gain(dict(t=np.ones(2)), dict(u=np.ones(2)))

def test_ranks_of_equals_are_ties():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(40):
        held += rank_models({m: {t: (rng.random(30) < .8) * 1. for t in "xyz"} for m in "ab"}).tied.all()
    assert held >= 35

# racing

def test_the_chance_of_a_lead_is_the_binomial_one():
    for wins, losses in ((5, 0), (9, 3), (30, 18)):
        d = np.r_[np.ones(wins), -np.ones(losses), np.zeros(7)]
        at = np.random.default_rng(0).permutation(len(d)) % 4
        leader = {f"t{i}": d[at == i] for i in range(4)}
        n = {t: len(v) for t, v in leader.items()}
        if len({*n.values()}) == 1:
            got = chance_of_lead({t: np.zeros(k) for t, k in n.items()}, leader)
        else: # every question counts the same
            got = chance_of_lead(ItemScores({t: np.zeros(k) for t, k in n.items()}), ItemScores(leader, n))
        assert got == pytest.approx(binomtest(wins, wins + losses, alternative="greater").pvalue, rel=1e-9)

def test_leads_of_unlike_questions_are_drawn():
    "Tasks of two sizes: every question of the small one counts three times as much, counted out over all signs."
    from itertools import product
    leader = dict(large=np.array([1., 1., -1., 0., 1., 0.]), small=np.array([1., 0.]))
    steps = np.array([1., 1., -1., 1., 3.])
    exact = np.mean([np.dot(s, np.abs(steps)) >= steps.sum()
                     for s in product((-1, 1), repeat=5)])
    got = chance_of_lead({t: 0 * v for t, v in leader.items()}, leader)
    assert got == pytest.approx(exact, abs=.01)
    assert chance_of_lead(leader, {t: 0 * v for t, v in leader.items()}) == 1, "who does not lead"

@pytest.mark.parametrize("n_runners", [2, 12])
@pytest.mark.parametrize("per_task, n_tasks", [(1, 9), (8, 3), (60, 2)])
def test_equals_of_the_leader_are_spared(n_runners, per_task, n_tasks):
    rng, dropped, n = np.random.default_rng(5), 0, 2400 // n_runners // (1 + per_task // 20)
    for _ in range(n):
        field = runners(rng, [per_task] * n_runners, n_tasks, .7, .5)
        lead = max(range(n_runners), key=lambda i: mean_score(field[i]))
        dropped += np.mean([behind(x, field[lead], n_runners) for i, x in enumerate(field) if i != lead])
    assert dropped / n <= .05 + 2 * (.05 * .95 / n)**.5

def test_the_better_runner_stays_and_a_bad_one_goes():
    rng = np.random.default_rng(6)
    stayed = gone = 0
    for _ in range(40):
        field = runners(rng, [20] * 8, 3, .7, .5, edge=.25)
        lead = max(range(8), key=lambda i: mean_score(field[i]))
        stayed += not behind(field[-1], field[lead], 8)
        gone += behind(field[0], field[lead], 8)
    assert stayed == 40 and gone >= 36

def test_the_larger_the_field_the_more_must_be_shown():
    ours, leader = dict(t=np.zeros(9)), dict(t=np.r_[np.ones(7), np.zeros(2)]) # 1 in 128
    assert [behind(ours, leader, k) for k in (2, 6, 7, 64)] == [True, True, False, False]

def test_recorded_races_keep_five_percent():
    t = pd.read_csv(ROOT/"nbs/recorded/racing_false_drops.csv", comment="#")
    assert ({*t.per_task} == {1, 2, 8, 20, 60}
            and t.dropped.max() <= .05 + .03
            and t.dropped.mean() < .03 and t.survives.min() > .97)
    one = t[t.per_task == 1]
    assert one.old.mean() > .3 and one.dropped.max() <= .05
