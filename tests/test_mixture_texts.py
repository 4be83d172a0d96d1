"Routers that read texts: refused where routers sit inside a checkpoint, counted where their encoder stands beside the experts; and weights count at every level."
from types import SimpleNamespace

import numpy as np
import pytest

from model_glue_nb.benchmarking.intervals import ItemScores
from model_glue_nb.benchmarking.suites import Question, Suite, Task
from model_glue_nb.core import InputError
from model_glue_nb.gluing.comparison import size
from model_glue_nb.gluing.recipe import read_recipe
from model_glue_nb.mixing.mixture import mix
from model_glue_nb.mixing.spec import MixtureSpec, check_mixture_spec
from model_glue_nb.zoo.zoo import Zoo, tiny_tokenizer, tiny_zoo

WORDS = ["w3 w4 w5", "w20 w21 w22"]

@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(tmp_path_factory.mktemp("zoo"), ["base", "a", "b"], dtype="float32")

@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    import torch, transformers
    room = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=40)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(room)
    tiny_tokenizer().save_pretrained(room)
    return room

def suite(weight_of_y=1.0):
    "Two tasks of one question text each, in which other experts are right."
    def task(name, words, n, weight):
        return Task(name, tuple(Question(f"{words} w{30 + i}", "w3") for i in range(n)), 2, weight=weight)
    return Suite("toy", (task("x", "w3 w4", 12, 1.0), task("y", "w3 w4", 4, weight_of_y)))

TEXTS = [dict(router=dict(name="tfidf_knn")),
         dict(router=dict(name="sentence_kmeans")),
         dict(router=dict(name="knn"), features="sentence")]

@pytest.mark.parametrize("more", TEXTS, ids=str)
@pytest.mark.parametrize("where",
                         [dict(level="model", base="base"),
                          dict(level="model", base="base", dense_layers=1),
                          dict(level="block", base="base"),
                          dict(level="ffn", base="base", input="token")],
                         ids=str)
def test_inside_a_checkpoint_nobody_reads_texts(zoo, tmp_path, more, where):
    spec = MixtureSpec(("a", "b"), **more, **where)
    out = check_mixture_spec(spec)
    assert len(out) == 1 and "reads texts" in out[0] and "hidden states" in out[0]
    with pytest.raises(InputError, match="reads texts"): mix(spec, zoo, tmp_path/"m", suite())
    assert not (tmp_path/"m").exists()
    assert not check_mixture_spec(MixtureSpec(("a", "b"), **more)), "beside whole experts they may"

@pytest.mark.parametrize("mixture",
                         [dict(level="block", router="tfidf_knn"),
                          dict(level="model", dense_layers=1, router="sentence_kmeans"),
                          dict(base="base", router="knn", features="sentence")],
                         ids=str)
def test_a_recipe_says_so_before_anything_is_opened(mixture):
    with pytest.raises(InputError, match="reads texts"): read_recipe(dict(mixture=mixture))

def test_a_fitted_router_of_texts_is_refused_too(zoo, tmp_path):
    part = suite()
    items = {"a": values(1, 0), "b": values(0, 1)}
    mix(MixtureSpec(("a", "b"), dict(name="tfidf_knn")), zoo, tmp_path/"apart", part, items=items)
    spec = MixtureSpec(("a", "b"), dict(file=str(tmp_path/"apart")), base="base")
    with pytest.raises(InputError, match="reads texts"): mix(spec, zoo, tmp_path/"one")

def values(x, y):
    return ItemScores(dict(x=np.full(12, float(x)), y=np.full(4, float(y))))

@pytest.mark.parametrize("where",
                         [{}, dict(base="base", level="block"), dict(base="base", level="ffn"), dict(base="base", dense_layers=1)],
                         ids=str)
def test_a_tasks_weight_counts_at_every_level(zoo, tmp_path, where):
    "One kind of prompt: a is right on the 12 of x, b on the 4 of y. Who is sent them all depends on what y weighs."
    items = {"a": values(1, 0), "b": values(0, 1)}
    for name, weight, wanted in (("light", .5, 0), ("heavy", 40.0, 1)):
        router = dict(name="kmeans", clusters=1)
        m = mix(MixtureSpec(("a", "b"), router, **where), zoo, tmp_path/f"{name}", suite(weight), items=items)
        route = np.asarray(m.load().route(["w3 w4 w33", "w3 w4 w40"]))
        assert (route == wanted).all(), (weight, route)

def test_the_encoder_counts_among_the_parameters(zoo, encoder, tmp_path):
    from model_glue_nb.mixing.sentences import open_encoder
    items = {"a": values(1, 0), "b": values(0, 1)}
    own = {n: zoo[n].n_params for n in "ab"}
    router = dict(name="sentence_kmeans", clusters=2, encoder=str(encoder))
    reading = mix(MixtureSpec(("a", "b"), router), zoo, tmp_path/"reading", suite(), items=items)
    plain = mix(MixtureSpec(("a", "b"), dict(name="knn")), zoo, tmp_path/"plain", suite(), items=items)
    work = SimpleNamespace(zoo=Zoo((reading, plain)))
    extra = open_encoder(str(encoder)).n_params
    assert size(work, "reading") == (sum(own.values()) + extra, max(own.values()) + extra) and extra > 1000
    assert size(work, "plain") == (sum(own.values()), max(own.values()))
