"What people write is read under limits: a value of a wrong kind is one sentence that names its key, never an error of Python."
import json, os
import pytest

from model_glue_nb.benchmarking.import_scores import ROWS, read_results, read_samples, read_scores
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError
from model_glue_nb.experiments.grids import read_grid
from model_glue_nb.gluing.recipe import mixture_spec, read_recipe
from model_glue_nb.merging.recipes import MergeRecipe, MergeSource, check_recipe_form
from model_glue_nb.mixing.mixture import read_mixture

ODD = (None, True, -1, 1.5, 10**400, float("nan"),
       "", "x", "a\0b", "\ud800", "y" * 5000, [], [1],
       [[]], {}, {"x": 1}, {"x": [None]})
MERGE = dict(merge_method="ties", base_model="a",
             models=["b", dict(model="c", parameters=dict(weight=.5, density=[.1, 1]))],
             parameters={"lambda": .9}, tokenizer=dict(source="union", pad_to_multiple_of=8), dtype="float16", seed=1)
SLICES = dict(merge_method="passthrough", slices=[dict(sources=[dict(model="a", layer_range=[0, 1])])])
RUN = dict(zoo="demo", suite="demo", tasks=["x"], search_questions=3, clusters=dict(threshold=.9, linkage="average"),
           merge=dict(methods=["linear"], strategy="coefficient", budget=5, options=dict(steps=3)),
           mixture=dict(level="model", router=dict(name="knn", k=3), dense_layers=0, max_experts=2), seed=1)
GRID = dict(suite="demo",
            merging=dict(methods=["linear"], strategies=dict(average={}), sizes=[2], budget=4, max_clusters=1),
            mixture=dict(levels=["ffn"], routers=["random"], dense_layers=[0], experts=2), seed=1)
MIXTURE_FORM = dict(experts=["a", "b"], router=dict(name="linear"), level="model", top_k=1, copy=False)
SUITE = dict(name="s", search_share=.4, seed=1,
             tasks=[dict(name="t", file="q.jsonl", max_new_tokens=3, stop=["."], weight=1., limit=4)])
RESULTS = {"results": {"arc": {"acc,none": .5}}, "n-samples": {"arc": {"effective": 9}}, "versions": {"arc": 1},
           "config": {"model_args": "x"}, "model_name": "m"}
READERS = dict(merge=(MERGE, lambda f: check_recipe_form(MergeRecipe.from_yaml(f))),
               slices=(SLICES, lambda f: check_recipe_form(MergeRecipe.from_yaml(f))),
               run=(RUN, read_recipe), grid=(GRID, read_grid), mixture=(MIXTURE_FORM, read_mixture), suite=(SUITE, load_suite),
               results=(RESULTS, read_results))

def changed(value, odd):
    "A document with each of its values replaced in turn."
    yield odd
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        for x in changed(v, odd):
            out = value.copy()
            out[k] = x
            yield out

def refused(call, *args):
    "The message of an InputError, or None where the value was taken."
    try: call(*args)
    except InputError as e: return str(e)

@pytest.fixture
def questions(tmp_path):
    (tmp_path/"q.jsonl").write_text("".join(json.dumps(dict(question=f"q{i}", answer=i)) + "\n" for i in range(30)))
    return tmp_path

@pytest.mark.parametrize("kind", READERS)
def test_every_value_of_every_wrong_kind_is_taken_or_refused_in_words(kind, questions):
    document, read = READERS[kind]
    file = questions/("results.json" if kind == "results" else "x.yaml")
    messages = []
    file.write_text(json.dumps(document))
    assert refused(read, file) is None
    for odd in ODD:
        for d in changed(document, odd):
            file.write_text(json.dumps(d))
            messages.append(refused(read, file))
    said = [m for m in messages if m]
    assert len(said) > len(messages) / 3
    assert max(len(line) for m in said for line in m.splitlines()) < 1000

@pytest.mark.parametrize("raw", (b"caf\xe9: 1\n", b"\xff\xfea\x00", b"", b"\x00", b"[" * 3000, b"a: &a [*a]", b"- 1\n", b"\x1b[0m", b"a: !!python/object:os.x {}",
                                 b"a: 1\n---\nb: 1\n", b"x" * 2**19, b"{" * 60 + b"}" * 60, b"0x" + b"f" * 5000))
@pytest.mark.parametrize("kind", READERS)
def test_bytes_that_are_no_document_are_refused(kind, raw, questions):
    file = questions/("results.json" if kind == "results" else "x.yaml")
    file.write_bytes(raw)
    if kind == "grid" and not raw: return # an empty grid is the default one
    assert refused(READERS[kind][1], file)

def test_a_value_is_shown_short_even_where_it_stands_for_millions(questions):
    bomb = "&a [" + "x," * 9 + "]\n" + "".join(f"k{i}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 8)}]\n" for i in range(3))
    (questions/"x.yaml").write_text("merge_method: " + bomb)
    assert len(refused(MergeRecipe.from_yaml, questions/"x.yaml")) < 3000
    said = refused(read_recipe, dict(clusters=["x" * 10**6]))
    assert "clusters is ['xxx" in said and len(said) < 200

@pytest.mark.parametrize("weight",
                         ([], [[1]], [dict(filter="mlp")],
                          [dict(value=None)], [dict(value=1), .5],
                          [dict(value=[])],
                          [dict(value=1, filter=3)],
                          [dict(value=1, other=2)], float("inf"),
                          10**400, "half", dict(value=1)))
def test_weights_of_no_form_are_refused(weight):
    assert len(check_recipe_form(MergeRecipe("linear", (MergeSource("a", weight),)))) == 1

def test_recipes_within_recipes_end(questions):
    d = dict(merge_method="linear", models=["a"])
    for _ in range(20): d = dict(merge_method="linear", models=[dict(model=d)])
    (questions/"x.yaml").write_text(json.dumps(d))
    assert "nests more than 16" in refused(MergeRecipe.from_yaml, questions/"x.yaml")

@pytest.mark.parametrize("weight, read",
                         (("'0.5'", .5), ("['0', 1]", [0, 1]), ("{value: '2'}", [dict(value=2)]), ("true", True)))
def test_what_mergekit_reads_is_read(weight, read):
    r = MergeRecipe.from_yaml(f"name: mine\nx-more: 1\nmerge_method: linear\nmodels: [{{model: a, parameters: {{weight: {weight}}}}}]\n")
    assert r.models[0].weight == read and not check_recipe_form(r)

def test_a_recipe_that_pads_without_a_tokenizer_is_read_back():
    r = MergeRecipe("linear", (MergeSource("a"),), pad_to_multiple_of=8)
    assert MergeRecipe.from_yaml(r.to_yaml()) == r

@pytest.mark.parametrize("router, name",
                         (("knn", "knn"), (dict(name="knn", k=8), "knn"), (dict(name="mlp", seed=5), "mlp")))
def test_a_run_takes_a_router_with_settings(router, name):
    r = read_recipe(dict(mixture=dict(router=router), seed=2))
    spec = mixture_spec(r, ["a", "b"])
    assert spec.router["name"] == name
    if name == "mlp": assert spec.router["seed"] == 5

@pytest.mark.parametrize("router",
                         ([1], None, 5, dict(k=8), dict(name=["knn"]),
                          dict(name="knn", q=1), dict(name="nkn")))
def test_a_run_refuses_what_is_no_router(router):
    assert refused(read_recipe, dict(mixture=dict(router=router)))

@pytest.mark.parametrize("table", (b"", b"\n", b"model,arc\n", b"model,arc\na,x\n", b"m,arc,arc.1\na,1\0,2\n", b"model,arc\na,1\na,2\n",
    b"model,task,score\na,arc,1\na,arc,2\n", b'model,arc\n"a,1\n', b"model,arc\na,1,2,3\nb,1\n", b"model," + b"x," * 5000 + b"\n",
    b"model,arc\n" + b"a,1\n" * (ROWS + 1)), ids=str)
def test_tables_that_are_none_are_refused(table, tmp_path):
    (tmp_path/"t.csv").write_bytes(table[:2**20])
    assert refused(read_scores, tmp_path/"t.csv")

def test_tables_of_other_encodings_are_read(tmp_path):
    for encoding in ("utf-16", "utf-8-sig", "latin-1"):
        (tmp_path/"t.csv").write_text("model,café\né,0.5\n", encoding=encoding)
        assert read_scores(tmp_path/"t.csv").loc["é", "café"] == .5

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/"x.yaml")
    for read in (MergeRecipe.from_yaml, read_recipe, read_grid, read_mixture, load_suite):
        assert refused(read, tmp_path/"x.yaml")
    assert refused(read_scores, tmp_path/"x.yaml")

@pytest.mark.parametrize("line",
                         ("5", "{}", "[" * 3000, '{"doc_hash": 1}', json.dumps(dict(doc_hash="a", prompt_hash="b", target_hash="c", filtered_resps=5)),
                          json.dumps(dict(doc_hash="a", prompt_hash="b", target_hash="c", filtered_resps=[], metrics=[["x"]], filter="none"))),
                         ids=lambda x: x[:30])
def test_answers_that_are_none_are_refused(line, tmp_path):
    (tmp_path/"s.jsonl").write_text(line)
    assert refused(read_samples, tmp_path/"s.jsonl", set())
