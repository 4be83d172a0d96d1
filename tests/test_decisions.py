"""Who is asked, who wins and who answers, by hand: candidates, strategies, routers and how a mixture chooses; weights are never equal and
no point lies in the middle."""
import numpy as np
import pytest
import torch

from model_glue_nb.benchmarking.intervals import ItemScores
from model_glue_nb.merging.recipes import MergeRecipe, recipe
from model_glue_nb.mixing.routers import fit_router, training_data
from model_glue_nb.mixing.routing import Router, choose, groups, pool, prompt_keys, prompt_mask, router_scores, token_keys
from model_glue_nb.searching.protocol import Answer, Ask, Problem, better, first, weigh
from model_glue_nb.searching.strategies import point_at, average, behind, field_of, layerwise, weight_moved, most_similar, race, race_cost
from model_glue_nb.searching.strategies import exchanged, greedy, n_scales, rounds, space_of, tune_scale, undominated

NAMES = "a", "b", "c"

def answer(score): return Answer(ItemScores(dict(x=np.full(4, float(score)))))

def problem(method="linear", members=NAMES, own=(.5, .4, .3), **more):
    base = "base" if method in ("ties", "task_arithmetic", "della", "model_stock") else None
    return Problem(tuple(members), {m: answer(s) for m, s in zip(members, own)}, method, base, **more)

def talk(strategy, score):
    "Answer whatever a strategy asks; gives what it ends with, and all that it asked."
    asked = []
    try:
        asks = next(strategy)
        while True:
            asked += asks
            asks = strategy.send([answer(score(a.candidate)) for a in asks])
    except StopIteration as end: return end.value, asked

def weights(candidate): return {s.model: s.weight for s in candidate.models}

# --- candidates

def test_a_share_of_the_questions_is_rounded_up():
    items = ItemScores(dict(x=np.arange(7.), y=np.arange(3.), z=np.arange(10.)),
                       dict(x=3.))
    for share, sizes in ((.5, (4, 2, 5)),
                         (1/8, (1, 1, 2)),
                         (.3, (3, 1, 3)), (1., (7, 3, 10))):
        part = first(items, share)
        assert tuple(map(len, part.values())) == sizes and part.weights == items.weights

def test_what_failed_is_never_chosen():
    assert Answer(ItemScores({})).mean == Answer(
        ItemScores(dict(x=np.array([1., np.nan])))).mean == -np.inf

def test_equals_take_over_unless_a_gain_is_asked_for():
    told = dict(b=.5, c=.5, d=.4)
    assert talk(better("a", .5, ["b", "c", "d"]), told.get)[0] == ("c", .5)
    assert talk(better("a", .5, ["b", "c", "d"], strictly=True), told.get)[0] == ("a", .5)
    assert talk(better("a", .5, ["b", "c", "d"], strictly=True), dict(told, c=.6).get)[0] == (
        "c", .6)

def test_weights_by_layer_group():
    made = weigh(problem(layers=("l.0.", "l.1.", "l.2.", "l.3.")),
                 ["a", "b"], [[.1, .2, .3], [.9, .8, .7]])
    names = ["l.0.", "l.1.", "l.2.", "l.3.", "*"]
    assert weights(made)["a"] == [dict(filter=f, value=v)
                                  for f, v in zip(names, (.1, .1, .2, .2, .3))]
    assert weights(made)["b"] == [dict(filter=f, value=v)
                                  for f, v in zip(names, (.9, .9, .8, .8, .7))]

def test_linear_merges_within_linear_merges_are_multiplied_out():
    inner = recipe("linear", ["a", "b"], [.2, .8])
    made = weigh(problem(), [inner, "c"], [1, 3])
    assert weights(made) == pytest.approx(dict(a=.05, b=.2, c=.75))
    assert weights(weigh(problem(), [inner, "b"], [1, 3])) == pytest.approx(dict(a=.05, b=.95))

@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_pairs_within_pairs_keep_every_members_share(method):
    made = weigh(problem(method), list(NAMES), [1, 2, 5])
    inner = made.models[0].model
    if method == "slerp":
        assert made.parameters["t"] == 5 / 8 and inner.parameters["t"] == pytest.approx(2 / 3, abs=1e-6)
    else:
        assert weights(inner) == pytest.approx(dict(a=1 / 3, b=2 / 3), abs=1e-6)
        assert made.models[1].weight == 5 / 8 and made.models[0].weight == 3 / 8
    assert made.models[1].model == "c" and [s.model for s in inner.models] == ["a", "b"]

def test_methods_without_weights_take_whoever_has_half_of_the_largest():
    assert [s.model for s in weigh(problem("model_stock"), list(NAMES), [1., .6, .3]).models] == ["a", "b"]

def test_densities_stay_with_their_members():
    made = weigh(problem("ties"), list(NAMES), [1, 0, 2], densities=[.1, .2, .3])
    assert {s.model: s.parameters["density"] for s in made.models} == dict(a=.1, c=.3)

# --- strategies

def test_scale_is_swept_on_both_sides_of_one():
    winner = recipe("task_arithmetic", ["a", "b"], [1, 2], "base")
    def score(c): return 1 - abs(c.parameters["scale"] - 1.5)
    (best, s), asked = talk(tune_scale(problem("task_arithmetic"), winner, .2), score)
    assert best.parameters["scale"] == 1.5 and s == 1 and min(a.candidate.parameters["scale"] for a in asked) < 1
    (best, _), _ = talk(tune_scale(problem("task_arithmetic"), winner, .2), lambda c: .2)
    assert best is winner, "an equal score is no reason to change λ"

def test_a_soup_takes_members_that_do_not_hurt():
    (winner, score), _ = talk(average(problem()), lambda c: .5)
    assert set(weights(winner)) == {"a", "b", "c"} and score == .5
    (winner, _), _ = talk(average(problem()), lambda c: .5 if "b" not in weights(c) else .4)
    assert set(weights(winner)) == {"a", "c"}

def test_summed_task_vectors_are_tried_whole_and_as_a_mean():
    _, asked = talk(greedy(problem("task_arithmetic", "ab")), lambda c: .1)
    assert [weights(a.candidate) for a in asked] == [dict(a=1., b=1.), dict(a=.5, b=.5)]

@pytest.mark.parametrize("budget, scales",
                         [(3., [.7]), (8., [.7, 1.5]), (13., [.7, 1.2, 1.5])])
def test_a_small_budget_asks_for_few_scales_on_both_sides(budget, scales):
    winner, p = recipe("task_arithmetic", ["a", "b"], [1, 2], "base"), problem("task_arithmetic", budget=budget)
    _, asked = talk(tune_scale(p, winner, .2), lambda c: .2)
    assert [a.candidate.parameters["scale"] for a in asked] == scales and n_scales(p) == len(scales)
    assert n_scales(problem(budget=budget)) == 0, "a mean has no scale"

def test_a_soup_leaves_the_part_of_the_budget_that_scales_need():
    def asked(budget):
        return len(talk(greedy(problem("task_arithmetic", "abc", budget=budget)), lambda c: .9)[1])
    assert [asked(b) for b in (1, 4, 5, 12)] == [2, 2, 4, 4] # two soups per member, one value of λ to come

@pytest.mark.parametrize("best", ["ac", "bd", "cd"])
def test_members_leave_or_are_exchanged_while_that_gains(best):
    p, start = problem(members="abcd", own=(.5, .4, .3, .2)), recipe("linear", list("abc"))
    def score(c): return 1 - len(set(weights(c)) ^ set(best)) / 10
    (inside, winner, top), _ = talk(exchanged(p, list("abc"), start, score(start)), score)
    assert set(inside) == set(weights(winner)) == set(best) and top == 1

def test_the_scale_that_was_found_stays_when_members_change():
    start = recipe("ties", list("abc"), base="base", scale=.5)
    _, asked = talk(exchanged(problem("ties", "abcd", (.5, .4, .3, .2)), list("abc"), start, .5), lambda c: .1)
    assert asked and {a.candidate.parameters["scale"] for a in asked} == {.5}

def test_coefficients_lie_inside_and_evenly():
    _, asked = talk(rounds(problem(members="ab"), lambda current, left: left[0], 3), lambda c: .1)
    assert sorted(weights(a.candidate)["a"] for a in asked) == [.25, .5, .75]

def test_the_most_and_the_least_similar():
    p = problem(similarity=lambda c, names: [dict(b=.3, c=.9, d=.9)[n] for n in names])
    assert most_similar(p, "a", ["b", "d", "c"], 1) == "c" and most_similar(p, "a", ["b", "d", "c"], -1) == "b"

def test_ranges_of_what_is_searched():
    assert space_of(problem("della"))["density a"] == (.2, .8) and space_of(problem("ties"))["density a"] == (.05, .975)
    assert space_of(problem("ties"))["scale"] == (.2, 1.8) and space_of(problem("task_arithmetic"))["scale"] == (.1, .9 * 3)
    assert set(space_of(problem(), 2)) == {f"weight {m} {g}" for m in NAMES for g in range(3)}

def test_points_become_weights_that_add_up_to_one():
    made = point_at(problem("ties"), {"weight a": .2, "weight b": .6, "weight c": 0., "density a": .3, "density b": .4, "density c": .5, "scale": 1.25})
    assert weights(made) == dict(a=.25, b=.75) and made.parameters == dict(scale=1.25)
    assert [s.parameters for s in made.models] == [dict(density=.3), dict(density=.4)]

def test_points_that_no_other_beats():
    assert undominated([[1,
                         2], [1, 1], [2, 1], [1, 2], [0, 3], [1, 1.5]]).tolist() == [
     0, 2, 4]

def test_heats_halve_the_field_rounded_up():
    heats, scores = [], dict(zip("abcdefg", np.linspace(.2, .8, 7)))
    r = race(list(scores), (.25, .5, 1.), .5)
    asks = next(r)
    try:
        while True:
            heats.append([(a.candidate, a.share) for a in asks])
            asks = r.send([answer(scores[a.candidate]) for a in asks])
    except StopIteration as end: ranked = end.value
    assert [len(h) for h in heats][0] == 7 and heats[1][0][1] == .5
    assert ([c for c, _ in ranked] == sorted(ranked_names := [c for c, _ in ranked], key=lambda c: -scores[c])
            and ranked_names[0] == "g")

def test_a_race_keeps_half_rounded_up_where_nobody_is_certainly_behind():
    rng, runners = np.random.default_rng(0), list("abcde")
    def noisy(): return Answer(ItemScores(dict(x=rng.permutation([0., 1.] * 6))))
    r = race(runners, (.5, 1.), .5)
    next(r)
    assert len(r.send([noisy() for _ in runners])) == 3

@pytest.mark.parametrize("n_runners, stays", [(2, False), (6, False), (7, True), (12, True)])
def test_a_race_asks_more_of_a_lead_the_more_could_have_led(n_runners, stays):
    "Seven questions won and none lost: 1 in 128."
    lead, behind_it = np.r_[np.ones(7), np.zeros(9)], np.zeros(16)
    r = race([str(i) for i in range(n_runners)], (.5, 1.), 1.)
    next(r)
    told = [Answer(ItemScores(dict(x=lead)))] + [Answer(ItemScores(dict(x=behind_it)))] * (n_runners - 1)
    assert len(r.send(told)) == (n_runners if stays else 1)

def test_what_a_race_costs(): assert race_cost((.25, .5, 1.), .5) == .25 + .5 * .25 + .25 * .5

def test_weights_count_when_a_candidate_is_behind():
    ours, leader = (dict(x=np.zeros(40), y=np.ones(40)),
                    dict(x=np.ones(40), y=np.zeros(40)))
    noise = np.tile([0., .2], 20)
    for shares, lost in ((dict(x=3., y=1.), True), (dict(x=1., y=3.), False)):
        assert behind(ItemScores({t: v + noise for t, v in ours.items()}, shares), ItemScores(leader, shares)) == lost

def test_a_second_field_lies_around_the_winner():
    around = recipe("linear", list(NAMES), [1, 3, 0])
    field = field_of(problem(), 24, np.random.default_rng(0), around)
    b = np.array([weights(c).get("b", 0) for c in field])
    assert len(field) == 24 and b.min() >= .374 and b.min() < .5 < b.max() and b.max() <= .876

def test_layers_move_one_group_at_a_time_and_keep_lambda():
    p, layers = problem("ties", own=(.5, .2, .1)), ("l.0.", "l.1.", "l.2.", "l.3.")
    p = Problem(p.members, p.own, p.method, p.base, layers=layers)
    def value(w, place): return w if isinstance(w, float) else {x["filter"]: x["value"] for x in w}[place]
    goal = dict(a=(1., 1., 1.), b=(1., .25, 1.), c=(0., 0., .875)) # by the two groups and what lies outside
    def score(c):
        if isinstance(c, str): return .5
        w = weights(c)
        far = sum(abs(value(w.get(m, 0.), place) - g[i])
                  for m, g in goal.items()
                  for i, place in enumerate(("l.1.", "l.3.", "*")))
        return .9 - .05 * far - .1 * (c.parameters.get("scale", 1) != .7)
    (winner, _), asked = talk(layerwise(p, layer_groups=2), score)
    found = {m: tuple(value(weights(winner).get(m, 0.), place) for place in ("l.1.", "l.3.", "*")) for m in NAMES}
    assert winner.parameters["scale"] == .7 and found == goal

def test_moves_stay_between_zero_and_one():
    w = np.array([[.2, 1.], [1., 0.]])
    assert (weight_moved(w, 0, 0, -.5)[0, 0] == 0
            and weight_moved(w, 0, 0, .5)[0, 0] == .7
            and weight_moved(w, 1, 0, .5) is None)
    assert weight_moved(np.array([[.2], [0.]]), 0, 0, -.5) is None, "nobody would be left"

# --- how a mixture chooses

def test_keys_know_the_place_of_a_token():
    a, b = torch.tensor([[5, 9, 7]]), torch.tensor([[9, 5, 7]])
    ones = torch.ones(1, 3, dtype=torch.bool)
    assert (prompt_keys(a, ones) != prompt_keys(b, ones)
            and token_keys(a, ones * 0)[0, 0] != token_keys(a, ones * 1)[0, 0])
    padded, mask = (torch.tensor([[0, 0, 5, 9, 7], [5, 9, 7, 0, 0]]),
                    torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool())
    assert prompt_keys(padded, mask).tolist() == 2 * prompt_keys(a, ones).tolist()

def test_scores_of_each_form_by_hand():
    x, keys = torch.tensor([[3., 4.]]), torch.tensor([12345])
    arrays = dict(points=torch.tensor([[1., 0.], [0., 1.], [.6, .8]]),
                  values=torch.tensor([[1., 0.], [.5, .25], [0., 1.]]))
    mean = arrays["values"].mean(0) * 1e-6
    assert torch.allclose(router_scores(dict(form="nearest", k=2), arrays, x, keys), torch.tensor([[.25, .625]]) + mean)
    assert torch.allclose(router_scores(dict(form="nearest"), arrays, x, keys), torch.tensor([[0., 1.]]) + mean)
    offset = arrays | dict(offset=torch.tensor([5., 0., 0.]))
    assert torch.allclose(router_scores(dict(form="nearest"), offset, x, keys), torch.tensor([[1., 0.]]) + mean)
    line = dict(weight=torch.tensor([[1., 0.], [0., 2.]]), bias=torch.tensor([.5, -1.]))
    assert torch.allclose(router_scores(dict(form="linear"), line, x, keys), torch.tensor([[1.1, .6]]))
    assert torch.allclose(router_scores(dict(form="linear", unit=False, squash=True), line, x, keys),
                          torch.tensor([[3.5, 7.]]).sigmoid())
    two = dict(weight=torch.tensor([[1., 0.], [0., -1.]]),
               bias=torch.zeros(2),
               weight2=torch.tensor([[2., 1.], [0., 1.]]),
               bias2=torch.tensor([0., .3]))
    assert torch.allclose(router_scores(dict(form="mlp"), two, x, keys), torch.tensor([[1.2, .3]]))

def test_equal_neighbours_leave_it_to_the_whole():
    arrays = dict(points=torch.tensor([[1., 0.], [0., 1.]]),
                  values=torch.tensor([[.5, .5], [0., 1.]]))
    assert router_scores(dict(form="nearest"), arrays, torch.tensor([[1., 0.]]), torch.tensor([1])).argmax() == 1

def test_seeds_deal_prompts_differently():
    keys = torch.arange(1, 400) * 1_000_003
    by = [router_scores(dict(form="hash", n_experts=3, seed=s), {}, torch.zeros(399, 1), keys).argmax(1)
          for s in (0, 1)]
    assert (.2 < (by[0] == by[1]).float().mean() < .5
            and all((b.bincount() > 90).all() for b in by))

def test_the_cheapest_within_the_margin():
    scores, costs = (torch.tensor([[.9, .85, .2], [.3, .9, .5], [.9, .88, .87]]),
                     torch.tensor([3., 2., 1.]))
    assert choose(scores, costs=costs, margin=.1)[0][:, 0].tolist() == [1, 1, 2]
    assert choose(scores, costs=costs, margin=0.)[0][:, 0].tolist() == [0, 1, 0]

def test_weights_of_several_experts():
    index, weight = choose(torch.tensor([[1., 3., 2.]]), 2, .5)
    share = 1 / (1 + np.exp(-2))
    assert index.tolist() == [[1, 2]] and weight[0].tolist() == pytest.approx([share, 1 - share])
    there = groups(torch.tensor([[1, 2], [2, 1], [1, 0]]),
                   torch.tensor([[.7, .3], [.6, .4], [.9, .1]]))
    told = {(g.expert,
             g.rank): (g.rows.tolist(), [round(x, 3) for x in g.weight.tolist()])
            for g in there}
    assert told == {(1, 0): ([0, 2], [.7, .9]),
                    (2, 0): ([1], [.6]),
                    (0, 1): ([2], [.1]),
                    (1, 1): ([1], [.4]),
                    (2, 1): ([0], [.3])}

def test_one_expert_counts_whole_and_its_share_has_a_gradient():
    scores = torch.tensor([[1., 3., 2.]], requires_grad=True)
    index, weight = choose(scores, 1, .5)
    weight.sum().backward()
    share = torch.softmax(scores.detach() / .5, -1)
    assert index.tolist() == [[1]] and weight.tolist() == [[1.]]
    assert torch.allclose(scores.grad, (torch.tensor([[0., 1., 0.]]) - share) / .5)
    there = groups(torch.tensor([[1], [0]]), torch.tensor([[.7], [.6]], requires_grad=True))
    assert {g.expert: g.weight.tolist()
            for g in there} == {0: [pytest.approx(.6)], 1: [pytest.approx(.7)]}
    assert all(g.weight is None
               for g in groups(torch.tensor([[1], [0]]), torch.tensor([[.7], [.6]])))

def test_a_router_tells_what_its_softmax_is_taken_of():
    router = Router(dict(form="linear", unit=False, temperature=.5), dict(weight=(2, 3)))
    with torch.no_grad(): router.weight.copy_(torch.tensor([[1., 0., 2.], [0., 3., 0.]]))
    index, _, logits = router(torch.tensor([[1., 1., 1.5]]), torch.tensor([1]))
    assert index.tolist() == [[0]] and logits.tolist() == [[8., 6.]]

def test_only_the_prompt_is_read():
    x = torch.arange(24.).reshape(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert prompt_mask((2, 4), mask.long(), torch.tensor([2, 1])).tolist() == [
        [False, True, True, False], [True, False, False, False]]
    assert torch.equal(pool(x, mask),
                       torch.stack([x[0, 1:].mean(0), x[1, :2].mean(0)]))
    assert (torch.equal(pool(x, mask, "last"), torch.stack([x[0, 3], x[1, 1]]))
            and torch.equal(pool(x, mask, "first"), torch.stack([x[0, 1], x[1, 0]])))

# --- what a router learns

def fitted(name, x, values, unit=True, **settings):
    return fit_router(dict(name=name, **settings), dict(model=np.float32(x)), np.float32(values), unit)

def test_nearest_prompts_are_averaged():
    x, values = ([[5., 0], [4., 3.], [0, 1.]],
                 [[1, 0], [.2, .4], [0, 1]])
    got = fitted("knn", x, values, k=2)
    assert np.allclose(got.scores(np.float32([[1, .1], [.1, 1]])),
                       [[.6, .2], [.1, .7]], atol=2e-6)
    long = fitted("knn", [[1., 0], [0, 100.]], [[1, 0], [0, 1]], k=1)
    assert long.route(np.float32([[1, .5]])).tolist() == [0], "length says nothing"

def test_clusters_are_those_of_distance():
    x = np.float32([[1, 0], [1.1, .1], [9, 3], [9.2, 3.1]])
    got = fitted("kmeans", x,
                 [[1, 0], [.6, .2], [0, 1], [.2, 1]],
                 unit=False, clusters=2)
    assert np.allclose(got.scores(np.float32([[2, 1], [8, 2]])),
                       [[.8, .1], [.1, 1.]], atol=1e-5)

def test_an_expert_that_is_always_right_is_chosen_where_others_are_not():
    r = np.random.default_rng(0)
    x = r.normal(size=(60, 3))
    values = np.stack([np.ones(60), (r.random(60) < .7)], 1)
    assert set(fitted("linear", x, values).route(np.float32(x)).tolist()) == {0}

@pytest.mark.parametrize("name", ["linear", "mlp"])
@pytest.mark.parametrize("scale", [.001, 1000])
def test_features_of_any_size_and_place(name, scale):
    r = np.random.default_rng(1)
    x = r.normal(size=(200, 4)) + [50 * (name == "linear"), 0, 0, 0]
    values = np.stack([x[:, 1] > 0, x[:, 1] < 0], 1)
    got = fitted(name, x * scale, values, unit=False)
    assert (got.route(np.float32(x * scale)) == (x[:, 1] < 0)).mean() > .95
    assert (got.scores(np.float32(x * scale)).max(1) > .8).mean() > .6, "the penalty means the same everywhere"

def test_grades_count():
    r = np.random.default_rng(2)
    x = r.normal(size=(300, 3))
    values = np.where(x[:, :1] > 0, [.45, .3], [.05, .2]) # nobody is ever more right than wrong
    got = fitted("linear", x, values).route(np.float32(x))
    assert (got == (x[:, 0] < 0))[np.abs(x[:, 0]) > .3].mean() > .9

def test_directions_point_away_from_the_others():
    x = np.float32([[1, 1, 0], [1, -1, 0], [1, 0, 1]])
    got = fit_router(dict(name="prompt"), dict(model=x),
                     np.float32([[1, 0, .1], [0, 1, .2], [.3, 0, 1]]))
    assert (got.places["model"]["weight"][0, 0] < .5) and got.route(x).tolist() == [0, 1, 2]

def test_a_prompt_that_counts_three_times_turns_a_direction_as_three_do():
    x, values, three = (np.float32([[1, 0], [0, 1], [.6, -.8]]),
                        np.float32([[1, .2], [.4, .1], [0, 1]]),
                        [0, 0, 0, 1, 2])
    weighted = fit_router(dict(name="prompt"), dict(model=x), values, weights=[3, 1, 1])
    repeated = fit_router(dict(name="prompt"), dict(model=x[three]), values[three])
    np.testing.assert_allclose(weighted.places["model"]["weight"], repeated.places["model"]["weight"], atol=1e-6)
    assert not np.allclose(weighted.places["model"]["weight"],
                           fit_router(dict(name="prompt"), dict(model=x), values).places["model"]["weight"])

def test_a_questions_difficulty_is_no_experts_kind():
    "Each kind of prompt comes easy and hard; only who is better on it tells whose it is."
    kinds = np.float32(np.eye(3)).repeat(2, 0)
    best = np.eye(3).repeat(2, 0) * .1
    values = np.float32(best + np.tile([[.8], [.1]], (3, 1)))
    got = fit_router(dict(name="prompt"), dict(model=kinds), values)
    assert got.route(kinds).tolist() == [0, 0, 1, 1, 2, 2]

def test_given_prompts_count_for_and_against():
    texts, edge = training_data(dict(name="prompt", positive=["p", ["q", "r"]], negative=["s", "t"]), 2)
    assert (texts == ["p", "q", "r", "s", "t"]
            and edge.tolist()
                == [[1, 0], [0, 1], [0, 1], [-1, 0], [0, -1]])

def test_layers_draw_differently():
    got = fit_router(dict(name="random", seed=3),
                     {str(i): np.zeros((0, 1), np.float32) for i in range(3)},
                     np.zeros((0, 4), np.float32))
    prompts = [f"prompt {i}" for i in range(200)]
    by = [got.route(np.zeros((200, 1), np.float32), prompts, str(i)) for i in range(3)]
    assert all(.1 < (by[i] == by[j]).mean() < .5 for i in range(3) for j in range(i))

def test_cheap_experts_answer_within_the_margin():
    x, values = [[1., 0], [0, 1.]], [[.9, .8], [.1, .8]]
    def route(margin, **more):
        return fit_router(dict(name="knn", k=1, margin=margin, **more), dict(model=np.float32(x)), np.float32(values), costs=[5., 1.]).route(
            np.float32(x))
    assert (route(0.).tolist() == [0, 1]
            and route(.2).tolist() == [1, 1]
            and route(.2, costs=[1., 2.]).tolist() == [0, 1])
