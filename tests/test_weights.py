"""Tasks of unlike weight and size: means, gains, oracles, ranks and choices, by hand."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from model_glue_nb.benchmarking.intervals import ItemScores, mean_interval, mean_score, oracle_question, oracle_task, paired_gain, rank_models, task_weights
from model_glue_nb.gluing import comparison
from model_glue_nb.mixing.learners import question_weights
from model_glue_nb.mixing.selection import best_set, by_question, split_by_task, climb, held_out_scores, lab_row, load_facts
from model_glue_nb.mixing.selection import neighbours, select_experts

SHARES = dict(x=3., y=1.)

def items(x, y, shares=SHARES):
    return ItemScores(dict(x=np.array(x, float), y=np.array(y, float)), shares)

A, B = (items([1, 1, 0, 0, 1], [0, 0, 1]),
        items([0, 1, 0, 0, 1], [1, 1, 0]))

def test_means_are_over_tasks_and_weighted():
    assert task_weights(A).tolist() == [.75, .25] and mean_score(A) == pytest.approx(.75 * .6 + .25 / 3)
    assert mean_score(ItemScores(dict(A), {})) == pytest.approx((.6 + 1 / 3) / 2)
    assert task_weights(items([1], [1], dict(x=0., y=0.))).tolist() == [.5, .5]
    assert mean_interval(A).mean == pytest.approx(mean_score(A))

def test_gains_are_ours_less_theirs_by_the_weights():
    gain = .75 * .2 - .25 / 3
    for ours, theirs in ((A, B), (A, ItemScores(dict(B))), (ItemScores(dict(A)), B)):
        assert paired_gain(ours, theirs).mean == pytest.approx(gain)
    assert paired_gain(B, A).mean == pytest.approx(-gain)
    low, high = (items([0, 1] * 30, [0] * 30),
                 items([0, 1] * 30, [1, 0, 1] * 10))
    told = paired_gain(high, low)
    assert 0 < told.low < told.mean < told.high < .25

def test_oracles_keep_the_weights():
    both = dict(a=A, b=B)
    best = oracle_task(both)
    assert (best.weights == SHARES and best["x"].tolist() == A["x"].tolist()
            and best["y"].tolist() == B["y"].tolist())
    each = oracle_question(both)
    assert (each.weights == SHARES
            and each["x"].tolist() == [1, 1, 0, 0, 1]
            and each["y"].tolist() == [1, 1, 1])
    graded = dict(a=items([.9, .1], [.5]), b=items([.6, .6], [.5]))
    assert oracle_task(graded)["x"].tolist() == [.6, .6], "the best on a task is the best on average"

def test_ranks_come_best_first():
    r = np.random.default_rng(0)
    def made(p): return items(r.random(200) < p, r.random(50) < p)
    t = rank_models(dict(low=made(.2), high=made(.9), middle=made(.55)))
    assert t.model.tolist() == ["high", "middle", "low"] and t.best_rank.tolist() == t.worst_rank.tolist() == [1, 2, 3]
    assert t.tied.tolist() == [True, False, False]

def test_questions_and_tasks_are_two_views():
    values, task = by_question(dict(a=A, b=B), ["b", "a"])
    assert (values.shape == (8, 2)
            and values[0].tolist() == [0, 1]
            and task.tolist() == [0] * 5 + [1] * 3)
    again = split_by_task(values[:, 1], A)
    assert again.weights == SHARES and all((again[t] == A[t]).all() for t in A)

VALUE = {(0,): .5, (1,): .4,
         (2,): .3, (0, 1): .505, (0, 2): .502,
         (1, 2): .45, (0, 1, 2): .508}

def value_of(S):
    "What a set of three candidates scores, in whatever order it is named."
    return VALUE[tuple(sorted(S))]

def always(S): return True

@pytest.mark.parametrize("min_gain, taken", [(.01, [(0, .5)]), (.004, [(0, .5), (1, .505)]),
                                             (.001, [(0, .5), (1, .505), (2, .508)])])
def test_a_small_addition_is_left_out(min_gain, taken):
    assert best_set(value_of, always, 3, min_gain) == taken
    expected = tuple(i for i, _ in taken)
    for start in VALUE: assert climb(value_of, always, 3, min_gain, start) == expected

def test_a_gain_that_is_just_what_an_expert_must_bring_is_not_enough():
    def score(S): return .5 + len(S) / 64 # in halves, so that sums are exact
    assert len(best_set(score, always, 2, 1 / 64)) == 1
    assert len(best_set(score, always, 2, 1 / 128)) == 2

def test_a_set_changes_by_one_move():
    assert sorted(neighbours((0, 2), 4)) == [(0,),
                                             (0, 1), (0, 1, 2), (0, 2, 3),
                                             (0, 3), (1, 2), (2,), (2, 3)]
    assert (neighbours((1,), 2), neighbours((0,), 1)) == ([(0, 1), (0,)], [])

def test_three_that_are_good_only_together_are_found():
    def score(S): return .9 if set(S) == {1, 2, 3} else .5 * (0 in S)
    assert {i for i, _ in best_set(score, always, 4, .01)} == {1, 2, 3}, "from all candidates downwards"
    def few(S): return len(S) < 3
    assert best_set(score, few, 4, .01) == [(0, .5)], "where all together do not fit, the best alone is the start"

@pytest.fixture
def skills():
    "Three experts, each good where one feature is large; a fourth that is good at nothing."
    r = np.random.default_rng(5)
    vectors = r.normal(size=(240, 3))
    kind = vectors.argmax(1)
    values = np.stack([(kind == k) * .9 + .05 for k in range(3)] + [np.full(240, .3)], 1)
    def cut(v): return items(v[:180], v[180:])
    return np.float32(vectors), {n: cut(values[:, i]) for i, n in enumerate("abcd")}, kind

def test_experts_are_chosen_by_what_routing_makes_of_them(skills):
    vectors, by, _ = skills
    t = select_experts(by, vectors, dict(a=10, b=20, c=30, d=1), dict(name="knn", k=5))
    assert set(t.expert) == {"a", "b", "c"} and t.score.is_monotonic_increasing and t.score.iloc[-1] > .7
    assert (t.gain.iloc[0] == t.score.iloc[0]
            and t.gain.iloc[1] == pytest.approx(t.score.iloc[1] - t.score.iloc[0]))
    small = select_experts(by, vectors,
                           dict(a=10, b=20, c=30, d=1),
                           dict(name="knn", k=5), max_params=31)
    assert small.params.sum() <= 31 and set(small.expert) == {"a", "b", "d"}
    twins = {n: by["a"] for n in "abcd"}
    assert select_experts(twins, vectors, dict(a=10, b=20, c=3, d=10)).expert.tolist() == ["c"], "of equals the smaller"

def test_nobody_is_judged_by_what_was_learned():
    r = np.random.default_rng(0)
    vectors, values = np.float32(r.normal(size=(60, 8))), np.float32(r.random((60, 2)) < .5)
    task = np.repeat([0, 1], 30)
    guess = held_out_scores(dict(name="knn", k=1), vectors, values, task)
    assert (guess.round() == values).mean() < .8, "learned by heart"

def test_lessons_are_pooled_within_tasks_and_what_is_held_out_lends_nothing():
    rng = np.random.default_rng(0)
    vectors, task = rng.normal(size=(12, 3)), np.repeat([0, 1, 2], 4)
    values = rng.random((12, 2))
    guess = held_out_scores(dict(name="knn", k=1), vectors, values, task, folds=2, seed=3)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for learn, ask in StratifiedKFold(2, shuffle=True, random_state=3).split(vectors, task):
        for q in ask:
            near = learn[(unit[learn] @ unit[q]).argmax()] # whose answer is believed, half of it
            rest = values[[i for i in learn if task[i] == task[near]]].mean(0)
            assert np.allclose(guess[q], (values[near] + rest) / 2, atol=1e-5)

def test_what_is_held_out_is_predicted_by_what_counts():
    values, weights = (np.tile([[1., 0.], [0., 1.]], (20, 1)),
                       np.tile([3., 1.], 20))
    guess = held_out_scores(dict(name="kmeans", clusters=1),
                            np.ones((40, 2), np.float32), values,
                            np.tile([0, 1], 20), weights=weights)
    np.testing.assert_allclose(guess, np.tile([.75, .25], (40, 1)), atol=.01)

def test_a_task_counts_the_same_however_many_questions_it_has():
    shares = question_weights(dict(a=1., b=3.), dict(a=2, b=8))
    np.testing.assert_allclose(shares, [1.25] * 2 + [.9375] * 8)

def test_how_a_load_is_spread():
    values = np.array([[.9, .1, .2]] * 9 + [[0, 1, 0]])
    facts = load_facts(np.array([0] * 9 + [1]), values)
    load = np.array([.9, .1])
    assert facts["entropy"] == pytest.approx(-(load * np.log(load)).sum() / np.log(3)) and facts["load_max"] == .9
    assert not facts["collapsed"], "one expert is best nearly everywhere"
    assert load_facts(np.zeros(10, int), np.array([[0, 1.]] * 10))["collapsed"]

def test_a_share_of_the_way_to_the_oracle():
    report = dict(a=items([1, 0, 0, 0], [0, 0]),
                  b=items([0, 1, 1, 1], [1, 0]))
    row = lab_row(np.array([0, 1, 1, 0, 0, 0]), report, "a") # right on three of x, on none of y
    low, high = mean_score(report["a"]), mean_score(oracle_task(report))
    assert row["score"] == pytest.approx(.75 * .75) and row["share_closed"] == pytest.approx((.75 * .75 - low) / (high - low))

def test_what_a_mixture_costs(tmp_path):
    said = dict(experts=[dict(name="a", n_params=10),
                         dict(name="b", n_params=30), dict(name="c", n_params=20)],
                eyes="c", features="hidden")
    model = SimpleNamespace(path=tmp_path, kind="mixture", n_params=60)
    work = SimpleNamespace(zoo=dict(m=model))
    (tmp_path/"mixture.json").write_text(json.dumps(said))
    assert comparison.size(work, "m") == (60, 50)
    (tmp_path/"mixture.json").write_text(json.dumps(said | dict(features="embedding")))
    assert comparison.size(work, "m") == (60, 30)
