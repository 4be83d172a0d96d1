"Evaluation logs of any program are compared item by item: the readers on real files, the statistics against other ways to compute them."
import json, math, re, shutil, sys, zipfile
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm, t as student

from model_glue_nb.benchmarking.aligned_logs import OVERALL
from model_glue_nb.benchmarking.comparing import compare
from model_glue_nb.benchmarking.harness import as_lm_eval
from model_glue_nb.benchmarking.import_scores import import_samples
from model_glue_nb.benchmarking.intervals import ItemScores, mean_score, paired_gain
from model_glue_nb.benchmarking.lm_tasks import quiet
from model_glue_nb.benchmarking.logs import EvalLog, LogItem
from model_glue_nb.benchmarking.paired_tests import holm, paired_p, smallest_difference, tied_groups
from model_glue_nb.benchmarking.run_logs import read_logs
from model_glue_nb.benchmarking.scores import known_items
from model_glue_nb.benchmarking.suites import load_suite
from model_glue_nb.core import InputError, Run
from model_glue_nb.store import Store
from model_glue_nb.zoo.zoo import tiny_zoo

LOGS = Path(__file__).parent/"recorded"/"logs"
PATHS = [LOGS/k for k in ("alpha", "beta", "gamma")]

def log_of(model, tasks, prompt="p", weights={}):
    "A log of one metric: task → key → score."
    items = {t: {"acc": {k: LogItem(v, k, prompt + k, "a") for k, v in scores.items()}} for t, scores in tasks.items()}
    return EvalLog(model, model, items, weights=weights)

def numbered(values): return {str(i): float(v) for i, v in enumerate(values)}

# --- the statistics

def pair(b, c, same=4): return dict(t=np.array([1.] * b + [0.] * c + [1.] * same)), dict(t=np.array([0.] * b + [1.] * c + [1.] * same))

@pytest.mark.parametrize("b, c", [(0, 1), (5, 0), (6, 0), (8, 2), (2, 8), (7, 7), (40, 21), (0, 0)])
def test_zeros_and_ones_are_the_exact_mcnemar_test(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1
    assert paired_p(*pair(b, c)) == pytest.approx(expected, rel=1e-9)

def test_mcnemar_by_hand():
    assert paired_p(*pair(9, 1)) == pytest.approx(2 * (10 + 1) / 1024) # ten tosses: ten ways to lose one, one to lose none
    assert [paired_p(*pair(n, 0)) for n in (5, 6)] == pytest.approx([2 / 32, 2 / 64]) # six is the least that is below 5 %

@pytest.mark.parametrize("seed", range(4))
def test_graded_scores_toss_every_sign(seed):
    rng = np.random.default_rng(seed)
    n = dict(x=6, y=5)
    a, b = ({t: np.round(rng.random(k), 3) for t, k in n.items()} for _ in range(2))
    weights = dict(x=3., y=1.)
    parts = np.concatenate([weights[t] / 4 / n[t] * (a[t] - b[t]) for t in n])
    sums = np.array([np.dot(s, parts) for s in product((-1, 1), repeat=11)])
    exact = (np.abs(sums) >= abs(parts.sum()) - 1e-12).mean()
    assert paired_p(ItemScores(a, weights), ItemScores(b, weights)) == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000))

def test_many_kinds_of_coins_are_thrown_alike():
    "More than 64 sizes are thrown together; both ways estimate one chance."
    rng = np.random.default_rng(5)
    a = rng.random(60)
    few, many = np.repeat(a, 2), np.repeat(a, 2) + np.arange(120) * 1e-9
    zero, shift = np.zeros(120), .42
    ps = [paired_p(dict(t=v - shift), dict(t=zero)) for v in (few, many)]
    assert .001 < ps[0] < .9 and ps[0] == pytest.approx(ps[1], abs=.012)

@pytest.mark.parametrize("seed", range(5))
def test_holm_by_its_definition(seed):
    "Adjusted p: the largest of (m − j + 1) p₍ⱼ₎ over all j up to its own place."
    p = np.round(np.random.default_rng(seed).random(9)**3, 2)
    order = sorted(range(9), key=lambda i: (p[i], i))
    for place, i in enumerate(order):
        assert holm(p)[i] == pytest.approx(min(1, max((9 - j) * p[order[j]] for j in range(place + 1))))

def test_the_smallest_difference_is_its_formula_in_float64():
    rng = np.random.default_rng(2)
    n, w = dict(x=400, y=900), dict(x=1., y=3.)
    a, b = ({t: rng.random(k) for t, k in n.items()} for _ in range(2))
    d = {t: a[t] - b[t] for t in n}
    error = math.sqrt(sum((w[t] / 4)**2 * d[t].var(ddof=1) / n[t] for t in n))
    got = smallest_difference(ItemScores(a, w), ItemScores(b, w))
    assert got == pytest.approx((student.ppf(.975, 1000) + norm.ppf(.8)) * error, rel=3e-3)
    half = smallest_difference(ItemScores(a, w), ItemScores(b, w), power=.5)
    assert got - half == pytest.approx(norm.ppf(.8) * error, rel=3e-3)
    assert smallest_difference(a, a) == pytest.approx(6 * .5 / 900) # six questions of the larger task

@pytest.mark.parametrize("seed", range(30))
def test_tied_groups_are_all_largest_sets_of_ties(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 7))
    apart = np.triu(rng.random((k, k)) < .4, 1)
    apart |= apart.T
    free = [set(s) for r in range(1, k + 1) for s in combinations(range(k), r) if not any(apart[i, j] for i, j in combinations(s, 2))]
    assert tied_groups(apart) == sorted(sorted(s) for s in free if not any(s < o for o in free))

def test_no_pair_is_called_different_by_too_few_draws():
    "Signs are drawn so often that p can be small enough for a thousand pairs."
    rng = np.random.default_rng(0)
    n = 300
    logs = [log_of(f"m{i}", dict(x=numbered(rng.random(n) < i / 31 + .01), y=numbered(rng.random(n + 9) < i / 31 + .01))) for i in (0, 30)]
    items = compare(*logs).items
    assert paired_p(items["m30"], items["m0"], n_tests=1000) * 1000 < .05

def test_overlapping_intervals_and_a_clear_difference():
    first = np.arange(1000) < 700
    second = first.copy()
    second[:15], second[700:745] = False, True
    c = compare(log_of("a", dict(t=numbered(first))), log_of("b", dict(t=numbered(second))))
    low, high = c.ranking.low.max(), c.ranking.high.min()
    assert low < high and c.pairs.p[0] < 1e-3 and c.pairs.low[0] > 0 and c.ranking.group.tolist() == ["a", "b"]
    assert c.pairs.test[0] == "McNemar" and c.pairs.difference[0] == pytest.approx(.03)

def test_a_pairs_rows_are_the_library_s_own_numbers():
    rng = np.random.default_rng(3)
    tasks = [dict(x=numbered(rng.random(80)), y=numbered(rng.random(30) < .5)) for _ in range(3)]
    c = compare(*(log_of(m, t) for m, t in zip("abc", tasks)), weights=dict(x=2, y=1), all_pairs=True)
    assert [(r.first, r.second) for r in c.pairs[c.pairs.task == OVERALL].itertuples()] == [("a", "b"), ("a", "c"), ("b", "c")]
    for r in c.pairs[c.pairs.task == OVERALL].itertuples():
        gain = paired_gain(c.items[r.second], c.items[r.first])
        assert (r.difference, r.low, r.high) == (gain.mean, gain.low, gain.high)
        assert r.score_second - r.score_first == pytest.approx(r.difference)
    means = c.pairs[c.pairs.task == OVERALL]
    assert means.p_holm.tolist() == holm(means.p).tolist()
    one = c.pairs[(c.pairs.second == "b") & (c.pairs.task != OVERALL)]
    assert one.p_holm.tolist() == holm(one.p).tolist()
    assert c.items["a"].weights == dict(x=2, y=1) and mean_score(c.items["a"]) == pytest.approx(
        (2 * c.items["a"]["x"].mean() + c.items["a"]["y"].mean()) / 3)

# --- what is compared

def test_items_meet_whatever_their_order():
    rng = np.random.default_rng(1)
    values = numbered(rng.random(50)), numbered(rng.random(50))
    shuffled = {k: values[1][k] for k in rng.permutation(list(values[1]))}
    a, b = (compare(log_of("a", dict(t=values[0])), log_of("b", dict(t=v))) for v in (values[1], shuffled))
    assert a.pairs.equals(b.pairs)

def test_what_is_left_out_is_counted_and_said():
    a = log_of("a", dict(t=numbered([1, 0, math.nan, 1, 0]), u=numbered([1])))
    b = log_of("b", dict(t={k: v for k, v in numbered([1, 1, 1, 1, 0]).items() if k != "0"}))
    c = compare(a, b)
    assert c.tasks == [dict(task="t", metric="acc", n=3, of=5, lacking=dict(b=1), no_score=1)]
    assert c.notes == ("task u is left out: b did not answer it", "task t: b lacks 1 of 5 items", "task t: 1 item without a score in some log")
    assert c.items["b"]["t"].tolist() == [1, 1, 0]

def test_other_questions_are_refused_by_name_and_all_at_once():
    a, b = log_of("a", dict(t=numbered([1, 0]))), log_of("b", dict(t=numbered([1, 0])), prompt="other")
    with pytest.raises(InputError, match=r"Cannot compare, 2 problems:\n- Item '0' of task 't' has another prompt in 'b' than in 'a'.*--other-prompts"):
        compare(a, b)
    assert compare(a, b, other_prompts=True).tasks[0]["n"] == 2
    unknown = EvalLog("c", "c", {"t": {"acc": {"0": LogItem(1., "0")}}}) # says nothing of its prompts
    assert compare(a, unknown).tasks[0]["n"] == 1

# --- Inspect

def test_inspect_logs_hold_what_was_answered():
    alpha, beta, gamma = (read_logs(p)[0] for p in PATHS)
    assert [x.model for x in (alpha, beta, gamma)] == ["mockllm/alpha", "mockllm/beta", "mockllm/gamma"]
    def scores(log, task, metric): return {k: i.score for k, i in log.tasks[task][metric].items()}
    assert scores(alpha, "capitals", "match") == dict(France=1, Japan=1, Peru=1, Kenya=0, Norway=1, Egypt=0)
    assert scores(alpha, "capitals", "closeness") == pytest.approx(dict(France=1, Japan=1, Peru=1, Kenya=6 / 7, Norway=1, Egypt=0))
    assert scores(beta, "sums", "exact") == {"1": 1, "2": 0, "3": 1, "4": 1}
    assert scores(gamma, "sums", "exact") == {"1": .5, "2": .5, "3": 0, "4": 0} # means of two epochs

def test_the_two_forms_of_inspect_are_read_alike(tmp_path):
    "An archive that Zstandard packed, the same one packed by deflate, and the samples as one JSON file."
    source = LOGS/"alpha"/"capitals.eval"
    from model_glue_nb.benchmarking.logs import _read_archive
    content = _read_archive(source)
    (tmp_path/"one.json").write_text(json.dumps(content))
    with zipfile.ZipFile(tmp_path/"two.eval", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("header.json", json.dumps({k: v for k, v in content.items() if k != "samples"}))
        for i, s in enumerate(content["samples"]): z.writestr(f"samples/{i}_epoch_1.json", json.dumps(s))
    tasks = read_logs(source)[0].tasks
    assert len(tasks["capitals"]["match"]) == 6
    for name in ("one.json", "two.eval"): assert read_logs(tmp_path/name)[0].tasks == tasks

def test_inspect_s_names_and_what_went_wrong(tmp_path):
    for name, status, scores in (("a", "success", [1, 0]), ("b", "error", [1])):
        samples = [dict(id=i, epoch=1, input="q", target="a", scores=dict(s=dict(value=v))) for i, v in enumerate(scores)]
        samples.append(dict(id=9, epoch=1, input="q", target="a", scores=None)) # ended in an error
        log = dict(version=2, status=status, eval=dict(task="t", model="org/same"), samples=samples)
        (tmp_path/name).mkdir()
        (tmp_path/name/"t.json").write_text(json.dumps(log))
    c = compare(tmp_path/"a", tmp_path/"b")
    assert c.models == ["a", "b"] and c.tasks[0]["n"] == 1 and c.tasks[0]["no_score"] == 1
    assert c.notes[0] == "b: t ended early (status error)" and "b lacks 1 of 3 items" in c.notes[1]

# --- lm-eval

TASKS = dict(choose="""task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{file}'}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{[a, b]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""", write="""task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: '{file}'}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 3, do_sample: false}}
metric_list: [{{metric: exact_match}}]
filter_list:
  - {{name: first, filter: [{{function: regex, regex_pattern: "(w\\\\d+)"}}, {{function: take_first}}]}}
  - {{name: whole, filter: [{{function: take_first}}]}}
""")

@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    "Two models that lm-eval's own evaluator asked: its output folder, its results, the models and the tasks' folder."
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    home = tmp_path_factory.mktemp("lm_eval")
    (home/"tasks").mkdir()
    (home/"q.jsonl").write_text("".join(f'{{"q": "w{i} w{i+1}", "a": "w{i+2}", "b": "w9"}}\n' for i in range(3, 12)))
    for name, text in TASKS.items(): (home/"tasks"/f"{name}.yaml").write_text(text.format(file=home/"q.jsonl"))
    zoo, results = tiny_zoo(home/"zoo"), {}
    for i, m in enumerate(list(zoo)[:2]):
        tracker = EvaluationTracker(output_path=str(home/"out"/m.name))
        with quiet():
            said = simple_evaluate(as_lm_eval(m.load()), tasks=list(TASKS), log_samples=True, bootstrap_iters=0, limit=None if i == 0 else 7,
                                   task_manager=TaskManager(include_path=str(home/"tasks"), include_defaults=False), evaluation_tracker=tracker)
            samples = said.pop("samples")
            tracker.save_results_aggregated(results=said, samples=samples)
            for t, s in samples.items(): tracker.save_results_samples(task_name=t, samples=s)
        results[m.name] = said["results"]
    return home, results, zoo

def test_lm_eval_s_samples_give_its_own_scores(asked):
    home, results, _ = asked
    for name, of in results.items():
        log, = read_logs(home/"out"/name)
        assert {(t, m) for t, by in log.tasks.items() for m in by} == {("choose", "acc,none"), ("choose", "acc_norm,none"),
                                                                       ("write", "exact_match,first"), ("write", "exact_match,whole")}
        for task, by in log.tasks.items():
            for metric, items in by.items():
                assert np.mean([i.score for i in items.values()]) == pytest.approx(of[task][metric]), (name, task, metric)

def test_lm_eval_s_logs_are_compared(asked):
    home, results, _ = asked
    a, b = results
    c = compare(f"{a}={home/'out'/a}", f"{b}={home/'out'/b}", metric=dict(write="exact_match,whole"))
    assert [(t["task"], t["metric"], t["n"], t["of"]) for t in c.tasks] == [("choose", "acc_norm,none", 7, 9), ("write", "exact_match,whole", 7, 9)]
    assert f"task choose: {b} lacks 2 of 9 items" in c.notes

def test_a_log_meets_the_store_that_imported_it(asked, monkeypatch):
    home, results, zoo = asked
    (home/"tasks"/"suite.yaml").write_text("tasks: [{task: choose.yaml, metric: acc}]")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home/"cache"))
    model = next(iter(zoo))
    store = Store(home/"kept"/"store.sqlite")
    assert import_samples(home/"out"/model.name, model, load_suite(home/"tasks"/"suite.yaml"), store).imported[0] == 9
    c = compare(f"log={home/'out'/model.name}", f"store={home/'kept'}", metric="acc")
    assert c.tasks[0]["n"] == 9 and c.pairs.difference[0] == 0 and c.pairs.p[0] == 1

def test_samples_of_older_versions_get_the_hashes_of_newer_ones(asked, tmp_path):
    home, results, _ = asked
    for file in (home/"out"/next(iter(results))).rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        bare = [{k: v for k, v in r.items() if not k.endswith("_hash")} for r in rows]
        (tmp_path/file.name).write_text("".join(json.dumps(r) + "\n" for r in bare))
        assert bare != rows and read_logs(tmp_path/file.name)[0].tasks == read_logs(file)[0].tasks

# --- runs

def test_a_run_is_compared_by_its_systems_and_weights(tmp_path):
    for name in "xy":
        rows = [json.dumps(dict(question=f"{name}{i}", answer=str(i % 2))) for i in range(30)]
        (tmp_path/f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path/"suite.yaml").write_text("tasks: [{name: x, file: x.jsonl, weight: 3}, {name: y, file: y.jsonl}]")
    suite, zoo = load_suite(tmp_path/"suite.yaml"), tiny_zoo(tmp_path/"zoo")
    run = Run.start(tmp_path/"run", dict(suite=str(tmp_path/"suite.yaml"), zoo=str(tmp_path/"zoo")))
    a, b = list(zoo)[:2]
    shutil.copytree(b.path, tmp_path/"run"/"models"/"made")
    run.write_json("zoo", dict(models={a.name: dict(fingerprint=a.fingerprint())}))
    run.write_table("comparison", pd.DataFrame(dict(system=["best_single", "chosen"], model=[a.name, "made"])))
    rng, expected = np.random.default_rng(0), {}
    for name, key in ((a.name, a.fingerprint()), ("made", b.fingerprint())):
        for t in suite.tasks: run.store.add_items(key, t.asked, {q.key: (float(rng.random()), "said") for q in t.questions})
        expected[name] = known_items(run.store, key, suite.part("report"))
    c = compare(tmp_path/"run", only=["chosen", "best_single"])
    assert c.models == ["made", a.name] and [t["n"] for t in c.tasks] == [len(t.questions) for t in suite.part("report").tasks]
    for m in c.models:
        assert {t: v.tolist() for t, v in c.items[m].items()} == {t: v.tolist() for t, v in expected[m].items()}
        assert mean_score(c.items[m]) == mean_score(expected[m]) != mean_score(dict(expected[m]))

# --- from a shell

def test_the_command_says_shows_and_writes(command, tmp_path):
    code, out, err = command("compare", *PATHS[:2], "--html", tmp_path/"page.html")
    assert code == 0 and max(map(len, out.splitlines()[1:])) <= 80 and "mean over tasks" in out
    assert "page.html" in err and "beta against alpha" in (tmp_path/"page.html").read_text()
    code, out, _ = command("compare", *PATHS, "--json", "--all-pairs")
    told = json.loads(out)
    assert code == 0 and len(told["pairs"]) == 9 and told["models"] == ["alpha", "beta", "gamma"]
    assert not {"Nairobi", "Oslo"} & set(out.split('"'))

def test_long_names_keep_to_the_width(command, tmp_path, monkeypatch):
    names = [f"organisation-with-a-name/model-{i}-instruct-v0.{i}-a-long-way-to-go" for i in range(4)]
    rows = "".join(f"{m},a_task_with_a_name_that_does_not_end_soon,{j},{(i * j) % 3 % 2}\n" for i, m in enumerate(names) for j in range(40))
    (tmp_path/"t.csv").write_text("model,task,item,score\n" + rows)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True) # a pipe gets whole names
    for only in (names, names[:2]):
        code, out, _ = command("compare", tmp_path/"t.csv", *(x for n in only for x in ("--only", n.rpartition("/")[2])))
        _, table = out.split("\n", 1)
        assert code == 0 and "diff" in table and max(map(len, re.sub("\x1b\\[[0-9;]*m", "", table).splitlines())) <= 80, out

@pytest.mark.parametrize("make, why", [
    (lambda d: None, "There is no log"),
    (lambda d: d.mkdir(), "has no log: it is empty"),
    (lambda d: d.with_suffix("").mkdir() or (d/"samples_t_2026-01-01T00-00-00.jsonl").write_text(""), "has no samples"),
    (lambda d: d.mkdir() or (d/"samples_t.jsonl").write_text('{"doc_id": 0, "metrics"'), "line 1' is not JSON"),
    (lambda d: d.mkdir() or (d/"samples_t.jsonl").write_text('{"doc_id": 0}\n'), "'metrics' is missing"),
    (lambda d: d.mkdir() or (d/"x.eval").write_bytes(b"PK nothing"), "cannot be unpacked")])
def test_what_cannot_be_read_is_said(command, tmp_path, make, why):
    make(tmp_path/"log")
    code, out, err = command("compare", tmp_path/"log", PATHS[0], "--html", tmp_path/"page.html")
    assert code == 2 and why in err and not (tmp_path/"page.html").exists() and out == ""

# --- garbled files

def garbled(raw, rng):
    kind = rng.integers(4)
    at, n = int(rng.integers(len(raw))), int(rng.integers(1, 40))
    if kind == 0: return raw[:at]
    if kind == 1: return raw[:at] + rng.bytes(n) + raw[at + n:]
    if kind == 2: return raw[:at] + raw[at + n:]
    return raw[:at] + raw[at:at + n] + raw[at:]

def test_garbled_logs_are_refused_or_read(tmp_path, asked):
    home, results, _ = asked
    sample = sorted((home/"out").rglob("samples_write*.jsonl"))[0]
    (tmp_path/"t.csv").write_text("item,task,prompt,a,b\n" + "".join(f"{i},t,say {i},{i % 2},0.5\n" for i in range(20)))
    store = Store(tmp_path/"s.sqlite")
    store.add_items("m", load_suite("demo").tasks[0].asked, {str(i): (i / 9, "x") for i in range(9)})
    store.db.execute("pragma wal_checkpoint(truncate)")
    rng = np.random.default_rng(0)
    for file in (sample, LOGS/"alpha"/"sums.eval", LOGS/"beta"/"sums.json", tmp_path/"t.csv", tmp_path/"s.sqlite"):
        raw, read, refused = file.read_bytes(), 0, 0
        for i in range(60):
            broken = tmp_path/f"broken{file.suffix}"
            broken.write_bytes(garbled(raw, rng))
            try: read += len(read_logs(broken)) >= 0
            except InputError as e: refused += len(str(e)) > 20
        assert read + refused == 60, file

def test_wild_values_of_json_are_refused_or_read(tmp_path):
    whole = json.loads((LOGS/"beta"/"sums.json").read_text())
    for value in (None, True, -1, 1e300, "x", "", [], [[]], {}, {"a": None}, [1, "x"]):
        for path in (("eval",), ("eval", "task"), ("eval", "model"), ("samples",), ("samples", 0), ("status",), *(
                ("samples", 0, k) for k in ("id", "epoch", "input", "target", "scores")), ("samples", 0, "scores", "exact"),
                ("samples", 0, "scores", "exact", "value")):
            wild = json.loads(json.dumps(whole))
            at = wild
            for k in path[:-1]: at = at[k]
            at[path[-1]] = value
            file = tmp_path/"wild.json"
            file.write_text(json.dumps(wild))
            try: assert read_logs(file)
            except InputError: continue
            try: compare(file, f"other={PATHS[1]}", tasks=["sums"])
            except InputError: pass

def test_notebooks_show_little_and_no_answers():
    c = compare(*PATHS)
    assert len(c._repr_html_().encode()) <= 20_000 and "Nairobi" not in c._repr_html_() and "<svg" in c._repr_html_()
    assert c.sentence() in repr(c)
