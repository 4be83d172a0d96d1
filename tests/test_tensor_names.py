"Canonical names against transformers itself: both eras of every architecture load to the same weights."
import json, math, sys
from pathlib import Path

import numpy as np
import pytest

from model_glue_nb.checkpoints.architectures import all_facts
from model_glue_nb.checkpoints.headers import TensorInfo, read_header
from model_glue_nb.checkpoints.tensor_names import canonical_tensors, naming, to_file, to_memory
from model_glue_nb.errors import InputError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import certificate

sys.path.pop(0)
# Families with tables of their own: renamed, fused, joined along rows, with prefixes
KINDS = """gpt_neox mixtral qwen2_moe qwen3_moe olmoe granitemoe glm4_moe qwen3_next aria_text afmoe phimoe jamba nemotron_h
deepseek_v4 kimi_linear olmo_hybrid minimax_m2 ernie4_5_moe llama gpt2 hrm_text qwen3_5_text""".split()


def written(t, model):
    "A tensor's values by where it lies."
    item = (t.stop - t.start) // max(t.n_values, 1)
    raw = np.fromfile(t.file, np.uint8, t.stop - t.start, offset=t.start)
    return raw.view({4: np.float32, 2: np.uint16, 8: np.int64, 1: np.uint8}[item]).reshape(
        t.shape)


def stored(folder):
    "Config and tensors of a folder."
    return json.loads((folder/"config.json").read_text()), read_header(folder/"model.safetensors")


@pytest.fixture(scope="module", params=KINDS)
def eras(request, tmp_path_factory):
    "One model in both eras: as transformers writes it by default, and by the names it has in memory."
    folder = tmp_path_factory.mktemp(request.param)
    try: model = certificate.tiny_model(request.param, 0)
    except Exception as e: pytest.skip(f"transformers doesn't build it: {e}")
    model.save_pretrained(folder/"file")
    model.save_pretrained(folder/"memory", save_original_format=False)
    return model, folder


def test_both_eras_have_the_same_weights_under_the_same_names(eras):
    model, folder = eras
    file, memory = (canonical_tensors(*stored(folder/n)) for n in ("file", "memory"))
    if model.config.model_type == "hrm_text": # its files hold what is apart in memory; both names load
        assert not any("gqkv_proj" in k for k in memory)
        return
    assert list(map(str, sorted(file))) == sorted(memory)
    for name, t in file.items():
        assert t.name == name and t.shape == memory[name].shape, name
        assert np.array_equal(written(t, folder), written(memory[name], folder)), name


def test_files_of_today_keep_their_names(eras):
    _, folder = eras
    config, tensors = stored(folder/"file")
    assert list(canonical_tensors(config, tensors)) == list(tensors)


def test_without_the_base_models_prefix(eras):
    model, folder = eras
    prefix, (config, tensors) = model.base_model_prefix, stored(folder/"file")
    base = {k.removeprefix(f"{prefix}."): t for k, t in tensors.items()}
    if not prefix or base.keys() == tensors.keys(): pytest.skip("no prefix")
    got = canonical_tensors(config | dict(architectures=[type(model.base_model).__name__]), base)
    assert list(got) == list(tensors)


@pytest.mark.parametrize("name", [k for k, v in all_facts()["classes"].items() if v["steps"] and v.get("tree")])
def test_names_in_memory_come_back(name):
    "Every name in memory that no conversion makes goes to a file's name and back."
    tables, lost = naming(name), []
    for memory in leaves(tables.tree):
        if any(s.match(memory) for s in tables.splits): continue
        there = to_memory(naming(name), to_file(naming(name), memory))
        if there[0] != memory: lost.append((memory, to_file(naming(name), memory), there[0]))
    assert not lost, lost[:5]


def leaves(tree, path=()):
    "Names of a tree, with 1 for every number."
    for k, v in tree.items():
        if k == "": yield from (".".join((*path, leaf)) for leaf in v)
        else: yield from leaves(v, (*path, "1" if k == "*" else k))


def test_our_steps_are_transformers_steps():
    "The same renaming for every class and name as transformers' own, on names of files and of memory."
    from transformers.core_model_loading import WeightRenaming
    for i, (kind, sources, targets, *_) in all_facts()["steps"].items():
        if kind != "rename": continue
        from model_glue_nb.checkpoints.tensor_names import NameStep, renamed
        ours, theirs = NameStep("rename", sources, targets), WeightRenaming(list(sources), list(targets))
        for text in ("model.layers.3.attn.proj.weight", "visual.blocks.1.norm1.bias", *sources, *targets):
            name = text.replace("\\.", ".").replace("^", "").replace("(\\d+)", "7").replace("\\d+", "7")
            assert renamed(ours, name) == theirs.rename_source_key(name)[0], (i, name)


def test_a_weight_that_stands_twice_is_refused():
    def t(name, *shape): return TensorInfo(name, "F32", shape, Path("x"), 0, 4 * math.prod(shape))
    fused = t("model.layers.0.mlp.experts.down_proj", 2, 4, 3)
    one = t("model.layers.0.block_sparse_moe.experts.1.w2.weight", 4, 3)
    with pytest.raises(InputError, match="are both 'model.layers.0.block_sparse_moe.experts.1.w2.weight'"):
        canonical_tensors(dict(model_type="mixtral"), {x.name: x for x in (fused, one)})


@pytest.mark.parametrize("shape",
                         [(), (0,), (2,),
                          (0, 4, 4), (2, 5, 3),
                          (2, 0, 3), (3, 2, 2, 2)])
def test_odd_shapes_lose_nothing(shape):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    t = TensorInfo(name, "F32", shape, Path("x"), 0, 4 * math.prod(shape))
    got = canonical_tensors(dict(model_type="mixtral"), {name: t})
    assert got and sum(x.n_values for x in got.values()) == t.n_values
    assert max(x.stop for x in got.values()) == t.stop
