"What a plan says that a run takes, and a run that does not begin because the machine cannot hold it."
from dataclasses import replace

import pytest

from model_glue_nb.checkpoints.recorded import recorded
from model_glue_nb.core import InputError
from model_glue_nb.gluing import dry_run
from model_glue_nb.gluing.pipeline import glue
from model_glue_nb.gluing.recipe import read_recipe
from model_glue_nb.merging.costs import MachineRates, PlanSettings, ZooSize, stage_costs, zoo_size
from model_glue_nb.zoo.zoo import demo_zoo_path

RATES = MachineRates(read=1e9, write=5e8, matrix=1e11, compare_model=1e-9, compare_pair=4e-11, merge_value=1e-9, merge_input=2e-9, memory=2 * 10**10, workers=4)
SEVEN = recorded("teknium/OpenHermes-7B")
TWELVE = zoo_size([SEVEN.shapes] * 12, [SEVEN.n_bytes] * 12)
HOW = PlanSettings(characters=1e5, evaluations=200, rank=16, experts=4, dense=.5)

def of(size=TWELVE, how=HOW, rates=RATES): return {c.stage: c for c in stage_costs(size, rates, how)}

def test_bytes_are_those_of_the_shapes():
    costs, one = of(), SEVEN.n_bytes
    assert (costs["score"].reads, costs["merge"].reads, costs["merge"].writes) == (12 * one, 12 * one, one)
    assert costs["similarity"].reads == pytest.approx(12 * 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008))
    mlp = 2 * 32 * 3 * 4096 * 11008
    assert costs["mix"].writes == pytest.approx(one + 3 * mlp / 2), "half of the layers are dense"
    assert costs["extract"].writes == 16 * 2 * TWELVE.sides and costs["extract"].reads == 2 * one
    assert costs["search"].writes == 0

def test_seconds_are_the_rates_times_the_values():
    costs, p = of(), SEVEN.n_params
    assert costs["merge"].compute == pytest.approx(p * (1e-9 + 12 * 2e-9), rel=1e-3)
    assert costs["similarity"].compute == pytest.approx(TWELVE.compared * (12 * 1e-9 + 78 * 4e-11), rel=1e-3)
    assert costs["score"].compute == pytest.approx(12 * p * 1e5 * .5 / (.6 * 1e11), rel=1e-3)
    assert of(how=replace(HOW, seconds_per_work=1e-12))["score"].compute == pytest.approx(12 * p * 1e5 * 1e-12, rel=1e-3)
    assert costs["search"].compute == pytest.approx(200 * (costs["merge"].compute + costs["score"].compute / 12), rel=1e-2)
    assert costs["merge"].seconds(RATES) == costs["merge"].compute / 4 + costs["merge"].disk

def test_a_zoo_beyond_the_memory_is_read_from_the_disk():
    assert of()["merge"].disk == pytest.approx((12 * SEVEN.n_bytes) / 1e9 + SEVEN.n_bytes / 5e8)
    roomy = replace(RATES, memory=10**12)
    assert of(rates=roomy)["merge"].disk == pytest.approx(SEVEN.n_bytes / 5e8)
    assert of()["score"].bound(RATES) == "memory" and of(rates=roomy)["score"].bound(roomy) == "processor"
    assert of()["merge"].bound(RATES) == "disk"

def test_memory_is_one_model_and_in_the_type_it_computes_in():
    small, large = of()["score"].memory, of(replace(TWELVE, n=100))["score"].memory
    assert small == large and small == pytest.approx(6 * SEVEN.n_params, rel=.02), "float32 beside the stored two bytes, while it is loaded"
    assert of(how=replace(HOW, item=2))["score"].memory == pytest.approx(2 * SEVEN.n_params, rel=.05)

@pytest.mark.parametrize("n", [10, 25, 50])
def test_nothing_is_quadratic_in_bytes(n):
    one, twice = of(replace(TWELVE, n=n), replace(HOW, members=8)), of(replace(TWELVE, n=2 * n), replace(HOW, members=8))
    for stage in one:
        assert twice[stage].reads <= 2 * one[stage].reads and twice[stage].writes <= 2 * one[stage].writes
        assert twice[stage].memory <= one[stage].memory + 5e8

SMALL = dict(zoo=[str(demo_zoo_path()/n) for n in ("a-base", "a-sort")], tasks=["sort"], search_questions=4, evidence=0, merge=dict(methods=["linear"], strategy="average", budget=2))

def refused(recipe, out, **match):
    with pytest.raises(InputError, **match): glue(recipe, out)
    assert not out.exists() and not list(out.parent.iterdir())

def test_a_run_over_the_memory_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "free_memory", lambda: 10**8)
    monkeypatch.setattr(dry_run, "compute_device", lambda: "cpu")
    refused(SMALL, tmp_path/"run", match="The stage 'score' needs 0.5 GB of memory, and 0.1 GB are free")
    monkeypatch.setattr(dry_run, "compute_device", lambda: "cuda")
    assert dry_run.check_machine(read_recipe(SMALL), tmp_path/"run") == []

def test_a_run_over_the_disk_does_not_begin(tmp_path, monkeypatch):
    "Of a zoo on the hub, the whole of it counts, not one model after the other."
    import model_glue_nb.outputs as outputs
    class Usage: free = 10**11
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda home: Usage)
    monkeypatch.setattr(dry_run, "free_memory", lambda: 10**12)
    zoo = [n for n in ("teknium/OpenHermes-7B", "meta-math/MetaMath-7B-V1.0", "garage-bAInd/Platypus2-7B", "GOAT-AI/GOAT-7B-Community",
                       "Severus27/BeingWell_llama2_7b", "meta-llama/Llama-2-7b-chat-hf", "stanford-oval/Llama-2-7b-WikiChat-fused", "PygmalionAI/pygmalion-2-7b")]
    refused(SMALL | dict(zoo=zoo), tmp_path/"run", match="needs 107.81 GB, but only 100.00 GB are free")
    assert dry_run.check_machine(read_recipe(SMALL | dict(zoo=zoo[:6])), tmp_path/"run") == []
    bad, = dry_run.check_machine(read_recipe(SMALL | dict(zoo=zoo[:7])), tmp_path/"run")
    assert "needs 107.81 GB" in bad, "seven fetched and one merge"

def test_a_run_that_began_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run, "free_memory", lambda: 10**8)
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"zoo.json").write_text("{}")
    assert dry_run.check_machine(read_recipe(SMALL), tmp_path/"run") == []
