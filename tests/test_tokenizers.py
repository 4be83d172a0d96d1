"Tokenizers of many kinds: one identity over files, releases and places of added tokens; a union that loads and reads as its members did."
import json, random, shutil
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from model_glue_nb.checkpoints.vocabularies import tokenizer_difference, tokenizer_identity
from model_glue_nb.core import InputError
from model_glue_nb.merging.merge import merge
from model_glue_nb.merging.recipes import recipe
from model_glue_nb.zoo.zoo import tiny_zoo

TEXTS = ["the quick brown fox jumps over the lazy dog", "merging models is averaging weights", "naïve café, 12 boxes!"]
OTHER = ["def merge(a, b): return a + b", "numbers: 314 159 265", "the weights of quick dogs"]

def byte_level(texts, size=320):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(texts * 4, trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False))
    return t

def unigram(texts):
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    t.train_from_iterator(texts * 4, trainers.UnigramTrainer(vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    return t

def word_pieces(texts):
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.train_from_iterator(texts * 4, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"], show_progress=False))
    return t

KINDS = dict(bytes=byte_level, unigram=unigram, word_pieces=word_pieces)

def saved(t, folder, *added):
    "Write a tokenizer as transformers does."
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(t.to_str()), bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if added: whole.add_tokens(list(added), special_tokens=True)
    whole.save_pretrained(folder)
    return folder

def rewritten(folder, change):
    f = folder/"tokenizer.json"
    t = json.loads(f.read_text())
    change(t)
    f.write_text(json.dumps(t))
    return folder

def older(t):
    "The spelling of releases before tokenizers 0.20."
    if t["model"].get("merges"): t["model"]["merges"] = [" ".join(m) for m in t["model"]["merges"]]
    for k in ("ignore_merges", "byte_fallback"): t["model"].pop(k, None)
    if (t["pre_tokenizer"] or {}).get("type") == "ByteLevel": t["pre_tokenizer"].pop("use_regex")

@pytest.mark.parametrize("kind", KINDS)
def test_two_releases_write_one_tokenizer(kind, tmp_path):
    t = KINDS[kind](TEXTS)
    a, b = saved(t, tmp_path/"a"), rewritten(saved(t, tmp_path/"b"), older)
    assert tokenizer_identity(a).fingerprint() == tokenizer_identity(b).fingerprint()
    other = saved(KINDS[kind](TEXTS + OTHER), tmp_path/"c")
    assert tokenizer_difference(tokenizer_identity(a), tokenizer_identity(other))

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [(), ("<x>",), ("<x>", "<y>")])
def test_tokens_are_those_of_transformers(kind, added, tmp_path):
    home = saved(KINDS[kind](TEXTS), tmp_path/"a", *added)
    assert tokenizer_identity(home).tokens == AutoTokenizer.from_pretrained(home).get_vocab()

def changed(t):
    "Changes after which some text is read in another way."
    def lower(t): t["normalizer"] = dict(type="Lowercase")
    def regex(t): t["pre_tokenizer"]["use_regex"] = False
    def prefix(t): t["pre_tokenizer"]["add_prefix_space"] = True
    def swapped(t):
        m = t["model"]["merges"]
        m[0], m[1] = m[1], m[0]
    def fewer(t): t["model"]["merges"].pop()
    def strips(t): t["added_tokens"][0]["lstrip"] = True
    def frame(t): t["post_processor"] = json.loads(framed.to_str())["post_processor"]
    framed = byte_level(TEXTS)
    framed.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return [lower, regex, prefix, swapped, fewer, strips, frame]

@pytest.mark.parametrize("which", range(7))
def test_what_changes_ids_is_seen(which, tmp_path):
    t = byte_level(TEXTS)
    one = tokenizer_identity(saved(t, tmp_path/"a"))
    two = tokenizer_identity(rewritten(saved(t, tmp_path/"b"), changed(t)[which]))
    assert one.fingerprint() != two.fingerprint() and tokenizer_difference(one, two)

@pytest.mark.parametrize("change", [
    lambda t: t.update(padding=dict(strategy="BatchLongest", direction="Left", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="<s>")),
    lambda t: t.update(truncation=dict(direction="Right", max_length=9, strategy="LongestFirst", stride=0)),
    lambda t: t.update(decoder=None),
    lambda t: t["pre_tokenizer"].update(trim_offsets=False),
    lambda t: t["model"].update(dropout=None)])
def test_what_saving_rewrites_is_not(change, tmp_path):
    t = byte_level(TEXTS)
    assert tokenizer_identity(saved(t, tmp_path/"a")).fingerprint() == tokenizer_identity(rewritten(saved(t, tmp_path/"b"), change)).fingerprint()

def test_vocabulary_and_merges_stand_for_the_whole(tmp_path):
    t = byte_level(TEXTS)
    fast = saved(t, tmp_path/"fast")
    slow = tmp_path/"slow"
    slow.mkdir()
    t.model.save(str(slow))
    shutil.copy(fast/"tokenizer_config.json", slow)
    assert tokenizer_identity(slow).fingerprint() == tokenizer_identity(fast).fingerprint()
    lines = (slow/"merges.txt").read_text().splitlines()
    (slow/"merges.txt").write_text("\n".join(lines[:-1]) + "\n")
    assert tokenizer_identity(slow).fingerprint() != tokenizer_identity(fast).fingerprint()

def sentencepiece_model(folder, kind, **more):
    import sentencepiece as spm
    folder.mkdir()
    (folder/"x.txt").write_text("\n".join((TEXTS + OTHER) * 20))
    spm.SentencePieceTrainer.train(input=str(folder/"x.txt"), model_prefix=str(folder/"tokenizer"), model_type=kind, minloglevel=2, **more)
    for f in ("x.txt", "tokenizer.vocab"): (folder/f).unlink()
    return folder

@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_is_read_as_its_library_reads_it(kind, tmp_path):
    import sentencepiece as spm
    home = sentencepiece_model(tmp_path/"sp", kind, vocab_size=330 if kind == "bpe" else 310, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    lib = spm.SentencePieceProcessor(str(home/"tokenizer.model"))
    one = tokenizer_identity(home)
    assert one.tokens == {lib.id_to_piece(i): i for i in range(lib.get_piece_size())}

def test_sentencepiece_pairs_equal_their_conversion(tmp_path):
    from transformers import LlamaTokenizer
    home = sentencepiece_model(tmp_path/"slow", "bpe", vocab_size=330, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    settings = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True, add_eos_token=False)
    (home/"tokenizer_config.json").write_text(json.dumps(settings))
    LlamaTokenizer.from_pretrained(home).save_pretrained(tmp_path/"fast")
    slow, fast = tokenizer_identity(home), tokenizer_identity(tmp_path/"fast")
    assert (slow.file, fast.file) == ("tokenizer.model", "tokenizer.json") and tokenizer_difference(slow, fast) == ""

PLACES = ["tokenizer.json", "added_tokens_decoder", "added_tokens.json"]
@pytest.mark.parametrize("place", PLACES)
def test_added_tokens_in_three_places(place, tmp_path):
    t = byte_level(TEXTS)
    home = saved(t, tmp_path/"a")
    n = t.get_vocab_size()
    words = {"<x>": n, "<y>": n + 1}
    bare = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    config = json.loads((home/"tokenizer_config.json").read_text())
    if place == "tokenizer.json":
        rewritten(home, lambda t: t["added_tokens"].extend(bare | dict(content=k, id=i) for k, i in words.items()))
    elif place == "added_tokens.json": (home/place).write_text(json.dumps(words))
    else:
        (home/"tokenizer_config.json").write_text(
            json.dumps(config | dict(added_tokens_decoder={i: bare | dict(content=k) for k, i in words.items()})))
    one = tokenizer_identity(home)
    assert words.items() <= one.tokens.items() and one.tokens == AutoTokenizer.from_pretrained(home).get_vocab()
    assert one.fingerprint() == tokenizer_identity(saved(t, tmp_path/"b", "<x>", "<y>")).fingerprint()
    assert "'<x>' has the id" in tokenizer_difference(one, tokenizer_identity(saved(t, tmp_path/"c", "<y>", "<x>")))

def test_files_that_change_are_read_again(tmp_path):
    home = saved(byte_level(TEXTS), tmp_path/"a")
    before = tokenizer_identity(home).fingerprint()
    rewritten(home, lambda t: t.update(normalizer=dict(type="Lowercase")))
    assert tokenizer_identity(home).fingerprint() != before

def test_odd_shapes_are_input_errors(tmp_path):
    refused = sum(odd_shape(seed, tmp_path/str(seed)) for seed in range(300))
    assert 30 < refused < 300

def odd_shape(seed, home): # Was it refused?
    rng = random.Random(seed)
    t = json.loads(byte_level_text())
    values = [None, 3, -1, 1e300, "x", [],
              {}, [[]], [3], {"type": 3},
              {"type": "Sequence"}, True, {"a": {"b": []}}]
    spots = ([(t, k) for k in t]
             + [(t["model"], k) for k in t["model"]]
             + [(t["added_tokens"][0], k) for k in t["added_tokens"][0]])
    for _ in range(rng.randint(1, 3)):
        place, key = rng.choice(spots)
        place[key] = rng.choice(values)
    home.mkdir()
    (home/"tokenizer.json").write_text(json.dumps(t))
    beside = {rng.choice(["bos_token", "added_tokens_decoder", "extra_special_tokens", "add_bos_token"]): rng.choice(values)}
    (home/rng.choice(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])).write_text(json.dumps(beside))
    try: tokenizer_identity(home)
    except InputError as e: return bool(str(e))
    return False

def byte_level_text():
    if not hasattr(byte_level_text, "kept"): byte_level_text.kept = byte_level(TEXTS[:1], 262).to_str()
    return byte_level_text.kept

def members(room, *tokenizers):
    "Tiny models with these tokenizers, folders in their order."
    out = []
    for i, (t, added) in enumerate(tokenizers):
        n = t.get_vocab_size() + len(added)
        name = f"m{i}"
        tiny_zoo(room, [name], vocab_size=n, seed=i)
        saved(t, room/name, *added)
        out.append(str(room/name))
    return out

def random_text(rng, known):
    return "".join(rng.choice(known) + rng.choice([" ", "", "  ", "\n", "é", "7"]) for _ in range(8))

def test_a_union_of_bytes_loads_and_reads_the_base_as_it_did(tmp_path):
    "A member's own words stay its own; whatever is read can be written again."
    from model_glue_nb.zoo.zoo import open_model
    base, other = byte_level(TEXTS), byte_level(OTHER)
    pair = members(tmp_path, (base, ("<x>", "<y>")), (other, ("<z>", "<x>")))
    merge(recipe("linear", pair, options=dict(tokenizer="union")), None, tmp_path/"out")
    new, old = AutoTokenizer.from_pretrained(tmp_path/"out"), [AutoTokenizer.from_pretrained(p) for p in pair]
    assert all(set(t.get_vocab()) <= set(new.get_vocab()) for t in old)
    assert (old[0].get_vocab().items() <= new.get_vocab().items()
            and len(set(new.get_vocab().values())) == len(new))
    assert max(new.get_vocab().values()) < open_model(tmp_path/"out").tensors["model.embed_tokens.weight"].shape[0]
    for t in ("<z>", "<x>", "<y>"):
        assert len(new(t)["input_ids"]) == 1 and new.convert_tokens_to_ids(t) == tokenizer_identity(tmp_path/"out").tokens[t]
    rng = random.Random(0)
    for _ in range(50):
        text = random_text(rng, " ".join(TEXTS + OTHER).split())
        assert new.decode(new(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    for text in TEXTS + OTHER: # the base's merges come first: whatever it joined stays joined, whole, at its places
        assert cuts(new, text) <= cuts(old[0], text)

def cuts(tokenizer, text):
    "Where tokens end, counted in bytes."
    ends, at = set(), 0
    for token in tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]):
        at += len(token)
        ends.add(at)
    return ends

def test_a_union_with_a_fine_tune_reads_as_both_did(tmp_path):
    t = byte_level(TEXTS)
    pair = members(tmp_path, (t, ()), (t, ("<x>", "<y>")))
    rewritten(tmp_path/"m0", older)
    merge(recipe("linear", pair, options=dict(tokenizer="union")), None, tmp_path/"out")
    new, tuned = AutoTokenizer.from_pretrained(tmp_path/"out"), AutoTokenizer.from_pretrained(pair[1])
    rng = random.Random(2)
    for _ in range(50):
        text = random_text(rng, " ".join(TEXTS + OTHER).split() + ["<x>", "<y>"])
        assert new(text)["input_ids"] == tuned(text)["input_ids"]

@pytest.mark.parametrize("kind", ["unigram", "word_pieces"])
def test_other_kinds_join_by_added_tokens_only(kind, tmp_path):
    t = KINDS[kind](TEXTS)
    pair = members(tmp_path, (t, ("<x>",)), (t, ("<y>", "<x>")))
    merge(recipe("linear", pair, options=dict(tokenizer="union")), None, tmp_path/"out")
    new, old = AutoTokenizer.from_pretrained(tmp_path/"out"), AutoTokenizer.from_pretrained(pair[0])
    rng = random.Random(1)
    for _ in range(50):
        text = random_text(rng, " ".join(TEXTS).split() + ["<x>"])
        assert new(text)["input_ids"] == old(text)["input_ids"]
    assert len(new("<y>", add_special_tokens=False)["input_ids"]) == 1
    far = members(tmp_path/"far", (t, ()), (KINDS[kind](TEXTS + OTHER), ()))
    with pytest.raises(InputError, match="cannot join a union"):
        merge(recipe("linear", far, options=dict(tokenizer="union")), None, tmp_path/"no")

def test_kinds_that_differ_are_refused_and_named(tmp_path):
    pair = members(tmp_path, (byte_level(TEXTS), ()), (unigram(TEXTS), ()))
    with pytest.raises(InputError, match="it is a Unigram tokenizer, that of 'm0' a BPE"):
        merge(recipe("linear", pair, options=dict(tokenizer="union")), None, tmp_path/"no")

def test_swapped_added_tokens_are_refused_or_put_right(tmp_path):
    import numpy as np
    from model_glue_nb.zoo.zoo import open_model
    t = byte_level(TEXTS)
    pair = members(tmp_path, (t, ("<x>", "<y>")), (t, ("<y>", "<x>")))
    n = t.get_vocab_size()
    with pytest.raises(InputError, match="tokenizer"): merge(recipe("linear", pair), None, tmp_path/"no")
    a, b = (open_model(p).values("model.embed_tokens.weight") for p in pair)
    for choice in ("base", "union"):
        merge(recipe("linear", pair, options=dict(tokenizer=choice, out_dtype="float32")), None, tmp_path/choice)
        got = open_model(tmp_path/choice).values("model.embed_tokens.weight")
        assert (np.allclose(got[n], (a[n] + b[n + 1]) / 2, atol=1e-6)
                and np.allclose(got[n + 1], (a[n + 1] + b[n]) / 2, atol=1e-6))

def test_another_models_tokenizer_brings_no_code_and_no_links(tmp_path):
    t = byte_level(TEXTS)
    pair = members(tmp_path, (t, ()), (t, ("<x>",)))
    secret = tmp_path/"secret"
    secret.write_text("key")
    from pathlib import Path
    home = Path(pair[1])
    f = home/"tokenizer_config.json"
    f.write_text(json.dumps(json.loads(f.read_text()) | dict(auto_map=dict(AutoTokenizer=[None, "x.Y"]))))
    merge(recipe("linear", pair, options=dict(tokenizer=str(home))), None, tmp_path/"out")
    assert "auto_map" not in json.loads((tmp_path/"out"/"tokenizer_config.json").read_text())
    (home/"added_tokens.json").symlink_to(secret)
    with pytest.raises(InputError, match="link out of its folder"):
        merge(recipe("linear", pair, options=dict(tokenizer=str(home))), None, tmp_path/"two")
