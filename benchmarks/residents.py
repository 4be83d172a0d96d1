"""Prompts of several experts in one batch: a base with low-rank changes per sample beside the plain base.

    python benchmarks/residents.py [SHAPE] [RANK] [DEVICE]      135m, 16 and cpu

Random weights; every linear layer has changes of four experts. A round reads prompts of 64 tokens and writes 32 tokens each, by plain and
by changed model in turn; the ratio is that of the medians of nine rounds."""
import statistics, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from model_glue_nb.mixing.per_sample import attach_changes
from model_glue_nb.mixing.residents import answered_by
from model_glue_nb.zoo.decoding import greedy_tokens

SHAPES = {"135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                       vocab_size=49152, tie_word_embeddings=True),
          "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
                     vocab_size=32000),
          "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)}

def build(shape, rank, device):
    "The base, and a twin around the same weights whose samples change them."
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device): plain, changed = (LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval() for _ in range(2))
    changed.load_state_dict(plain.state_dict(), assign=True)
    changed.tie_weights()
    linear = {n: [rank] * 4 for n, m in changed.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    norms = {n: ["weight"] for n, m in changed.named_modules() if n.endswith("norm")}
    with torch.device(device): attach_changes(changed, 4, linear, norms)
    with torch.no_grad():
        for name, p in changed.named_parameters():
            if ".changes." in name: p.normal_(0, .01)
            if ".vectors." in name: p.normal_(1, .01)
    return plain, changed

def rounds(kinds, n=9):
    "Median seconds of each kind, asked in turn."
    times = {k: [] for k in kinds}
    for i in range(n + 2):
        for k, ask in kinds.items():
            began = time.perf_counter()
            ask()
            if torch.cuda.is_available(): torch.cuda.synchronize()
            if i > 1: times[k].append(time.perf_counter() - began)
    return {k: statistics.median(v) for k, v in times.items()}

def main(shape="135m", rank="16", device="cpu"):
    plain, changed = build(shape, int(rank), device)
    ids = torch.randint(0, 1000, (4, 64)).tolist()
    def ask(model, n, experts=None):
        def within(rows): return answered_by(tuple(experts[i] for i in rows))
        how = dict(within=within) if experts else {}
        return lambda: greedy_tokens(model, ids[:n], [], 32, **how)
    kinds = {"plain, 1": ask(plain, 1), "one expert, 1": ask(changed, 1, [2]),
             "plain, 4": ask(plain, 4), "one expert, 4": ask(changed, 4, [2] * 4), "four experts, 4": ask(changed, 4, [0, 1, 2, 3])}
    found = rounds(kinds)
    stored = sum(p.numel() for n, p in changed.named_parameters() if ".changes." in n or ".vectors." in n) / 4
    print(f"{shape}, rank {rank} ({stored / sum(p.numel() for p in plain.parameters()):.1%} of a model per expert), {device}")
    for k, seconds in found.items():
        print(f"{k:18} {1000 * seconds:8.1f} ms  {seconds / found['plain, ' + k[-1]]:.2f}×")

if __name__ == "__main__":
    with torch.inference_mode(): main(*sys.argv[1:])
