"Write model_glue_nb/data/architectures.tsv: what the installed transformers knows of configs and tensor names."
import argparse, dataclasses, json, os, sys, warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")
FILE = Path(__file__).resolve().parent.parent/"model_glue_nb"/"data"/"architectures.tsv"
NOISE = """transformers_version architectures model_type output_hidden_states output_attentions return_dict dtype id2label label2id
problem_type chunk_size_feed_forward is_encoder_decoder rope_parameters _name_or_path""".split()
# How configs of transformers 4 spell RoPE where it isn't rope_theta, partial_rotary_factor and rope_scaling
SPELLED = {"gpt_neox": dict(theta="rotary_emb_base", partial="rotary_pct"),
           "gpt_neox_japanese": dict(theta="rotary_emb_base", partial="rotary_pct"),
           "gemma3_text": dict(layers=dict(full_attention="rope_theta", sliding_attention="rope_local_base_freq")),
           "gemma3n_text": dict(layers=dict(full_attention="rope_theta", sliding_attention="rope_local_base_freq")),
           "t5gemma2_text": dict(layers=dict(full_attention="rope_theta", sliding_attention="rope_local_base_freq")),
           "t5gemma2_decoder": dict(layers=dict(full_attention="rope_theta", sliding_attention="rope_local_base_freq")),
           "modernbert": dict(layers=dict(full_attention="global_rope_theta", sliding_attention="local_rope_theta"), scaled="both"),
           "modernbert-decoder": dict(layers=dict(full_attention="global_rope_theta", sliding_attention="local_rope_theta"), scaled="both"),
           "olmo3": dict(layers=dict(full_attention="rope_theta", sliding_attention=None)),
           "phi3": dict(renamed=dict(su="longrope", yarn="longrope")),
           "phi4_multimodal": dict(renamed=dict(su="longrope", yarn="longrope")),
           "qwen2_vl_text": dict(renamed=dict(mrope="default")), "qwen2_5_vl_text": dict(renamed=dict(mrope="default")),
           "minimax_m2": {}}


LIKELY = """num_attention_heads num_heads n_head n_heads num_key_value_heads hidden_size d_model n_embd decoder_hidden_size
qk_rope_head_dim head_dim""".split()


def plain(value):
    "A value as JSON gives it back."
    return json.loads(json.dumps(value, default=str))


def raw_defaults(cls):
    "Defaults as the class declares them, before anything is derived."
    out = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING: out[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING: out[f.name] = f.default_factory()
    return out


def built(cls, **given):
    "What a config says of itself once it is built; None where its class refuses the values."
    try: return plain(cls(**given).to_dict())
    except Exception: return None


def sizes(cls, default):
    "Settings that a derived value may follow, and other values for them."
    known = cls.attribute_map
    def name(k): return known.get(k, k)
    hidden, heads, layers = (name(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    def number(k): return isinstance(default.get(k), int) and not isinstance(default.get(k), bool)
    out = [{}]
    if number(hidden): out += [{hidden: default[hidden] * k} for k in (2, 3)]
    if number(heads) and default[heads] % 2 == 0:
        out += [{heads: default[heads] // 2}, {heads: default[heads] * 2}]
    if number(layers):
        out += [{layers: n} for n in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 24, 36, 60)]
    return out


def scalar_rules(key, default):
    "Ways in which a number may follow from others, the likely ones first."
    numbers = {k: v for k, v in default.items() if isinstance(v, int | float) and not isinstance(v, bool) and v and k != key}
    want, likely = default[key], LIKELY.index
    ranked = sorted(numbers, key=lambda k: (likely(k) if k in LIKELY else len(LIKELY), k))
    if want is not None:
        for k in ranked if "dim" in key else []:
            if k in LIKELY and k.startswith(("hidden", "d_model", "n_embd", "decoder_h")):
                for h in ranked:
                    if h in LIKELY and "head" in h and numbers[k] // numbers[h] == want: yield ["share", k, h]
        for k in ranked:
            if numbers[k] == want: yield ["is", k]
        for k in ranked:
            if isinstance(want, int) and (factor := want / numbers[k]) in (1.5, 2, 2.5, 3, 4, 8):
                yield ["times", k, factor]
            if isinstance(want, int) and want == -(-numbers[k] // 16): yield ["sixteenth", k]
    yield ["always", want]


def derived_scalar(key, probes, by=lambda rule: []):
    "The rule that holds for every probe and that the fewest other settings break, with those."
    found = []
    for rule in scalar_rules(key, probes[0]):
        if not all(apply(rule, p) == p.get(key) for p in probes): continue
        found.append(rule + [by(rule)])
        if not found[-1][-1] or len(found) == 8: break
    return min(found, key=lambda rule: len(rule[-1]), default=None)


def apply(rule, config):
    "The value that a rule gives; the reader in the package does the same."
    kind, *rest = rule
    if kind == "always": return rest[0]
    if kind == "layers":
        n, start, cycle = config[rest[0]], rest[1], rest[2]
        return (start + cycle * n)[:n] if cycle else start[:n]
    value = config.get(rest[0])
    if kind == "is": return value
    if kind == "share": return value // config[rest[1]] if value and config.get(rest[1]) else None
    if kind == "sixteenth": return -(-value // 16)
    return int(value * rest[1])


def derived_list(key, probes, layers):
    "A list with one entry per layer: a start and a cycle."
    rows = {p[layers]: p[key] for p in probes if isinstance(p.get(key), list)}
    longest = rows[max(rows)] if rows else []
    if not longest or any(len(v) != n for n, v in rows.items()): return None
    for lead in range(0, 9):
        for period in range(1, 9):
            rule = ["layers", layers, longest[:lead], longest[lead:lead + period]]
            if all(apply(rule, p) == p[key] for p in probes): return rule


def movers(cls, key, rule, default, raw):
    "Settings that change a derived value though its rule doesn't look at them."
    out, extra = [], ["sliding_window_pattern", "full_attention_interval", "attn_layer_period", "first_k_dense_replace", "rope_theta"]
    for k in [*raw, *(x for x in extra if x not in raw)]:
        if k in (key, "rope_parameters") or k in NOISE or k.endswith(("token_id", "dropout")): continue
        if k in rule: continue
        v = default.get(k)
        others = {bool: [not v], int: [v + 1, v * 2, max(v // 2,
                                                         1)] if isinstance(v, int) else []}.get(
    type(v), [])
        if v is None: others = [3, 2, True]
        if k == "layer_types": others = []
        for other in others:
            got = built(cls, **{k: other})
            if got is not None and got.get(key) != apply(rule, got):
                out.append(k)
                break
    return out


def derivations(cls, default, raw):
    "How values follow that a config may leave unsaid; `null` where only the class knows."
    layers = cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    tried = [(given, p) for given in sizes(cls, default) if (p := built(cls, **given)) is not None]
    probes = [p for _, p in tried]
    own = [k for k in default if k not in NOISE and k not in cls.sub_configs_defaults and not k.startswith("_")]
    def moved(k): return any(p.get(k) != default[k] and k not in given for given, p in tried)
    open_keys = [k for k in own if k in raw and plain(raw[k]) != default[k] or moved(k)]
    out = {}
    for key in open_keys:
        def by(rule): return movers(cls, key, rule, default, raw)
        if key == "sliding_window" and "use_sliding_window" in raw:
            out[key] = ["if", "use_sliding_window", plain(raw[key]), []]
            continue
        if isinstance(default[key], list):
            rule = derived_list(key, probes, layers) if layers in default else None
            if rule is None and all(p.get(key) == default[key] for p in probes):
                rule = ["always", default[key]]
            out[key] = rule and rule + [by(rule)]
        else: out[key] = derived_scalar(key, probes, by)
    return out


def rope(cls, kind, default, raw):
    "RoPE of a config that says nothing of it, and how it is spelled."
    own = default.get("rope_parameters")
    if "rope_parameters" not in {f.name for f in dataclasses.fields(cls)}: return None
    from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin as Mixin
    out = dict(default=own or {}) | SPELLED.get(kind, {})
    def set_in(**given): return (built(cls, **given) or {}).get("rope_parameters") or {}
    base = set_in(rope_parameters=dict(rope_type="default"))
    if base and base != own: out["base"] = base # what is added to a dictionary that a config gives
    if "rope_theta" in (own or {}) and set_in(**{out.get("theta", "rope_theta"): 12345.0}).get("rope_theta") == own["rope_theta"]:
        out["fixed"] = True # what stands beside the dictionary doesn't count
    custom = cls.convert_rope_params_to_dict is not Mixin.convert_rope_params_to_dict
    nested = any(isinstance(v, dict) for v in (own or {}).values())
    if (custom or nested) and kind not in SPELLED: out["written"] = True # only what is written counts
    return out


def facts(kind, cls):
    "What a config class says."
    config = cls()
    default, raw = plain(config.to_dict()), raw_defaults(cls)
    parts = {k: spec.model_type for k, spec in cls.sub_configs_defaults.items()}
    fixed = [k for k, spec in cls.sub_configs_defaults.items() if "AutoConfig" not in spec.config_class.__name__]
    out = dict(map=dict(cls.attribute_map), derived=derivations(cls, default, raw), rope=rope(cls, kind, default, raw))
    keep = {k: v for k, v in default.items() if k not in NOISE and k not in parts and k not in out["derived"]}
    changed = {k: plain(v) for k, v in raw.items() if k not in default and k not in NOISE and k not in parts}
    out["defaults"] = {k: v for k, v in (keep | changed).items() if not k.startswith("_")}
    if parts:
        text = next((k for k in parts if getattr(config, k, None) is config.get_text_config(decoder=True)), None)
        out |= dict(parts=parts, fixed=fixed, text=text)
        base = {k: plain(getattr(config, k).to_dict()) for k in parts if getattr(config, k, None) is not None}
        def plain_part(k): return built(type(getattr(config, k))) or {}
        def counts(x): return x not in NOISE or x == "rope_parameters"
        def unlike(k):
            return {x: v for x, v in base[k].items() if v != plain_part(k).get(x) and counts(x)}
        out["given"] = {k: x | {n: base[k][n] for n in ("head_dim",) if n in base[k]}
                        for k in base
                        if (x := unlike(k))}
        out["absent"] = [k for k in parts if getattr(config, k, None) is None]
        if text: out["flat"], out["tied"] = flat(cls, text), tied(cls, text)
    return {k: v for k, v in out.items() if v or k == "defaults"}


def flat(cls, text):
    "Is the text part read from the top level where a config has none?"
    try: return getattr(cls(hidden_size=72), text).hidden_size == 72 if text else False
    except Exception: return False


def tied(cls, text):
    "Does a tied text part tie the whole model, though the config itself doesn't say so?"
    try:
        return not cls().tie_word_embeddings and cls(**{text: dict(tie_word_embeddings=True)}).tie_word_embeddings
    except Exception: return False


def config_types():
    "Config classes by model type: those of models that generate text, and their parts."
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as image
    transformers.logging.set_verbosity_error()
    models = {k: (causal.get(k), image.get(k)) for k in sorted({*causal, *image})}
    classes, waiting = {}, [(k, None) for k in models]
    while waiting:
        kind, cls = waiting.pop(0)
        if kind in classes or not kind: continue
        try: cls = cls or CONFIG_MAPPING[kind]
        except KeyError: continue
        classes[kind] = cls
        for spec in cls.sub_configs_defaults.values():
            known = spec.config_class if "AutoConfig" not in spec.config_class.__name__ else None
            waiting.append((spec.model_type, known))
    return models, classes


# What some classes need to be built that their config leaves unsaid
SPECIAL = dict(aya_vision={}, hunyuan_v1_dense=dict(head_dim=128), hunyuan_v1_moe=dict(head_dim=128),
               ministral=dict(head_dim=128), nemotron=dict(head_dim=128), reformer=dict(is_decoder=True))


def model_on_meta(name, config):
    "A model without memory, from the config or from its text part."
    import torch, transformers
    cls = getattr(transformers, name)
    for c in (config, config.get_text_config(decoder=True)):
        try:
            with torch.device("meta"): return cls(c)
        except Exception as e: last = e
    raise last


def children(module):
    "Names directly below a module."
    return sorted({n.split(".")[0] for n in module.state_dict()})


def tensor_names(kind, name, cls, table):
    "How the names in files of a model class become those in memory, and back."
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    prefix, tree = getattr(transformers, name).base_model_prefix, {}
    try:
        model = model_on_meta(name, cls(**SPECIAL.get(kind, {})))
        steps, top = get_model_conversion_mapping(model, add_legacy=False), children(model)
        inner = getattr(model, prefix, None) if prefix else None
        base = children(inner) if inner is not None and inner is not model else []
        if steps: tree = name_tree(model.state_dict())
    except Exception: # what doesn't depend on its parts
        steps, top, base = get_checkpoint_conversion_mapping(name) or get_checkpoint_conversion_mapping(kind) or [], [], []
    return dict(prefix=prefix, top=top, base=base, steps=[numbered(s, table) for s in steps], tree=tree)


def name_tree(names):
    "Names in memory as a tree; numbers are all alike."
    tree = {}
    for n in names:
        at = tree
        *path, leaf = ["*" if part.isdigit() else part for part in n.split(".")]
        for part in path: at = at.setdefault(part, {})
        at.setdefault("", [])
        if leaf not in at[""]: at[""].append(leaf)
    return tree


def numbered(step, table):
    "A step's number in the table of all, with the part of the model that it is for."
    said = json.dumps(step_as_list(step))
    return [table.setdefault(said, len(table)), step.scope_prefix, step.base_model_prefix]


def step_as_list(step):
    "One step: kind, patterns and names in memory, patterns and names to go back, operations."
    kind = dict(GroupWeightRename="group", PrefixChange="prefix").get(type(step).__name__)
    kind = kind or ("shift" if hasattr(step, "offset") else "convert" if hasattr(step, "operations") else "rename")
    back = step.reverse_transform()
    out = [kind, step.source_patterns, step.target_patterns, back.source_patterns, back.target_patterns]
    def said(op):
        return [type(op).__name__] + [getattr(op, k) for k in ("dim", "dim0", "dim1", "check_dims") if hasattr(op, k)]
    if kind == "convert": out.append([said(op) for op in step.operations])
    if kind == "shift": out.append(step.offset)
    return out


def collect(progress=lambda text: None):
    "The whole file."
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    models, classes = config_types()
    types, left_out, names, table = {}, {}, {}, {}
    for kind, cls in sorted(classes.items()):
        progress(kind)
        try: types[kind] = facts(kind, cls)
        except Exception as e: left_out[kind] = f"{type(e).__name__}: {str(e).splitlines()[0][:80]}"
    def first(x): return x[0] if isinstance(x, list | tuple) else x
    for kind, (causal, image) in models.items():
        if kind not in types: continue
        named = {k: v for k, v in dict(causal=first(causal), image_text=first(image)).items() if v}
        types[kind] |= named
        for name in named.values():
            progress(name)
            if name not in names: names[name] = tensor_names(kind, name, classes[kind], table)
    legacy = [numbered(s, table)[0] for s in get_checkpoint_conversion_mapping("legacy")]
    for n in names.values(): n["steps"] = [s if s[1] is not None else s[0] for s in n["steps"]]
    steps = {str(i): json.loads(said) for said, i in table.items()}
    about = dict(transformers=transformers.__version__, legacy=legacy)
    return dict(about=about, types=types, classes=names, steps=steps, left_out=left_out)


def as_text(found):
    "One fact a line, section, name and compact JSON between tabs: a change shows as a line, and a reader parses what it asks for."
    rows = [(section, name, fact) for section, facts in found.items() for name, fact in sorted(facts.items())]
    return "".join(f"{section}\t{name}\t{json.dumps(fact, separators=(',', ':'))}\n" for section, name, fact in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    args = parser.parse_args()
    text = as_text(collect(lambda kind: print(kind, file=sys.stderr) if os.environ.get("LOUD") else None))
    if not args.check:
        FILE.write_text(text, encoding="utf-8")
        print(f"{FILE.name}: {len(text):,} bytes")
    elif FILE.read_text(encoding="utf-8") != text:
        sys.exit(f"{FILE.name} is not what this transformers says. Run: python tools/architectures.py")
