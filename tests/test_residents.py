"Who stays in memory, and whose words a conversation is routed on."
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from model_glue_nb.benchmarking.intervals import ItemScores
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError
from model_glue_nb.mixing.experts import Translated
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.routers import read_router
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.zoo import open_model, tiny_zoo

@pytest.fixture(scope="module")
def live(tmp_path_factory):
    room = tmp_path_factory.mktemp("mixture")
    zoo = tiny_zoo(room, ["a", "b", "c"])
    return mix(MixtureSpec(("a", "b", "c"), dict(name="random"), max_resident=2), zoo, room/"m").load(device="cpu")

def test_whoever_was_used_last_stays(live):
    for i in (0, 1, 0, 2): live.expert(i)
    assert sorted(live.resident) == [0, 2]
    live.expert(1)
    assert sorted(live.resident) == [1, 2]

def test_a_conversation_is_routed_on_what_the_user_said(live, monkeypatch):
    seen = []
    def route(self, prompts):
        seen.extend(prompts)
        return np.zeros(len(prompts), int)
    monkeypatch.setattr(type(live), "route", route)
    said = [("system", "w3"), ("user", "w4 w5"), ("assistant", "w6"), ("user", "w7")]
    list(live.chat([dict(role=r, content=c) for r, c in said], 2))
    assert seen and not any(w in p.split() for p in seen for w in ("w3", "w6")) and "w7" in seen[-1]

def test_a_request_without_a_prompt_is_named(live):
    request = SimpleNamespace(args=(" ", "w4"))
    with pytest.raises(InputError, match="Request 0 has an empty context"):
        live.lm_eval().loglikelihood([request])

def test_answers_are_kept_under_the_requests_that_came():
    kept = []
    hook = SimpleNamespace(add_partial=lambda *said: kept.append(said))
    came, read = [[SimpleNamespace(args=(f"{who} {i}", {})) for i in range(2)] for who in ("packed", "written")]
    Translated(hook, came, read).add_partial("generate_until", read[1].args, "said")
    assert kept == [("generate_until", came[1].args, "said")]

def test_a_routers_lessons_count_as_their_tasks_do(tmp_path):
    zoo, suite = tiny_zoo(tmp_path, ["a", "b"]), load_suite("demo").part("search", 4)
    first, second = suite.tasks[:2]
    suite = replace(suite, tasks=(replace(first, questions=first.questions[:2]), second))
    right = {m: ItemScores({t.name: np.ones(len(t.questions)) for t in suite.tasks}) for m in "ab"}
    made = mix(MixtureSpec(("a", "b"), dict(name="knn")), zoo, tmp_path/"m", suite, items=right)
    values = read_router(made.path).places["model"]["values"]
    np.testing.assert_allclose(values[:, 0], [1.5] * 2 + [.75] * 4, atol=1e-6)

def test_an_expert_that_changed_since_is_refused(tmp_path):
    zoo = tiny_zoo(tmp_path, ["a", "b"])
    made = mix(MixtureSpec(("a", "b"), dict(name="random")), zoo, tmp_path/"m")
    made.load(device="cpu")
    file = zoo["b"].path/"config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(rms_norm_eps=.5)))
    with pytest.raises(InputError, match="Expert 'b' has changed since 'm' was mixed"):
        open_model(tmp_path/"m").load(device="cpu")

def test_each_prompt_is_answered_by_its_own_expert(live):
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(3, 40)]
    route = live.route(prompts)
    assert set(route) == {0, 1, 2}
    alone = {e: live.expert(e).generate(prompts, 5) for e in range(3)}
    assert live.generate(prompts, 5) == [alone[int(e)][i] for i, e in enumerate(route)]
    assert len({tuple(a) for a in alone.values()}) == 3
