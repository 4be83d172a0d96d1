"Members as they lie about: which files make a model, what its numbers are, and one reason for whatever is wrong."
import json, os, random, shutil, struct, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from model_glue_nb.checkpoints import content
from model_glue_nb.checkpoints.checkpoint import ZooModel, open_model
from model_glue_nb.checkpoints.headers import read_header
from model_glue_nb.core import InputError
from model_glue_nb.mergeability.doctor import examine_zoo, members_table, pairs_table
from model_glue_nb.zoo.compatibility import compare_pair
from model_glue_nb.zoo.zoo import read_zoo

H, I, V = 8, 12, 16
WORDS = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, V)}
CONFIG = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=H, intermediate_size=I, num_hidden_layers=1, vocab_size=V,
              num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, rms_norm_eps=1e-6)

def weights(seed=0):
    "The tensors of a Llama of one layer."
    p, rng = "model.layers.0.", np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (V, H), "lm_head.weight": (V, H), "model.norm.weight": (H,), p + "mlp.gate_proj.weight": (I, H),
              p + "mlp.up_proj.weight": (I, H), p + "mlp.down_proj.weight": (H, I), p + "input_layernorm.weight": (H,), p + "post_attention_layernorm.weight": (H,)}
    shapes |= {f"{p}self_attn.{x}_proj.weight": (H, H) for x in "qkvo"}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}

def member(folder, seed=0, tensors=None, **config):
    "A whole member, written by hand."
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(seed) if tensors is None else tensors, folder/"model.safetensors")
    (folder/"config.json").write_text(json.dumps(CONFIG | config))
    model = dict(type="WordLevel", vocab=WORDS, unk_token="<unk>")
    (folder/"tokenizer.json").write_text(json.dumps(dict(version="1.0", added_tokens=[], pre_tokenizer=dict(type="Whitespace"), model=model)))
    return folder

def file_with(path, head, body):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path

def reason(folder):
    "Why one member of a zoo with a good neighbour is set aside."
    member(folder.parent/"good", 9)
    zoo = read_zoo([folder, folder.parent/"good"])
    assert "good" in zoo.names
    return zoo.skipped.get(folder.name, "")

# --- headers -----------------------------------------------------------------------------------------------------------------------------------

def test_no_header_is_read_that_the_library_refuses(tmp_path):
    "Random changes of a good header: what safetensors refuses, we refuse; what we read, it reads alike."
    rng, file, read = random.Random(0), tmp_path/"w.safetensors", 0
    good = {"a": dict(dtype="F32", shape=[2, 3], data_offsets=[0, 24]),
            "b": dict(dtype="BF16", shape=[4], data_offsets=[24, 32]),
            "c": dict(dtype="I64", shape=[], data_offsets=[32, 40])}
    odd = [0, 1, -1, 8, 24, 2**63,
           2**64, 10**30, 1.5, 24.0, True, None, "1",
           [], [0], {}, "F32", "F16", "F8_E4M3", "F4", "NF4"]
    for _ in range(1500):
        head = json.loads(json.dumps(good))
        t = head[rng.choice("abc")]
        key = rng.choice(list(t))
        if key == "dtype" or rng.random() < .2: t[key] = rng.choice(odd)
        elif t[key]: t[key][rng.randrange(len(t[key]))] = rng.choice(odd)
        if rng.random() < .1: head["d"] = dict(good["a"])
        if rng.random() < .1: del head[rng.choice(list(head))]
        file_with(file, head, bytes(40 + rng.choice([0, 0, 0, -1, 1])))
        try:
            with safe_open(file, "np") as f: theirs = sorted(f.keys())
        except SafetensorError: theirs = None
        try: ours = sorted(read_header(file))
        except InputError: ours = None
        assert ours == theirs, head
        read += ours is not None
    assert 50 < read < 1400, "both outcomes were tried"

def test_own_rules_are_as_strict_where_a_file_cannot_be_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("model_glue_nb.checkpoints.headers.library_verdict", lambda file: "")
    entry = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
    assert list(read_header(file_with(tmp_path/"w", {"a": entry}, bytes(8)))) == ["a"]
    for change in (dict(data_offsets=[0, 4]),
                   dict(data_offsets=[4, 12]),
                   dict(data_offsets=[-8, 0]), dict(shape=[2.0]),
                   dict(shape=[True, 2]), dict(dtype=3)):
        with pytest.raises(InputError, match="'a'"):
            read_header(file_with(tmp_path/"w", {"a": entry | change}, bytes(8)))
    with pytest.raises(InputError, match="'b' overlaps"):
        read_header(file_with(tmp_path/"w", {"a": entry, "b": entry}, bytes(8)))

def test_a_long_header_is_not_read(tmp_path):
    "A sparse file of 20 GB that says that it is all header."
    with open(tmp_path/"w", "wb") as f:
        f.write(struct.pack("<Q", 20 * 10**9))
        f.truncate(20 * 10**9 + 8)
    with pytest.raises(InputError, match="gives its header 20,000,000,000 bytes"): read_header(tmp_path/"w")

# --- which files -------------------------------------------------------------------------------------------------------------------------------

def shard(folder, places, **files):
    (folder/"model.safetensors").unlink()
    for name, tensors in files.items(): save_file(tensors, folder/f"{name}.safetensors")
    (folder/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map={k: f"{f}.safetensors" for k, f in places.items()})))

def test_a_tensor_that_stands_twice_is_taken_where_the_index_says(tmp_path):
    t = weights()
    names = sorted(t)
    a = member(tmp_path/"a")
    one, two = ({k: t[k] for k in names[:5]},
                {k: t[k] for k in names[5:]} | {names[0]: t[names[0]] * 0})
    for first in ("x", "z"): # whichever file comes first by name
        member(a)
        shard(a, {k: first if k in one else "y" for k in names}, **{first: one, "y": two})
        assert np.array_equal(open_model(a).values(names[0]), t[names[0]]), first

@pytest.mark.parametrize("file", ["consolidated.safetensors", "consolidated.00.safetensors", "model.fp16.safetensors", "adapter_model.safetensors",
                                  "optimizer.safetensors", "model-00001-of-00002.safetensors", "original.safetensors"])
def test_weights_beside_the_model_are_not_its_own(tmp_path, file):
    a = member(tmp_path/"a")
    save_file({"odd": np.ones(3, np.float32)}, a/file)
    assert set(open_model(a).stored) == set(weights())

def test_a_config_may_name_its_file(tmp_path):
    a = member(tmp_path/"a", transformers_weights="other.safetensors")
    save_file(weights(5), a/"other.safetensors")
    assert np.array_equal(open_model(a).values("model.norm.weight"), weights(5)["model.norm.weight"])
    member(tmp_path/"b", transformers_weights="../a/other.safetensors")
    assert "outside the folder" in reason(tmp_path/"b")

@pytest.mark.parametrize("places", ["../b/model.safetensors", "/etc/hostname", "a/../../b/model.safetensors", "", "no.safetensors", "pipe.safetensors", "link.safetensors", 3, None, ["x"]])
@pytest.mark.parametrize("beside", [False, True])
def test_an_index_stays_in_its_folder(tmp_path, places, beside):
    a, b = member(tmp_path/"a"), member(tmp_path/"b", 3)
    os.mkfifo(a/"pipe.safetensors")
    os.symlink(b/"model.safetensors", a/"link.safetensors")
    if not beside: (a/"model.safetensors").unlink()
    (a/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map={k: places for k in weights()})))
    leaves = isinstance(places, str) and (".." in places or places.startswith("/"))
    assert bool(reason(a)) == (leaves or not beside)

def test_links_as_the_hub_makes_them_are_followed_and_no_others(tmp_path):
    b = member(tmp_path/"b")
    cache = tmp_path/"models--org--m"
    snapshot = cache/"snapshots"/"rev"
    snapshot.mkdir(parents=True)
    (cache/"blobs").mkdir()
    for i, f in enumerate(sorted(b.iterdir())):
        shutil.copyfile(f, cache/"blobs"/f"{i:064x}")
        os.symlink(f"../../blobs/{i:064x}", snapshot/f.name)
    assert read_zoo([snapshot]).names == ["rev"] and open_model(snapshot).fingerprint() == open_model(b).fingerprint()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "merges.txt"):
        a = member(tmp_path/"a")
        (a/name).unlink(missing_ok=True)
        os.symlink(b/"tokenizer.json" if name == "merges.txt" else b/name, a/name)
        assert "link out of its folder" in reason(a), name
        shutil.rmtree(a)

# --- members with something wrong --------------------------------------------------------------------------------------------------------------

FILES = {"config.json": ["", "[]", "null", "1", "{", "[" * 100_000, '{"a":' + "9" * 6000 + "}", '{"architectures": ["/../../x"]}', '{"architectures": [["x"]]}', b"\xff\xfe\x00"],
         "tokenizer.json": ["", "[]", '{"model": []}', '{"model": {"vocab": 3}}', "[" * 100_000], "tokenizer_config.json": ["no", "[]"],
         "model.safetensors": [b"", b"\0" * 8, b"{}", struct.pack("<Q", 5) + b"{", struct.pack("<Q", 2) + b"{}"]}

@pytest.mark.parametrize("file,text",
                         [(f, t) for f, texts in FILES.items() for t in texts],
                         ids=lambda x: str(x)[:20])
def test_a_broken_file_is_a_reason_and_the_rest_goes_on(tmp_path, file, text):
    a = member(tmp_path/"a")
    (a/file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "a" in reason(a) and "Traceback" not in reason(a)
    cases = examine_zoo(tmp_path)
    table = members_table(cases).set_index("model")
    assert table.problem["a"] and not table.problem["good"]
    assert pairs_table(cases).verdict.tolist() == ["neither"]

@pytest.mark.parametrize("config",
                         [dict(num_hidden_layers="x"), dict(num_hidden_layers=[1]),
                          dict(vocab_size={}), dict(rope_scaling="x"), dict(rope_parameters=[1]),
                          dict(num_attention_heads="two"), dict(_name_or_path=[1]), dict(quantization_config="x"), dict(text_config=3), dict(hidden_size=None),
                          dict(model_type=[1]), dict(model_type="nobody"), dict(rms_norm_eps="small"),
                          dict(auto_map=1), dict(tie_word_embeddings="x"), dict(layer_types=3)])
def test_odd_settings_end_nothing(tmp_path, config):
    member(tmp_path/"a", **config)
    member(tmp_path/"b")
    cases = examine_zoo(tmp_path)
    members_table(cases)
    assert len(pairs_table(cases)) == 1
    read_zoo(tmp_path)

@pytest.mark.parametrize("card", [b"---\nbase_model: org/b\nx: \xe9\n---\n", "---\nbase_model: org/b\n---\n".encode("utf-16"), b"\xef\xbb\xbf---\r\nbase_model: org/b\r\n---\r\n",
                                  b"---\nbase_model:\n- org/b\n---\n" + b"\xc3\xa9" * 400_000])
def test_a_card_in_any_encoding(tmp_path, card):
    a = member(tmp_path/"a")
    (a/"README.md").write_bytes(card)
    assert open_model(a).base == "b" and not reason(a)

def test_a_card_that_is_a_bomb_or_a_pipe_costs_nothing(tmp_path):
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i-1}'] * 10)}]\n" for i in range(1, 9))
    a = member(tmp_path/"a")
    (a/"README.md").write_text(f"---\n{bomb}license: *a8\n---\n")
    os.mkfifo(member(tmp_path/"b")/"README.md")
    notes = [c.notes for c in examine_zoo(tmp_path)]
    assert all(any("card is not read" in n for n in x) for x in notes) and read_zoo(tmp_path).names == ["a", "b"]

def test_an_unforeseen_error_is_a_reason(tmp_path, monkeypatch):
    member(tmp_path/"a")
    member(tmp_path/"b")
    def fails_for_one(weights):
        if weights.files[0].parent.name == "a": raise ZeroDivisionError("odd")
        return read_header(weights.files[0])
    monkeypatch.setattr("model_glue_nb.checkpoints.checkpoint.stored_tensors", fails_for_one)
    assert "ZeroDivisionError" in read_zoo(tmp_path).skipped["a"] and read_zoo(tmp_path).names == ["b"]

def test_names_only_show(tmp_path):
    a = member(tmp_path/"x\x1b[31m\nred")
    assert "\x1b" not in open_model(a).name and "\n" not in open_model(a).name
    for f in ("config.json", "tokenizer.json"): (a/f).write_text("[")
    with pytest.raises(InputError) as e: read_zoo([a])
    assert "\x1b" not in str(e.value)

# --- what the numbers are ----------------------------------------------------------------------------------------------------------------------

def packed(kind):
    t, k = weights(), "model.layers.0.mlp.up_proj."
    w = t.pop(k + "weight")
    if kind == "gptq":
        return (t
                | {k + "qweight": np.zeros((1, I), np.int32),
                   k + "qzeros": np.zeros((1, 1), np.int32),
                   k + "scales": np.ones((1, I), np.float16)})
    if kind == "bnb4":
        return (t
                | {k + "weight": np.zeros((48, 1), np.uint8),
                   k + "weight.absmax": np.ones(2, np.float32),
                   k + "weight.quant_map": np.ones(16, np.float32)})
    if kind == "int8":
        return t | {k + "weight": np.zeros((I, H), np.int8), k + "SCB": np.ones(I, np.float32)}
    if kind == "uint8": return t | {k + "weight": np.zeros((I, H // 2), np.uint8)}
    if kind == "mxfp4":
        return (t
                | {k[:-1] + "_blocks": np.zeros((I, 1, 16), np.uint8),
                   k[:-1] + "_scales": np.zeros((I, 1), np.uint8)})
    if kind == "compressed":
        return (t
                | {k + "weight_packed": np.zeros((I, 1), np.int32),
                   k + "weight_scale": np.ones((I, 1), np.float32),
                   k + "weight_shape": np.array([I, H])})

@pytest.mark.parametrize("kind", ["gptq", "bnb4", "int8", "uint8", "mxfp4", "compressed"])
def test_packed_weights_are_known_by_their_tensors(tmp_path, kind):
    a = open_model(member(tmp_path/"a", tensors=packed(kind)))
    b = open_model(member(tmp_path/"b"))
    assert a.quantised and not a.quantised.readable and b.quantised is None
    assert compare_pair(a, b).kind == "mix only" and "quantized" in compare_pair(b, a).reason

def test_tensors_without_values_are_named(tmp_path):
    t = weights()
    t["model.norm.weight"] = np.zeros(0, np.float32)
    member(tmp_path/"a", tensors=t)
    assert "'model.norm.weight'" in reason(tmp_path/"a") and "ZeRO-3" in reason(tmp_path/"a")

# --- content -----------------------------------------------------------------------------------------------------------------------------------

def test_every_byte_counts(tmp_path):
    big = member(tmp_path/"a", tensors=weights() | {"x": np.zeros(5_000_000, np.float32)})
    file = big/"model.safetensors"
    m = ZooModel("a", big)
    rng, seen = random.Random(0), {m.fingerprint()}
    for at in [file.stat().st_size - 1, 2**23 + 1000,
               *(rng.randrange(2000, file.stat().st_size - 9) for _ in range(40))]:
        with open(file, "r+b") as f:
            f.seek(at)
            x = f.read(1)[0]
            f.seek(at)
            f.write(bytes([x ^ rng.randrange(1, 256)]))
        seen.add(m.fingerprint())
    assert len(seen) == 43

def test_a_file_with_its_old_times_is_read_again(tmp_path):
    file = tmp_path/"w"
    file.write_bytes(b"a" * 10**6)
    def later(): return time.time() + 10
    first, was = content.file_fingerprint(file, later), file.stat()
    file.write_bytes(b"b" * 10**6)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert content.file_fingerprint(file, later) != first

def test_what_is_remembered_is_not_read_and_a_cache_that_cannot_be_written_is_no_trouble(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    monkeypatch.setattr(content, "_seen", {})
    file = tmp_path/"w"
    file.write_bytes(b"a" * 10**6)
    def later(): return time.time() + 10
    first = content.file_fingerprint(file, later)
    content._seen.clear()
    monkeypatch.setattr(content, "hash_file", lambda path: pytest.fail("read again"))
    assert content.file_fingerprint(file, later) == first
    with pytest.raises(pytest.fail.Exception): # changed a moment ago: not trusted
        content.file_fingerprint(file)
    monkeypatch.undo()
    (tmp_path/"no").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"no"))
    assert content.file_fingerprint(file, later) == first

# --- eras, adapters, memory --------------------------------------------------------------------------------------------------------------------

def test_spellings_of_two_eras_are_one_meaning(tmp_path):
    a = open_model(member(tmp_path/"a", rope_theta=500000.0))
    b = open_model(member(tmp_path/"b", 1, rope_parameters=dict(rope_theta=500000.0, rope_type="default")))
    c = open_model(member(tmp_path/"c", 2))
    assert str(compare_pair(a, b)) == "" and compare_pair(a, b).kind == "as is"
    assert compare_pair(a, c).notes[0].startswith("RoPE 500000 default and 10000") and compare_pair(a, c).kind == "as is"

def lora(folder, base):
    k = "base_model.model.model.layers.0.mlp.up_proj"
    folder.mkdir()
    save_file({f"{k}.lora_A.weight": np.ones((1, H), np.float32), f"{k}.lora_B.weight": np.ones((I, 1), np.float32)},
              folder/"adapter_model.safetensors")
    (folder/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=1, lora_alpha=2, base_model_name_or_path=base)))

def test_a_base_with_an_adapter_is_a_member(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    home = tmp_path/"zoo"
    a = member(home/"a")
    lora(home/"lora", "org/a")
    lora(home/"orphan", "org/x")
    (home/"z.yaml").write_text("- a\n- a+lora\n")
    zoo = read_zoo(home)
    k = "model.layers.0.mlp.up_proj.weight"
    assert zoo.names == ["a", "a+lora"] and "which the zoo lacks" in zoo.skipped["orphan"]
    for z in (zoo, read_zoo(home/"z.yaml"), read_zoo([a, f"{a}+{home/'lora'}"])):
        assert np.allclose(z["a+lora"].values(k), weights()[k] + 2, atol=1e-5) and z["a+lora"].base == "a"
    cases = examine_zoo(home/"z.yaml")
    assert [c.model.name for c in cases] == ["a", "a+lora"] and pairs_table(cases).verdict.tolist() == ["as is"]

def test_a_checkpoint_and_an_adapter_in_one_folder_are_two_faced(tmp_path):
    a = member(tmp_path/"a")
    (a/"adapter_config.json").write_text("{}")
    assert "a checkpoint and an adapter in one folder" in reason(a)

def test_a_file_that_shrinks_is_an_error_and_not_the_end(tmp_path):
    m = open_model(member(tmp_path/"a"))
    m.values("model.norm.weight")
    os.truncate(m.path/"model.safetensors", 200)
    with pytest.raises(InputError, match="became shorter"): m.raw("model.norm.weight")

def test_similarity_is_the_same_where_memory_is_limited(tmp_path):
    for i, n in enumerate("abc"): member(tmp_path/n, i)
    code = ("import resource, sys\nfrom model_glue_nb.zoo.zoo import read_zoo\nfrom model_glue_nb.mergeability.similarity import similarity\nfrom model_glue_nb.mergeability import pairs\nimport pandas\n"
            f"zoo = read_zoo({str(tmp_path)!r}); free = similarity(zoo)\npairs.address_space = lambda: 1000\n"
            "assert type(pairs.files_for(1, list(zoo))).__name__ == 'Files'\ntight = similarity(zoo)\nassert (free.values == tight.values).all() and free.notna().all().all()")
    p = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-800:]
