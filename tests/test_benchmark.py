"Scores: agreement with lm-eval's command line, a store that several processes and kills cannot harm, bad input."
import json, os, re, sqlite3, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np, pytest, yaml
from forked import MAIN, Forked, python
from forked import command as forked_command
from model_glue_nb.benchmarking.import_scores import published_scores, read_results
from model_glue_nb.benchmarking.intervals import ItemScores, rank_models
from model_glue_nb.benchmarking.scores import ask_model, lm_eval_task, plan_scores, scores_table
from model_glue_nb.benchmarking.suites import EvalTask, load_suite
from model_glue_nb.core import InputError
from model_glue_nb.store import Asked, Store
from model_glue_nb.zoo.zoo import demo_zoo_path, read_zoo, tiny_zoo

ASKED = Asked("sums", "v1", "exact_match")

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()/"cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

def command(*args, **env):
    return forked_command(*args, env=os.environ | env)

LETTERS = [("sort DCBA =", "ABCD"), ("sort CAB =", "ABC"), ("put FED in order =", "DEF"), ("advance ABC by one step =", "BCD")]

def tasks_folder(room, n=40):
    "One task of each of lm-eval's kinds, in the words of the embedded zoo."
    room.mkdir(exist_ok=True)
    own = load_suite("demo").part("report", n).only(["sort", "shift"])
    for t in own.tasks: (room/f"{t.name}.yaml").write_text(yaml.safe_dump(lm_eval_task(t, room)))
    rows = [dict(q=q.prompt, a=q.answer,
                 b=q.answer[::-1],
                 c=q.answer[1:] + q.answer[:1])
            for t in own.tasks
            for q in t.questions]
    (room/"all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(room/"all.jsonl"), train=str(room/"all.jsonl"))), test_split="test")
    choose = data | dict(task="choose", output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{[b, a, c]}}", doc_to_target=1,
                         target_delimiter="", fewshot_split="train", num_fewshot=1, fewshot_delimiter=" ",
                         metric_list=[dict(metric="acc"), dict(metric="acc_norm")])
    read = data | dict(task="read", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{q}}{{a}}",
                       metric_list=[dict(metric=m) for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")])
    for c in (choose, read): (room/f"{c['task']}.yaml").write_text(yaml.safe_dump(c))
    names = ["sort", "shift", "choose", "read"]
    (room/"suite.yaml").write_text(yaml.safe_dump(dict(name="kinds", tasks=[dict(name=n, task=f"{n}.yaml") for n in names])))
    return names

@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    "What lm-eval's own command line says of one model on tasks of every kind."
    room = tmp_path_factory.mktemp("agree")
    names = tasks_folder(room/"tasks")
    args = ["--model", "hf", "--model_args", f"pretrained={demo_zoo_path()/'a-sort'},dtype=float32", "--tasks", ",".join(names), "--device", "cpu",
            "--include_path", room/"tasks", "--output_path", room/"out", "--log_samples", "--batch_size", "8"]
    done = python("import runpy; runpy.run_module('lm_eval', run_name='__main__')", *args, cwd=room,
                  env=os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(room/"cache")})
    assert done.returncode == 0, done.stderr[-2000:]
    return room

def test_scores_agree_with_lm_evals_command_line(theirs):
    suite = load_suite(theirs/"tasks/suite.yaml")
    store = Store(theirs/"store.sqlite")
    model = read_zoo("demo")["a-sort"]
    ask_model(model, suite, store, batch_size=8)
    n = 0
    for r in read_results(theirs/"out").itertuples():
        t = next(t for t in suite.tasks if t.name == r.task)
        entry = dict(name="t", task=t.source.task, metric=r.metric)
        (theirs/"tasks/one.yaml").write_text(yaml.safe_dump(dict(tasks=[entry])))
        one = load_suite(theirs/"tasks/one.yaml")
        table = scores_table({"m": ask_model(model, one, store)}, "all", one)
        if t.kind == "loglikelihood_rolling": assert table.score[0] == pytest.approx(r.score, rel=1e-12)
        else: assert table.score[0] == r.score
        assert table.n[0] == r.n == len(t.questions)
        n += 1
    assert n == 7

@pytest.mark.parametrize("limit", [2048, 12, 5])
def test_logits_of_the_last_positions_score_like_all(limit, tmp_path, monkeypatch):
    "Random requests, with shared contexts and one-token continuations, some longer than the context."
    from lm_eval.models.huggingface import HFLM
    from model_glue_nb.benchmarking.harness import as_lm_eval
    live = tiny_zoo(tmp_path)["a"].load()
    lm = as_lm_eval(live)
    rng = np.random.default_rng(0)
    asked = []
    theirs = HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=1)
    lm._max_length = theirs._max_length = limit
    def context(): return rng.integers(5, 60, rng.integers(1, 20)).tolist()
    requests = [((str(i), str(j)), c, rng.integers(5, 60, n).tolist())
                for i in range(12)
                for c in [context()]
                for j, n in enumerate((1, 1, 1, *rng.integers(1, 5, 2)))]
    forward = live.model.forward
    def watched(*a, logits_to_keep=None, **k):
        asked.append((a[0].numel(), logits_to_keep))
        return forward(*a, logits_to_keep=logits_to_keep, **k)
    monkeypatch.setattr("model_glue_nb.benchmarking.harness.keeps_logits", lambda model: True)
    monkeypatch.setattr(live.model, "forward", watched)
    ours = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert asked and all(kept for _, kept in asked) and sum(n for n, _ in asked) > len(requests)
    monkeypatch.setattr(live.model, "forward", forward)
    expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    for (x, same), (y, other) in zip(ours, expected, strict=True):
        assert x == pytest.approx(y, abs=1e-4) and same == other

def test_own_tasks_agree_too(theirs):
    "The demo suite is asked without lm-eval, in batches of equal length; the answers are the same."
    own = load_suite("demo").part("report", 40).only(["sort", "shift"])
    model = read_zoo("demo")["a-sort"]
    table = scores_table({"m": ask_model(model, own)}, "report").set_index("task").score
    said = read_results(theirs/"out", dict(sort="exact_match", shift="exact_match")).set_index("task").score
    assert table["sort"] == said["sort"] > .9 and table["shift"] == said["shift"]

def test_batches_by_tokens_give_the_same_scores(theirs):
    suite, model = load_suite(theirs/"tasks/suite.yaml"), read_zoo("demo")["a-sort"]
    one, auto = (ask_model(model, suite, batch_size=b) for b in (1, "auto"))
    for t in suite.tasks: np.testing.assert_allclose(auto[t.name], one[t.name], rtol=1e-5)

def test_answers_of_the_command_line_are_taken_over(theirs):
    run = theirs/"taken"
    first = command("score", demo_zoo_path()/"a-sort", "--suite", theirs/"tasks/suite.yaml", "--split", "all", "--out", run, "--dry-run", "--json")
    assert all(r["remembered"] == 0 for r in json.loads(first.stdout)) and not run.exists()
    taken = command("import", theirs/"out", "--model", demo_zoo_path()/"a-sort", "--suite", theirs/"tasks/suite.yaml", "--json")
    assert taken.returncode == 0, taken.stderr
    assert all(r["imported"] == r["questions"] for r in json.loads(taken.stdout)), taken.stdout

# ---- the store
def write_many(args):
    path, who = args
    store = Store(path)
    for i in range(40):
        store.add_items(f"model {who % 3}", ASKED, {f"q{who} {i} {j}": (1., "x") for j in range(5)})
        store.add_responses("m", {f"{who} {i}": "1"})
        store.remember("fact", "k", who)
    return len(store.items(f"model {who % 3}", ASKED))

def test_several_processes_write_at_once(tmp_path):
    with ProcessPoolExecutor(6) as pool:
        assert all(n >= 200 for n in pool.map(write_many, [(tmp_path/"s.sqlite", i) for i in range(6)]))
    store = Store(tmp_path/"s.sqlite")
    assert sum(len(store.items(f"model {k}", ASKED)) for k in range(3)) == 6 * 40 * 5 and len(store.responses("m")) == 240
    assert store.db.execute("pragma integrity_check").fetchone() == ("ok",) and store.db.execute("pragma journal_mode").fetchone() == ("wal",)

def test_several_processes_find_a_corrupt_store(tmp_path):
    path = tmp_path/"s.sqlite"
    path.write_bytes(b"no database" * 999)
    with ProcessPoolExecutor(4) as pool:
        assert all(n >= 200 for n in pool.map(write_many, [(path, i) for i in range(4)]))
    assert sum(len(Store(path).items(f"model {k}", ASKED)) for k in range(3)) == 4 * 40 * 5
    assert len(list(tmp_path.glob("s.corrupt-*"))) == 1, "one process sets it aside, the others use the new one"

def test_a_corrupt_store_is_said_and_scored_again(tmp_path):
    tasks_folder(tmp_path/"t", 6)
    args = ("score", demo_zoo_path()/"a-sort", "--suite", tmp_path/"t/suite.yaml", "--out", tmp_path/"run", "--split", "all", "--json")
    first = command(*args)
    assert first.returncode == 0, first.stderr
    (tmp_path/"run/store.sqlite").write_bytes(b"\0" * 5000)
    for end in ("-wal", "-shm"): (tmp_path/f"run/store.sqlite{end}").unlink(missing_ok=True)
    again = command(*args)
    assert again.returncode == 0 and again.stdout == first.stdout
    assert "was corrupt" in again.stderr and "is kept as" in again.stderr and list((tmp_path/"run").glob("store.corrupt-*"))

def test_killed_it_goes_on_and_ends_with_the_same_table(tmp_path):
    tasks_folder(tmp_path/"t", 150)
    model = demo_zoo_path()/"a-sort"
    run = tmp_path/"run"
    args = ["score", str(model), "--suite", str(tmp_path/"t/suite.yaml"), "--split", "all", "--json", "--batch-size", "4"]
    p = Forked(MAIN, *args, "--out", run)
    def kept():
        return sqlite3.connect(run/"store.sqlite", timeout=30).execute("select count(*) from responses").fetchone()[0]
    for _ in range(1200):
        time.sleep(.05)
        try:
            if p.poll() is not None or (run/"store.sqlite").exists() and kept() > 0: break
        except sqlite3.OperationalError: pass # the tables are not there yet
    assert p.poll() is None, "it ended before it could be killed"
    p.kill()
    p.end()
    assert kept() > 0
    after, whole = command(*args, "--out", run), command(*args, "--out", tmp_path/"whole")
    assert after.returncode == 0, after.stderr
    def same(a, b): # batches differ after a kill
        return a == pytest.approx(b, rel=1e-6) if isinstance(a, float) else a == b
    for a, b in zip(json.loads(after.stdout), json.loads(whole.stdout), strict=True):
        assert all(same(a[k], b[k]) for k in a)
    assert kept() == 0, "responses whose questions have results are dropped"

def test_a_second_call_loads_no_model_and_no_harness(tmp_path):
    tasks_folder(tmp_path/"t", 6)
    args = ("score", demo_zoo_path()/"a-sort", "--suite", tmp_path/"t/suite.yaml", "--out", tmp_path/"run", "--json")
    assert command(*args).returncode == 0
    code = f"import sys; sys.argv = ['model-glue', *{list(map(str, args))!r}]\ntry: {MAIN}\nfinally: print(*[m for m in ('torch', 'transformers', 'lm_eval', 'datasets') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code.replace("; main()\nfinally", "; main()\nfinally")], text=True, capture_output=True)
    assert (done.returncode == 0 and "0 to ask" in done.stderr
            and not done.stderr.strip().splitlines()[-1].startswith(("torch", "trans", "lm_eval"))), done.stderr

# ---- each request by its own arguments
def generation_tasks(room):
    "Tasks that generate under unlike arguments: words, length, neither, another name for the length, longer than the context."
    room.mkdir()
    own = load_suite("demo").part("report", 8).only(["sort", "shift"])
    rows = [dict(q=q.prompt, a=q.answer) for t in own.tasks for q in t.questions]
    (room/"q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test="q.jsonl")), test_split="test", output_type="generate_until",
                doc_to_text="{{q}}", doc_to_target="{{a}}", metric_list=[dict(metric="exact_match")])
    asked = dict(first=dict(until=["\n"], max_gen_toks=12),
                 letters=dict(until=["C", "D"], max_gen_toks=12),
                 short=dict(until="\n", max_gen_toks=2),
                 unsaid=dict(until="\n", do_sample=False, temperature=.5), other_word=dict(until=["\n"], max_new_tokens=3),
                 empty=dict(until=["\n", ""], max_gen_toks=9), none=None)
    for name, how in asked.items():
        (room/f"{name}.yaml").write_text(yaml.safe_dump(base | dict(task=name) | (dict(generation_kwargs=how) if how else {})))
    (room/"long.yaml").write_text(yaml.safe_dump(base | dict(task="long", doc_to_text="sort A = A " * 60 + "{{q}}", generation_kwargs=asked["first"])))
    tasks = [dict(name=n, task=f"{n}.yaml") for n in (*asked, "long")]
    (room/"s.yaml").write_text(yaml.safe_dump(dict(tasks=tasks)))
    return load_suite(room/"s.yaml")

@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_a_system_of_one_model_scores_as_that_model(order, tmp_path):
    from model_glue_nb.benchmarking.harness import as_lm_eval, evaluate
    tasks = generation_tasks(tmp_path/"t").tasks[::1 if order == "forwards" else -1]
    live = read_zoo("demo")["a-sort"].load()
    live.model.config.max_position_embeddings = 300 # a request that names no length wants 256
    class System:
        model, tokenizer, calls = live.model, live.tokenizer, []
        def generate(self, prompts, max_new_tokens, stop):
            self.calls.append((max_new_tokens, tuple(stop)))
            return live.generate(prompts, max_new_tokens, stop)
    alone, alone_cut = evaluate(as_lm_eval(live), tasks, "m")
    system, system_cut = evaluate(as_lm_eval(System()), tasks, "m")
    assert alone == system, "every value and every answer"
    assert alone_cut == system_cut and set(alone_cut) == {"long"}
    assert len(set(System.calls)) >= 6 and {n for n, _ in System.calls} == {1, 2, 3, 12, 256}
    assert len({json.dumps(r, sort_keys=True) for r in system}) >= 4, "the tasks' answers differ, so that a mix-up would show"

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}={% endif %}"

def chat_member(room, template=TEMPLATE):
    "A copy of a member with a chat template, or without one."
    import shutil
    shutil.copytree(demo_zoo_path()/"a-sort", room)
    if template: (room/"chat_template.jinja").write_text(template)
    return read_zoo([room])

@pytest.mark.parametrize("more",
                         [{}, dict(apply_chat_template=True), dict(apply_chat_template=True, system_instruction="sort BA = AB"), dict(system_instruction="sort BA = AB")],
                         ids=str)
def test_a_mixture_of_one_scores_as_that_expert(more, tmp_path):
    "Unlike generation tasks, a choice and an own task, bare and in conversations: every value and answer."
    from model_glue_nb.benchmarking.harness import as_lm_eval, evaluate
    from model_glue_nb.mixing.mixture import mix
    from model_glue_nb.mixing.spec import MixtureSpec
    generation_tasks(tmp_path/"t")
    zoo = chat_member(tmp_path/"tuned")
    member = next(iter(zoo))
    tasks_folder(tmp_path/"u", 6)
    given = yaml.safe_load((tmp_path/"t/s.yaml").read_text())
    given["tasks"] = ([t for t in given["tasks"] if t["name"] not in ("unsaid", "none")]
                      + [dict(name="choose", task=str(tmp_path/"u/choose.yaml"))])
    (tmp_path/"t/s.yaml").write_text(yaml.safe_dump(given | more))
    suite = load_suite(tmp_path/"t/s.yaml")
    live = mix(MixtureSpec((member.name,), dict(name="random")), zoo, tmp_path/"m").load()
    alone, _ = evaluate(as_lm_eval(member.load()), suite.tasks, "m")
    mixed, _ = evaluate(as_lm_eval(live), suite.tasks, "x")
    assert alone == mixed and len({json.dumps(r, sort_keys=True) for r in alone}) >= 4

def test_conversations_are_asked_as_lm_eval_asks_them(tmp_path):
    "The harness against lm-eval's own evaluation with the same switches."
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from model_glue_nb.benchmarking.harness import as_lm_eval, evaluate
    tasks_folder(tmp_path/"t", 8)
    member = next(iter(chat_member(tmp_path/"tuned")))
    live = member.load()
    how = dict(apply_chat_template=True, system_instruction="sort BA = AB", fewshot_as_multiturn=True)
    (tmp_path/"t/s.yaml").write_text(
        yaml.safe_dump(dict(tasks=[dict(name=n, task=f"{n}.yaml") for n in ("sort", "choose")]) | how))
    suite = load_suite(tmp_path/"t/s.yaml")
    found, _ = evaluate(as_lm_eval(live, 4), suite.tasks, "m")
    plain = load_suite(dict_suite(tmp_path, ("sort", "choose")))
    assert [t.fingerprint() for t in plain.tasks] != [t.fingerprint() for t in suite.tasks]
    assert all(q.prompt == p.prompt.split("=")[-2].strip().split()[-1] or q.prompt.endswith("=")
               for t, u in zip(suite.tasks, plain.tasks)
               for q, p in zip(t.questions, u.questions))
    said = lm_eval.simple_evaluate(HFLM(pretrained=live.model, tokenizer=live.tokenizer, batch_size=4), tasks=["sort", "choose"], bootstrap_iters=0,
                                   task_manager=TaskManager(include_path=str(tmp_path/"t"), include_defaults=False), random_seed=None, numpy_random_seed=None, torch_random_seed=None, **how)["results"]
    for t, rows in zip(suite.tasks, found):
        for metric in ("exact_match,none", "acc,none", "acc_norm,none"):
            if metric in rows:
                assert np.mean([v for v, _ in rows[metric].values()]) == pytest.approx(said[t.name][metric])

def dict_suite(room, names):
    (room/"t/plain.yaml").write_text(yaml.safe_dump(dict(tasks=[dict(name=n, task=f"{n}.yaml") for n in names])))
    return room/"t/plain.yaml"

def test_a_missing_template_is_one_line(tmp_path):
    tasks_folder(tmp_path/"t", 6)
    (tmp_path/"t/s.yaml").write_text("apply_chat_template: true\ntasks: [{task: sort.yaml}]\n")
    member = next(iter(chat_member(tmp_path/"bare", None)))
    with pytest.raises(InputError, match="has no chat template, so it cannot be asked in conversations"):
        ask_model(member, load_suite(tmp_path/"t/s.yaml"))
    own = load_suite("demo", settings=dict(apply_chat_template=True)).part("search", 2)
    with pytest.raises(InputError, match="has no chat template"): ask_model(member, own)
    (tmp_path/"t/s.yaml").write_text("fewshot_as_multiturn: true\ntasks: [{task: sort.yaml}]\n")
    with pytest.raises(InputError, match="needs a conversation"): load_suite(tmp_path/"t/s.yaml")

def test_repeats_are_averaged(tmp_path):
    from model_glue_nb.benchmarking.harness import as_lm_eval, evaluate
    tasks_folder(tmp_path/"t", 6)
    (tmp_path/"t/s.yaml").write_text("tasks: [{task: sort.yaml, repeats: 4}]\n")
    suite = load_suite(tmp_path/"t/s.yaml")
    right, asked = {q.prompt: q.answer for q in suite.tasks[0].questions}, []
    class Sometimes:
        def generate(self, prompts, max_new_tokens, stop):
            asked.extend(prompts)
            return [right[p] if i % 4 else "" for i, p in enumerate(prompts)]
    (rows,), _ = evaluate(as_lm_eval(Sometimes()), suite.tasks, "m")
    values = [v for v, _ in rows["exact_match,none"].values()]
    assert len(asked) == 4 * len(right) and values == [.75] * len(right)

def test_sampling_is_passed_on_or_refused():
    from types import SimpleNamespace
    from model_glue_nb.benchmarking.harness import as_lm_eval
    def ask(text, **how): return SimpleNamespace(args=(text, how))
    got = []
    class Greedy:
        def generate(self, prompts, max_new_tokens, stop):
            got.append("asked")
            return ["x"] * len(prompts)
    class Sampler:
        def generate(self, prompts, max_new_tokens, stop, do_sample=False, temperature=1.):
            got.append((do_sample, temperature))
            return ["x"] * len(prompts)
    mixed = [ask("a", until="\n"), ask("b", until="\n", do_sample=True, temperature=.8)]
    with pytest.raises(InputError, match="do_sample: True.*greedily only.*leave it out"):
        as_lm_eval(Greedy()).generate_until(mixed)
    assert not got, "nothing is asked before everything can be"
    assert as_lm_eval(Sampler()).generate_until(mixed) == ["x", "x"] and got == [(False, 1.), (True, .8)]
    for how in (dict(num_beams=4), dict(repetition_penalty=1.2), dict(max_length=9)):
        with pytest.raises(InputError, match="greedily only"):
            as_lm_eval(Greedy()).generate_until([ask("a", **how)])
    for how in (dict(until=[3]), dict(max_gen_toks="x"), dict(max_gen_toks=-1), dict(temperature="hot")):
        with pytest.raises(InputError): as_lm_eval(Greedy()).generate_until([ask("a", **how)])

# ---- what a task file may run
PROGRAMS = """
import evaluate
pass_at_k = evaluate.load("code_eval")
def score(references, predictions, k=1): return pass_at_k.compute(references=references, predictions=predictions, k=[k])[0]["pass@1"]
def programs(resps, docs): return [[doc["q"] + r for r in resp] for resp, doc in zip(resps, docs)]
"""
TOUCH = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"

def task_of(room, name="own", python="", **more):
    "A task of two questions with Python beside it."
    room.mkdir(exist_ok=True)
    (room/"utils.py").write_text(TOUCH + python)
    (room/"q.jsonl").write_text('{"q": "def f(x):\\n", "t": "assert f(1) == 2"}\n{"q": "def f(x):\\n", "t": "assert f(1) == 3"}\n')
    base = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(room/"q.jsonl"))), test_split="test",
                output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{t}}", generation_kwargs=dict(until=["\n\n"], max_gen_toks=8))
    text = re.sub("'(!function [\\w.]+)'", r"\1", yaml.safe_dump(base | more)) # a tag, not a text
    (room/f"{name}.yaml").write_text(text)
    return room/f"{name}.yaml"

def suite_of(*files):
    (out := files[0].with_name("suite.yaml")).write_text(
        yaml.safe_dump(dict(tasks=[dict(task=str(f)) for f in files])))
    return out

def around(room):
    "Ways in which a task file could come to run something."
    bypass, f = [dict(metric="bypass")], "!function utils.f"
    yield task_of(room/"docs", process_docs=f, metric_list=bypass, python="def f(docs): return docs")
    yield task_of(room/"text", doc_to_text=f, metric_list=bypass, python="def f(doc): return 'x'")
    yield task_of(room/"importable", process_docs="!function shutil.rmtree", metric_list=bypass)
    yield task_of(room/"class", **{"class": "!function utils.C"}, python="class C: pass")
    yield task_of(room/"metric", metric_list=[dict(metric=f, aggregation="mean", higher_is_better=True)], python="def f(**k): return 1")
    yield task_of(room/"filter", metric_list=bypass,
                  filter_list=[dict(name="x", filter=[dict(function="custom", filter_fn=f)])],
                  python="def f(r, d): return r")
    (room/"above").mkdir()
    task_of(room/"above", "base", process_docs=f, metric_list=bypass, python="def f(docs): return docs")
    (room/"above/own.yaml").write_text("include: base.yaml\ntask: own\n")
    yield room/"above/own.yaml"
    task_of(room/"group", "member", process_docs=f, metric_list=bypass, python="def f(docs): return docs")
    (room/"group/all.yaml").write_text("group: everything\ntask: [member]\n")
    yield room/"group/all.yaml"
    yield task_of(room/"script", metric_list=[dict(metric="code_eval", hf_evaluate=True, aggregation="mean", higher_is_better=True)])
    (room/"folder").mkdir()
    (room/"folder/evil.py").write_text(TOUCH)
    evil = str(room/"folder")
    yield task_of(room/"folder", metric_list=[dict(metric=evil, aggregation="mean", higher_is_better=True)])
    yield task_of(room/"flag", metric_list=bypass, unsafe_code=True)
    task_of(room/"flags", "member", metric_list=bypass, unsafe_code=True)
    (room/"flags/all.yaml").write_text("group: flagged\ntask: [member]\n")
    yield room/"flags/all.yaml"

def test_a_task_file_runs_nothing_that_was_not_allowed(tmp_path):
    n = 0
    for file in around(tmp_path):
        with pytest.raises(InputError, match="--allow-code-execution"): load_suite(suite_of(file))
        assert not (file.parent/"ran").exists(), file
        n += 1
    assert n == 12
    file = task_of(tmp_path/"jinja", metric_list=[dict(metric="bypass")], doc_to_text="{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path/"ran") + "') }}")
    with pytest.raises(InputError, match="cannot be loaded .SecurityError"): load_suite(suite_of(file))
    assert not (tmp_path/"ran").exists()

def test_questions_read_with_permission_are_not_found_without(tmp_path):
    file = task_of(tmp_path/"t", process_docs="!function utils.f", metric_list=[dict(metric="exact_match")], python="def f(docs): return docs")
    s = load_suite(suite_of(file), run_code=lambda *a: True)
    assert s.n_questions == 2 and (tmp_path/"t/ran").exists()
    with pytest.raises(InputError, match="--allow-code-execution"): load_suite(suite_of(file))

def test_a_refusal_at_the_command_line(tmp_path):
    file = suite_of(task_of(tmp_path/"t", process_docs="!function utils.f", metric_list=[dict(metric="exact_match")], python="def f(docs): return docs"))
    r = command("score", demo_zoo_path()/"a-sort", "--suite", file, "--dry-run")
    assert r.returncode == 2 and "--allow-code-execution" in r.stderr and "Traceback" not in r.stderr and not (tmp_path/"t/ran").exists(), r.stderr

class Writer:
    "Writes one program for every prompt, and tells where it ran."
    def __init__(self, room):
        self.body = f"    import os\n    for p in ('/tmp', '/var/tmp', {str(room)!r}):\n        try: open(p + '/escaped', 'w').write(str(os.getuid()))\n        except OSError: pass\n    return x + 1"
    def generate(self, prompts, max_new_tokens, stop): return [self.body] * len(prompts)

@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
@pytest.mark.parametrize("when", ["import", "judging"])
def test_programs_of_a_model_run_in_the_sandbox(when, tmp_path):
    "Whenever a task loads code_eval: with its module, or when it judges."
    import evaluate
    from model_glue_nb.benchmarking.harness import as_lm_eval, evaluate as evaluate_tasks
    from model_glue_nb.benchmarking.sandbox import code_runner
    python = PROGRAMS if when == "import" else PROGRAMS.replace("\npass_at_k = evaluate.load(\"code_eval\")", "").replace("return pass_at_k", "return evaluate.load('code_eval')")
    how = dict(unsafe_code=True, filter_list=[dict(name="programs", filter=[dict(function="custom", filter_fn="!function utils.programs")])],
               metric_list=[dict(metric="!function utils.score", aggregation="mean", higher_is_better=True)])
    file, was = task_of(tmp_path/"t", python=python, **how), evaluate.load
    with pytest.raises(InputError, match="--allow-code-execution"): load_suite(suite_of(file))
    s = load_suite(suite_of(file), run_code=code_runner(True))
    (rows,), _ = evaluate_tasks(as_lm_eval(Writer(tmp_path)), s.tasks, "m")
    assert sorted(v for v, _ in rows[s.tasks[0].metric].values()) == [0., 1.] and evaluate.load is was
    assert not [p for p in (Path("/tmp/escaped"), Path("/var/tmp/escaped"), tmp_path/"escaped") if p.exists()], "it ran outside"

def test_tasks_that_run_programs_by_their_own_means_are_refused_always(tmp_path):
    from model_glue_nb.benchmarking.lm_tasks import built_in_tasks
    for folder in ("cruxeval", "longproc"):
        name = next(n for n, f in built_in_tasks().items() if f.parent.name == folder)
        (tmp_path/"s.yaml").write_text(f"tasks: [{{task: {name}}}]")
        with pytest.raises(InputError, match="by its own means, outside the sandbox. Leave the task out"):
            load_suite(tmp_path/"s.yaml", run_code=lambda *a: True)
        with pytest.raises(InputError): load_suite(tmp_path/"s.yaml")

def test_nobody_is_asked_at_the_keyboard(tmp_path, monkeypatch):
    file = task_of(tmp_path/"t", process_docs="!function utils.f", metric_list=[dict(metric="exact_match")], python="def f(docs): input('sure? '); return docs")
    import io
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(InputError, match="EOFError"): load_suite(suite_of(file), run_code=lambda *a: True)

def test_data_brings_no_python_along(tmp_path, monkeypatch):
    import datasets
    asked, was = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k) or was(*a, **k))
    file = task_of(tmp_path/"t", metric_list=[dict(metric="exact_match")])
    given = yaml.safe_load(file.read_text())
    given["dataset_kwargs"]["trust_remote_code"] = True
    file.write_text(yaml.safe_dump(given))
    load_suite(suite_of(file))
    assert asked and all("trust_remote_code" not in k for k in asked)
    for kind in ("pandas", "webdataset"):
        given["dataset_path"] = kind
        file.write_text(yaml.safe_dump(given))
        with pytest.raises(InputError, match="can hold code"): load_suite(suite_of(file))

# ---- bad input
def test_bad_suites_and_tasks(tmp_path):
    def suite(text):
        (tmp_path/"s.yaml").write_text(text)
        return command("score", "demo", "--suite", tmp_path/"s.yaml", "--dry-run")
    for text, said in (("tasks: [{task: arc_chalenge}]", "Did you mean 'arc_challenge'?"), ("tasks: [{task: own.yaml}]", "There is no task file"),
                       ("tasks: [{task: arc_easy, shots: 5}]", "There is no key 'shots'"), ("tasks: [{task: arc_easy}]", "needs allenai/ai2_arc")):
        r = suite(text)
        assert r.returncode == 2 and said in r.stderr and "Traceback" not in r.stderr, r.stderr

def test_tasks_that_need_the_network_are_named_and_skipped_by_choice(tmp_path):
    names = tasks_folder(tmp_path/"t", 6)
    file = tmp_path/"t/suite.yaml"
    given = yaml.safe_load(file.read_text())
    given["tasks"].append(dict(task="arc_easy"))
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(InputError, match="needs allenai/ai2_arc"): load_suite(file)
    s = load_suite(file, offline="skip")
    assert [t.name for t in s.tasks] == names and "arc_easy" in s.skipped
    r = command("score", demo_zoo_path()/"a-sort", "--suite", file, "--offline", "skip", "--dry-run")
    assert r.returncode == 0 and "skipped arc_easy" in r.stderr

def test_code_is_not_run_unasked(tmp_path):
    (tmp_path/"q.jsonl").write_text('{"prompt": "sort CBA ="}\n')
    ran = []
    task = dict(task="code", dataset_path="json", dataset_kwargs=dict(data_files=dict(test="q.jsonl")), test_split="test", output_type="generate_until",
                doc_to_text="{{prompt}}", doc_to_target="", generation_kwargs=dict(until=["\n"], max_gen_toks=4), metric_list=[dict(metric="bypass")])
    (tmp_path/"code.yaml").write_text(yaml.safe_dump(task))
    entry = dict(task="code.yaml", code="{{prompt}}{{answer}}", tests="assert True")
    (tmp_path/"s.yaml").write_text(yaml.safe_dump(dict(tasks=[entry])))
    with pytest.raises(InputError, match="--allow-code-execution"): load_suite(tmp_path/"s.yaml")
    s = load_suite(tmp_path/"s.yaml", run_code=lambda code, tests: ran.append((code, tests)) or True)
    assert (ask_model(read_zoo("demo")["a-sort"], s)["code"].tolist() == [1.]
            and ran[0][0].startswith("sort CBA =") and ran[0][1] == "assert True")

def test_a_model_without_a_tokenizer_is_named(tmp_path):
    zoo = tiny_zoo(tmp_path/"z")
    (tmp_path/"z/b/tokenizer.json").unlink()
    tasks_folder(tmp_path/"t", 6)
    r = command("score", tmp_path/"z", "--suite", tmp_path/"t/suite.yaml", "--dry-run")
    assert r.returncode == 0 and "'b' has no tokenizer" in r.stderr
    r = command("score", tmp_path/"z/b", "--suite", tmp_path/"t/suite.yaml", "--dry-run")
    assert r.returncode == 2 and "'b' has no tokenizer" in r.stderr

def test_questions_longer_than_the_context_are_counted(tmp_path):
    tiny_zoo(tmp_path/"z", ["a"], max_position_embeddings=8)
    d = tmp_path/"t"
    d.mkdir()
    (d/"q.jsonl").write_text("".join(json.dumps(dict(q="w3 " * n, a="w4", b="w5")) + "\n"
                                     for n in (2, 20, 30)))
    (d/"long.yaml").write_text(yaml.safe_dump(dict(task="long", dataset_path="json", dataset_kwargs=dict(data_files=dict(test="q.jsonl")), test_split="test",
                               output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{[a, b]}}", doc_to_target=0)))
    (d/"s.yaml").write_text("{search_share: 0.01, tasks: [{task: long.yaml}]}")
    args = ("score", tmp_path/"z/a", "--suite", d/"s.yaml", "--split", "all", "--out", tmp_path/"run")
    for _ in range(2):
        r = command(*args)
        assert r.returncode == 0 and "2 questions of long are longer than its context" in r.stderr, r.stderr

def test_a_metric_that_is_missing_is_named(tmp_path):
    tasks_folder(tmp_path/"t", 6)
    (tmp_path/"t/s.yaml").write_text("tasks: [{task: choose.yaml, metric: acc_mean}]")
    with pytest.raises(InputError, match="Did you mean 'acc"): load_suite(tmp_path/"t/s.yaml")
    f = tmp_path/"results_x.json"
    f.write_text(json.dumps(dict(results=dict(arc={"acc,none": .5, "alias": "arc"}))))
    with pytest.raises(InputError, match="no metric 'acc_norm' of task 'arc' in 'results_x.json'. Did you mean 'acc,none'"):
        read_results(f, dict(arc="acc_norm"))

# ---- what may be claimed
def test_the_published_table():
    t = published_scores()
    assert t.shape == (12, 6) and "arXiv 2410.05357" in t.attrs["source"]
    assert t.loc["lmsys/vicuna-7b-v1.5", "arc_challenge"] == 0.537542662 and t.mean(axis=1).idxmax() == "migtissera/Synthia-7B-v1.2"

def test_a_question_never_changes_sides():
    s = load_suite("demo")
    few = s.part("all", 30)
    def side(suite): return {q.key: suite.in_search(q) for t in suite.tasks for q in t.questions}
    assert side(few).items() <= side(s).items()
    shares = [np.mean([s.in_search(q) for q in t.questions]) for t in s.tasks]
    assert max(abs(np.array(shares) - s.search_share)) < .05
    assert s.split_record() == load_suite("demo").split_record() and s.split_record()["seed"] == 0

def test_ranks_cover_the_truth():
    "Of 60 draws of three models of known order, the told range misses the true rank rarely."
    miss = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        items = {str(p): ItemScores({"t": (rng.random(150) < p).astype(float)})
                 for p in (.4, .5, .6)}
        t = rank_models(items).set_index("model")
        miss += sum(not t.best_rank[m] <= r <= t.worst_rank[m]
                    for m, r in (("0.6", 1), ("0.5", 2), ("0.4", 3)))
    assert miss <= 60 * 3 * .05
