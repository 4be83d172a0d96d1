"""Scoring one model on six tasks of lm-eval, against one call of lm-eval's own command line.

    python benchmarks/score.py                       # 135M random weights, 6 tasks × 200 questions
    python benchmarks/score.py --shape tiny --n 20   # in a minute

Whole processes are timed, imports and all, each with empty caches of questions. `forward_s` is what the model's own calls take within ours,
`overhead_s` the rest, `again_s` a second call with everything remembered. The peer runs with its default batch of 1 and with a fixed batch.
Weights are float32: both sides then compute alike, and a processor without bf16 arithmetic is six times slower in bf16. `cores`: how many the
processes may use."""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path
from common import SHAPES, record, show, write_models

WORDS = [f"w{i}" for i in range(400)]
CODE = """
import json, sys, time
spent = [0.0]
def timed(f):
    def g(*a, **k):
        began = time.perf_counter()
        try: return f(*a, **k)
        finally: spent[0] += time.perf_counter() - began
    return g
import model_glue_nb.benchmarking.harness as h
make = h.token_batches
def batches():
    cls = make()
    if not hasattr(cls, "is_timed"): cls._model_call, cls._model_generate, cls.is_timed = timed(cls._model_call), timed(cls._model_generate), True
    return cls
h.token_batches = batches
from model_glue_nb.cli.program import main
try: main()
finally: print("FORWARD", spent[0], file=sys.stderr)
"""

def write_tokenizer(folder):
    "Words w0 … w399, an end token, and a config that knows its ends."
    vocab = {w: i for i, w in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    model = dict(type="WordLevel", vocab=vocab, unk_token="<unk>")
    (folder/"tokenizer.json").write_text(json.dumps(dict(version="1.0", added_tokens=[dict(id=i, content=t, special=True, single_word=False,
        lstrip=False, rstrip=False, normalized=False) for t, i in list(vocab.items())[:3]],
                                                         pre_tokenizer=dict(type="WhitespaceSplit"),
                                                         model=model)))
    (folder/"tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>",
                                                                pad_token="</s>", unk_token="<unk>")))
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | dict(bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=2048)))

def write_tasks(folder, n, rng):
    "Three tasks that choose among four, two that write four tokens, one that reads 20 words: short, so that what is not the model's own time shows."
    folder.mkdir()
    def words(k): return " ".join(rng.choice(WORDS, k))
    entries = []
    def task(name, rows, **config):
        (folder/f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        entries.append(dict(name=name, task=f"{name}.yaml"))
        data = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(folder/f"{name}.jsonl"))), test_split="test", num_fewshot=0)
        (folder/f"{name}.yaml").write_text(json.dumps(data | config)) # JSON is YAML
    for i, size in enumerate((6, 9, 12)):
        task(f"choose{i}",
             [dict(q=words(size), c=[words(2) for _ in range(4)], a=int(rng.integers(4)))
              for _ in range(n)],
             output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{c}}", doc_to_target="a", metric_list=[dict(metric="acc"), dict(metric="acc_norm")])
    for i, size in enumerate((8, 12)):
        task(f"write{i}",
             [dict(q=words(size), a=words(1)) for _ in range(n)],
             output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
             generation_kwargs=dict(until=["\n"], max_gen_toks=4, do_sample=False), metric_list=[dict(metric="exact_match")])
    task("read", [dict(q=words(20)) for _ in range(n)], output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{q}}",
         metric_list=[dict(metric="word_perplexity"), dict(metric="bits_per_byte")])
    (folder/"suite.yaml").write_text(json.dumps(dict(name="six tasks", tasks=entries)))
    return [e["name"] for e in entries]

def clock(command, **env):
    "Seconds of a whole process, and what it said."
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, **env})
    if done.returncode: sys.exit(f"A measured process failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, done

def round_of(room, names, batches, i):
    "One round: ours, ours again, and the peer with each batch size."
    cache = dict(XDG_CACHE_HOME=str(room/f"cache{i}"), HF_HUB_OFFLINE="1")
    model = room/"base"
    ours = [sys.executable, "-c", CODE, "score", model, "--suite", room/"tasks/suite.yaml", "--split", "all", "--out", room/f"run{i}", "--json"]
    took, done = clock(ours, **cache, HF_DATASETS_CACHE=str(room/f"data{i}"))
    forward = float(done.stderr.rsplit("FORWARD", 1)[1])
    again, _ = clock([sys.executable, "-c", "from model_glue_nb.cli.program import main; main()", *ours[3:]], **cache)
    row = dict(ours_s=took, forward_s=forward, overhead_s=took - forward, again_s=again)
    scores = {r["task"]: r["score"] for r in json.loads(done.stdout)}
    for b in batches:
        out = room/f"out{i}-{b}"
        row[f"lm_eval_batch{b}_s"], _ = clock([sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", ",".join(names),
            "--include_path", room/"tasks", "--batch_size", b, "--output_path", out], HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(room/f"peer{i}-{b}"))
    found = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    def metric(n): return "exact_match,none" if n.startswith("write") else "acc_norm,none"
    row["largest_difference"] = max(abs(scores[n] - found[n][metric(n)]) for n in names if n != "read")
    return row

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", default="135m", choices=SHAPES)
    p.add_argument("--n", type=int, default=200)
    p.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--out", help="CSV file")
    a = p.parse_args()
    import numpy as np
    rows = []
    with tempfile.TemporaryDirectory() as d:
        room = Path(d)
        write_models(room, SHAPES[a.shape], ["base"], "float32")
        write_tokenizer(room/"base")
        names = write_tasks(room/"tasks", a.n, np.random.default_rng(0))
        for i in range(a.rounds):
            row = dict(shape=a.shape, tasks=len(names), questions=a.n) | round_of(room, names, a.batches, i)
            best = min(v for k, v in row.items() if k.startswith("lm_eval"))
            rows.append(row
                        | dict(faster=best / row["ours_s"], cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0]))
            show(rows[-1])
    record(rows, a.out)

if __name__ == "__main__": main()
