"Small changes of a merge by hand: which are tried, in what order, what a budget pays for first, and where they lead."
import math

import numpy as np
import pytest

from model_glue_nb.benchmarking.intervals import ItemScores
from model_glue_nb.searching.moves import Place, divided, drop_moves, kinds_of, layer_moves, place_moved, placed, plan_reach, reach
from model_glue_nb.searching.moves import scale_moves, stepwise, swap_moves, weight_moves
from model_glue_nb.searching.protocol import Answer, Problem, layer_spans

def answer(score): return Answer(ItemScores(dict(x=np.full(4, float(score)))))

def problem(method="linear", members="abcd", **more):
    base = "z" if method in ("ties", "task_arithmetic") else None
    return Problem(tuple(members), {m: answer(.5 - i / 10) for i, m in enumerate(members)}, method, base, **more)

def talk(strategy, score):
    "Answer whatever a strategy asks; gives what it ends with, and what it asked, batch by batch."
    batches = []
    try:
        asks = next(strategy)
        while True:
            batches.append([a.candidate for a in asks])
            asks = strategy.send([answer(score(a.candidate)) for a in asks])
    except StopIteration as end: return end.value, batches

def weights(candidate): return {s.model: s.weight for s in candidate.models}

def weights_of_all(moves): return [p.weights for p in moves]

# --- places

@pytest.mark.parametrize("method, unit", [("task_arithmetic", math.sqrt(3)), ("ties", 1.)])
def test_lambda_is_told_in_units_of_where_a_soup_starts(method, unit):
    made = placed(problem(method), Place((1., .5, 0., .5), 1.2), [])
    assert weights(made) == dict(a=.5, b=.25, d=.25) and made.parameters["scale"] == pytest.approx(1.2 * unit, abs=1e-6)

def test_the_largest_weight_of_a_place_is_one():
    assert place_moved(Place((1., .5, 0.)), {0: .25, 2: .125}).weights == (.5, 1., .25)

# --- moves

def test_lambda_goes_down_and_up_and_stays_in_its_range():
    def scales(now): return [p.scale for p in scale_moves(None, Place((1., 1.), now), 1.6, [])]
    assert scales(1.) == [.625, 1.6] and scales(3.) == [1.875, 4.] and scales(.125) == [.1, .2]

def test_members_leave_the_worst_first_as_long_as_two_stay():
    assert weights_of_all(drop_moves(None, Place((1., .5, .25)), 2, [])) == [
        (1., .5, 0.), (1., 0., .25), (0., 1., .5)]
    assert not list(drop_moves(None, Place((1., .5, 0.)), 2, []))

def test_an_outsider_takes_a_place_with_its_weight_or_comes_beside_all():
    found = weights_of_all(swap_moves(None, Place((1., .5, 0., 0.)), 2, []))
    assert found == [(1., 0., .5, 0.), (0., .5, 1., 0.), (1., .5, .75, 0.),
                     (1., 0., 0., .5), (0., .5, 0., 1.), (1., .5, 0., .75)]

def test_one_alone_gives_way_to_pairs_first():
    found = weights_of_all(swap_moves(None, Place((1., 0., 0., 0.)), 2, []))
    assert found[:4] == [(0., 1., 1., 0.),
                         (0., 1., 0., 1.), (0., 0., 1., 1.),
                         (0., 1., 0., 0.)]

def test_weights_change_by_a_factor():
    assert weights_of_all(weight_moves(None, Place((1., .5)), 2, [])) == [(1., .25),
                                                                          (1., 1.), (1., 1.), (1., .25)]
    assert not list(weight_moves(None, Place((1., 0.)), 2, [])), "of one alone there is nothing to weigh"

def test_layers_go_to_the_base_then_back_then_to_members():
    p = problem(root="z", layers=("l.0.", "l.1."))
    spans = layer_spans(p.layers, 2)
    def patches(now):
        return [m.patches for m in layer_moves(p, Place((1., 1., 0., 0.), patches=now), 2, spans)]
    assert patches(())[:4] == [((0, "z"),),
                               ((1, "z"),), ((2, "z"),),
                               ((0, "a"),)]
    assert patches(((0, "z"),))[:3] == [((0, "z"), (1, "z")),
                                        ((0, "z"), (2, "z")), ()]
    full = patches(((0, "z"), (1, "a")))
    assert full and all(len(x) < len(spans) for x in full), "something of the merge is left"

# --- a budget

@pytest.mark.parametrize("n, kinds, budget, parts", [
    (7, 5, 10, (5, 1)),
    (7, 5, 60, (6, 5)),
    (30, 2, 20, (14, 1)),
    (30, 5, 20, (10, 1)),
    (3, 4, 50, (2, 6)),
    (7, 5, 1, (1, 1)),
    (7, 5, math.inf, (6, 12))])
def test_what_a_budget_is_spent_on_first(n, kinds, budget, parts):
    assert divided(n, list("vwxyz")[:kinds], budget) == parts

@pytest.mark.parametrize("budget", [1, 3, 7, 12, 40])
def test_what_is_promised_is_not_more_than_is_paid_for(budget):
    found = reach(7, list("vwxyz"), budget)
    assert sum(found.values()) <= budget and list(found) == ["join", *"vwxyz"]

def test_the_first_budget_that_reaches_all_is_named():
    said = plan_reach(7, "ties", 4)
    least = int(said.split("With ")[1].split()[0])
    assert plan_reach(7, "ties", least) == "" != plan_reach(7, "ties", least - 1)

def test_kinds_that_a_method_knows():
    assert kinds_of(problem("ties", layers=("l.0.",))) == ["scale", "drop", "swap", "weight", "layer"]
    assert kinds_of(problem("linear", "ab")) == ["weight"]

# --- the strategy

def test_equals_join_but_do_not_move_a_merge():
    (winner, best), batches = talk(stepwise(problem()), lambda c: .5)
    assert best == .5 and set(weights(winner).values()) == {.25}
    asked = [repr(c) for batch in batches[3:] for c in batch] # three have joined
    assert len(asked) == len(set(asked)), "no move is asked twice"

def test_a_turn_is_as_long_as_the_budget_lets_it_be():
    p = problem(budget=30.)
    joining, turn = divided(4, kinds_of(p), 30)
    _, batches = talk(stepwise(p), lambda c: .5)
    assert [len(b) for b in batches[:joining]] == [1] * joining
    assert max(len(b) for b in batches) == turn == 4

@pytest.mark.parametrize("goal", [1.1, 1.6 * 1.25])
def test_steps_get_finer(goal):
    p = problem("task_arithmetic", "ab")
    def score(c): return 5 - abs(c.parameters["scale"] / math.sqrt(2) - goal)
    (winner, best), _ = talk(stepwise(p), score)
    assert best == pytest.approx(5, abs=1e-3) and weights(winner) == dict(a=.5, b=.5)

def test_the_pair_that_belongs_together_is_found_though_the_best_is_of_no_use():
    def score(c): return .1 if isinstance(c, str) or set(weights(c)) != {"c", "d"} else .9
    (winner, best), _ = talk(stepwise(problem()), score)
    assert best == .9 and set(weights(winner)) == {"c", "d"}
