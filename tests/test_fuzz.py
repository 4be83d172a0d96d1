"Whatever stands in a file, a command accepts it or says what is wrong: no traceback, no hang, no gigabyte, no write outside."
import sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tools"))
import fuzz
sys.path.pop(0)

EXAMPLES = 60 # Of each format: about a minute in all on one core
FOUND = dict( # Inputs that once ended badly, as small as they were found: format, bytes, number of the command
    header_is_a_number=("header", b"\x01" + bytes(7) + b"3", 0), header_is_deep=("header", b"\xb8\x0b" + bytes(6) + b"[" * 3000, 1),
    offsets_are_nested=("header", b'\x3b' + bytes(7) + b'{"x": {"dtype": "BF16", "shape": [64, 32], "data_offsets": 3}}', 0),
    index_is_a_number=("index", b"3", 0), index_is_empty=("index", b"{}", 0), index_is_utf16=("index", b"\xff\xfe{\x00}\x00", 1),
    index_names_a_list=("index", b'{"weight_map": {"lm_head.weight": ["x"]}}', 0), index_is_cut=("index", b'{"weight_map', 0),
    config_is_a_number=("config", b"3", 0), config_is_deep=("config", b'{"architectures": ' + b"[" * 900 + b"]" * 900 + b"}", 1),
    config_is_infinite=("config", b"1e+308", 1), tokenizer_is_a_number=("tokenizer", b"3", 0), tokenizer_is_empty=("tokenizer", b"", 0),
    tokenizer_has_a_mark=("tokenizer", b'\xef\xbb\xbf{"version": "1.0"}', 1), template_is_a_number=("tokenizer_config", b"3", 0),
    template_is_cut=("tokenizer_config", b"{", 0), adapter_is_a_number=("adapter", b"3", 0), adapter_is_empty=("adapter", b"", 0),
    adapter_without_a_rank=("adapter", b'{"peft_type": "LORA", "lora_alpha": 8, "target_modules": ["q_proj"]}', 0),
    adapter_with_words=("adapter", b'{"peft_type": "LORA", "r": 4, "lora_alpha": "~", "target_modules": ["q_proj"]}', 0),
    card_is_utf16=("card", b"\xff\xfe-\x00-\x00-\x00\n\x00", 2), card_is_deep=("card", b"---\nx: " + b"[" * 900 + b"]" * 900 + b"\n---\n", 0),
    recipe_has_a_control=("merge", b'"[/\x1a"', 0), recipe_is_latin=("merge", b"merge_method: caf\xe9 \x89", 0),
    recipe_is_deep=("merge", b"[" * 3000 + b"]" * 3000, 0), run_is_deep=("run", b"suite: " + b"[" * 3000 + b"]" * 3000, 0),
    run_has_half_a_pair=("run", b'{"zoo": "zoo", "suite": "\\ud800"}', 0),
    router_is_a_list=("mixture", b'{"experts": ["a", "b"], "zoo": "zoo", "router": {"name": ["linear"]}}', 0),
    suite_has_a_control=("suite", b'"\x0b"', 0), grid_is_deep=("grid", b"suite: " + b"{a: " * 900 + b"}" * 900, 0),
    store_lacks_columns=("store", fuzz.database(["a", "t"]), 0), list_holds_a_number=("zoo_list", b'["zoo/a", 3]', 0),
    list_is_utf16=("zoo_list", b'\xff\xfe[\x00"\x00z\x00"\x00', 0), list_is_cut=("zoo_list", b"[", 0), table_is_markup=("table", b"model,arc\n[/],0.5\n", 0),
    results_name_markup=("results", b'{"results": {"arc": {"acc,none": 0.5}}, "model_name": "[/]"}', 0),
    results_are_deep=("results", b'{"results": {}, "x": ' + b"[" * 900 + b'"\\ud800"' + b"]" * 900 + b"}", 0),
    adapter_is_deep=("adapter", b'{"r": 4, "x": ' + b"[" * 900 + b'"\\ud800"' + b"]" * 900 + b"}", 0),
    adapter_is_endless=("adapter", b'{"r": 4, "target_modules": ["q_proj"], "lora_alpha": 1' + b"0" * 400 + b"}", 0),
    config_is_endless=("config", b'{"rms_norm_eps": 1' + b"0" * 400 + b"}", 0), table_has_a_model=("table", b"model,task,score\na,model,0.5\n", 0),
    list_repeats=("zoo_list", b'["zoo/a"' + b', "zoo/a"' * 9000 + b"]", 0),
    recipe_is_endless=("merge", b"merge_method: linear\nmodels: [zoo/a, zoo/b]\nparameters: {weight: [1" + b"0" * 299 + b", 1]}\n", 0))

@pytest.fixture(scope="module")
def worker():
    before, seconds = dict(fuzz.os.environ), fuzz.SECONDS
    fuzz.SECONDS = 60 # a busy machine is slow, which is no fault of ours
    w = fuzz.Worker()
    yield w
    w.stop()
    fuzz.os.environ.clear()
    fuzz.os.environ.update(before)
    fuzz.SECONDS = seconds

@pytest.mark.parametrize("name", FOUND)
def test_what_once_ended_badly_is_refused_or_accepted(name, worker):
    kind = worker(*FOUND[name])
    assert fuzz.good(kind), kind

@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_any_input_is_accepted_or_refused_in_words(name, worker):
    pytest.importorskip("hypothesis")
    counts, failed = fuzz.search(name, EXAMPLES, worker)
    assert sum(counts.values()) >= EXAMPLES / 2
    assert not failed, "\n".join(f"{kind}: {made[:200]!r}" for kind, made, _ in failed.values())

def test_the_watch_sees_what_it_is_there_for(tmp_path, worker, monkeypatch):
    "A child that hangs, takes a gigabyte, fails or writes outside is noticed."
    import time
    import model_glue_nb.cli.program as cli
    deeds = dict(HANG=lambda: time.sleep(60),
                 TRACEBACK=lambda: bytearray(2 * 10**9),
                 WRITES=lambda: (tmp_path/"x").write_text("x"),
                 FAULT=lambda: sys.exit(1), ESCAPE=lambda: print("\x1b[31m"))
    for kind, deed in deeds.items():
        worker.stop()
        monkeypatch.setattr(cli, "main", deed)
        monkeypatch.setattr(fuzz, "SECONDS", 1 if kind == "HANG" else 60) # a busy machine is slow to fail
        assert worker.run(["doctor"]).startswith(kind), kind
    worker.stop()
