"Who stays in memory, and whose words a conversation is routed on."
import numpy as np
import pytest

from model_glue_nb.levels import MixtureSpec
from model_glue_nb.mixture import mix
from model_glue_nb.zoo import tiny_zoo

@pytest.fixture(scope="module")
def live(tmp_path_factory):
    room = tmp_path_factory.mktemp("mixture")
    zoo = tiny_zoo(room, ["a", "b", "c"])
    return mix(MixtureSpec(("a", "b", "c"), dict(name="random"), max_resident=2), room/"m", zoo).load(device="cpu")

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

def test_each_prompt_is_answered_by_its_own_expert(live):
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(3, 40)]
    route = live.route(prompts)
    assert set(route) == {0, 1, 2}
    alone = {e: live.expert(e).generate(prompts, 5) for e in range(3)}
    assert live.generate(prompts, 5) == [alone[int(e)][i] for i, e in enumerate(route)]
    assert len({tuple(a) for a in alone.values()}) == 3
