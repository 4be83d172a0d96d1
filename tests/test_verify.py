"`--verify` computes with a result before it gets its name; what was said is what is done."
import json, sys

import pytest
from safetensors.torch import load_file, save_file

from model_glue_nb.core import InputError
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.spec import MixtureSpec
from model_glue_nb.zoo.zoo import open_model, read_zoo, tiny_zoo

RANDOM = dict(name="random")

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    def run(*args):
        from model_glue_nb.cli.program import main
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["model-glue", *map(str, args)])
        with pytest.raises(SystemExit) as e: main()
        return e.value.code or 0, capsys.readouterr().err
    return run

@pytest.mark.parametrize("said,want", [((), False), (("--verify",), True), (("--no-verify",), False)])
def test_merge_does_what_is_said(command, tmp_path, monkeypatch, said, want):
    import model_glue_nb.merging.merge as merging
    tiny_zoo(tmp_path, ["a", "b"])
    (tmp_path/"m.yaml").write_text("merge_method: linear\nmodels: [a, b]\n")
    seen = []
    real = merging.verify_written
    monkeypatch.setattr(merging, "verify_written", lambda folder: seen.append(real(folder)))
    assert command("merge", "m.yaml", "out", *said)[0] == 0 and bool(seen) == want

@pytest.mark.parametrize("said,want", [((), True), (("--verify",), True), (("--no-verify",), False)])
def test_mix_does_what_is_said(command, tmp_path, monkeypatch, said, want):
    from model_glue_nb.mixing import verified
    tiny_zoo(tmp_path, ["base", "a", "b"])
    seen = []
    (tmp_path/"m.yaml").write_text("experts: [a, b]\nbase: base\nlevel: block\nrouter: random\n")
    monkeypatch.setattr(verified, "compare_experts", lambda *args, **how: seen.append(1) or [])
    assert command("mix", "m.yaml", "out", *said)[0] == 0 and bool(seen) == want

@pytest.mark.parametrize("more", [{}, dict(tie_word_embeddings=True)])
@pytest.mark.parametrize("method", ["passthrough", "linear"])
def test_a_copy_of_one_parent_is_verified(command, tmp_path, method, more):
    zoo = tiny_zoo(tmp_path, ["a"], **more)
    (tmp_path/"m.yaml").write_text(f"merge_method: {method}\nmodels: [a]\n")
    code, err = command("merge", "m.yaml", "out", "--verify")
    assert code == 0, err
    got, want = load_file(tmp_path/"out"/"model.safetensors"), load_file(zoo["a"].path/"model.safetensors")
    assert got.keys() == want.keys() and all((got[k] == want[k]).all() for k in want)

@pytest.mark.parametrize("head", [True, False])
def test_a_parent_that_names_a_class_without_a_head(tmp_path, head):
    home = tiny_zoo(tmp_path, ["a"])["a"].path
    config = json.loads((home/"config.json").read_text())
    (home/"config.json").write_text(json.dumps(config | dict(architectures=["LlamaModel"])))
    if not head:
        weights = load_file(home/"model.safetensors")
        weights.pop("lm_head.weight")
        save_file(weights, home/"model.safetensors", dict(format="pt"))
    merge(recipe("passthrough", ["a"]), read_zoo([home]), tmp_path/"out", verify=True)

def test_a_parent_that_cannot_compute_is_one_line(command, tmp_path):
    zoo = tiny_zoo(tmp_path, ["a"], "Mixtral", num_local_experts=2)
    config = json.loads((zoo["a"].path/"config.json").read_text())
    (zoo["a"].path/"config.json").write_text(json.dumps(config | dict(num_experts_per_tok=7)))
    (tmp_path/"m.yaml").write_text("merge_method: passthrough\nmodels: [a]\n")
    code, err = command("merge", "m.yaml", "out", "--verify")
    assert code == 2 and "cannot load the result or compute" in err and not (tmp_path/"out").exists() and "Traceback" not in err

@pytest.mark.parametrize("copy", [True, False])
def test_whole_experts_are_loaded_and_asked(command, tmp_path, copy):
    tiny_zoo(tmp_path, ["a", "b"])
    (tmp_path/"m.yaml").write_text(f"experts: [a, b]\nrouter: random\ncopy: {str(copy).lower()}\n")
    assert command("mix", "m.yaml", "good", "--verify")[0] == 0 and open_model(tmp_path/"good").load("cpu").generate(["w3"], 1)
    config = json.loads((tmp_path/"b"/"config.json").read_text())
    (tmp_path/"b"/"config.json").write_text(json.dumps(config | dict(hidden_act="none such")))
    code, err = command("mix", "m.yaml", "bad", "--verify")
    assert code == 2 and not (tmp_path/"bad").exists() and "Traceback" not in err, err
    assert command("mix", "m.yaml", "bad", "--no-verify")[0] == 0
