"Values that no file and no option may have: numbers without end, depth, names that are taken, members that are named twice."
import json
import sys
import time
from pathlib import Path

import pytest
import yaml

from model_glue_nb.core import InputError
from model_glue_nb.reading import parse_json, parse_yaml
from model_glue_nb.schemas import setting_kinds
from model_glue_nb.searching.search import check_options
from model_glue_nb.searching.strategies import strategies

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tools"))
import fuzz
sys.path.pop(0)

@pytest.fixture(scope="module")
def room(tmp_path_factory):
    "Two members, an adapter and a suite, as the fuzzer makes them."
    root = tmp_path_factory.mktemp("room")
    fuzz.prepare(root)
    return root

@pytest.fixture
def command(room, monkeypatch, capsys):
    "Run one command in the room: exit code, standard output, standard error."
    def run(*args):
        from model_glue_nb.cli.program import main
        monkeypatch.chdir(room)
        monkeypatch.setattr(sys, "argv", ["model-glue", *map(str, args)])
        with pytest.raises(SystemExit) as e: main()
        out, err = capsys.readouterr()
        return e.value.code or 0, out, err
    return run

@pytest.fixture
def refused(command):
    def run(*args, says=""):
        code, out, err = command(*args)
        assert code == 2 and says in err and "Traceback" not in err and err.strip().count("\n") == 0, (code, out, err)
        return err
    return run

# --- depth

NESTED = ["[" * n + r'"\ud800"' + "]" * n for n in (70, 200, 330, 900)] + ['{"a": ' * 300 + r'"\udc00"' + "}" * 300]

@pytest.mark.parametrize("deep", NESTED, ids=["70", "200", "330", "900", "keys"])
def test_what_is_nested_deeply_is_bad_input(room, refused, deep):
    results, adapter = room/"results_x.json", room/"adapter"/"adapter_config.json"
    results.write_text('{"results": {"arc": {"acc,none": 0.5}}, "config": {"x": %s}}' % deep)
    refused("import", "results_x.json", says="is nested too deeply")
    valid = adapter.read_text()
    adapter.write_text(valid[:-1] + ', "revision": %s}' % deep)
    try: refused("merge", "lora.yaml", "out", says="is nested too deeply")
    finally: adapter.write_text(valid)

def test_yaml_is_as_shallow_as_json(room, refused):
    for text in ("- " * 70 + "x", "[" * 70 + "]" * 70, "\n".join(" " * i + "a:" for i in range(70))):
        with pytest.raises(InputError, match="nested too deeply"): parse_yaml(text, "x.yaml")

# --- numbers

LONG = ["9" * 309, "-" + "9" * 400, "9" * 4400]

@pytest.mark.parametrize("number", LONG, ids=["309", "-400", "4400"])
def test_numbers_without_end_are_bad_input(room, refused, number):
    for read, text in ((parse_json, '{"a": [{"b": %s}]}'), (parse_yaml, "a: [{b: %s}]")):
        with pytest.raises(InputError, match="digits"): read(text % number, "x")
    places = {"adapter/adapter_config.json": (fuzz.ADAPTER, "lora_alpha", ["merge", "lora.yaml", "out"]),
              "zoo/b/config.json": (fuzz.CONFIG, "rms_norm_eps", ["merge", "merge.yaml", "out"]),
              "suite/suite.yaml": (fuzz.SUITE, "search_share", ["score", "zoo", "--suite", "suite/suite.yaml", "--dry-run"])}
    for file, (valid, key, args) in places.items():
        before = (room/file).read_text()
        (room/file).write_text(json.dumps(valid | {key: "@"}).replace('"@"', number))
        try: refused(*args)
        finally: (room/file).write_text(before)

ODD = [float("nan"), float("inf"), -float("inf"), 1e308, 10**299, 2**70, "8", True, [], {}]

@pytest.mark.parametrize("key", ["lora_alpha", "r"])
def test_odd_numbers_of_an_adapter_are_accepted_or_named(room, command, key):
    file = room/"adapter"/"adapter_config.json"
    valid = file.read_text()
    for odd in ODD:
        file.write_text(json.dumps(fuzz.ADAPTER | {key: odd}))
        code, out, err = command("merge", "lora.yaml", "out", "--overwrite")
        assert code in (0, 2), (odd, err)
        if odd not in (2**70, 10**299): assert code == 2 and key in err, (odd, err)
    file.write_text(valid)

@pytest.mark.parametrize("odd", [2**70, -2**70, 10**299])
def test_large_numbers_spread_over_depth(room, command, odd):
    merge = dict(merge_method="linear", models=[dict(model=f"zoo/{m}", parameters=dict(weight=[odd, 1])) for m in "ab"])
    (room/"x.yaml").write_text(yaml.safe_dump(merge))
    code, _, err = command("merge", "x.yaml", "out", "--overwrite")
    assert code in (0, 2), err

# --- names

def test_a_task_is_not_called_as_our_columns(room, refused, command):
    file = room/"suite"/"suite.yaml"
    valid = file.read_text()
    for name in ("model", "mean", "rank", "low", "score", "gain"):
        file.write_text(json.dumps(fuzz.SUITE | dict(tasks=[dict(name=name, file="q.jsonl")])))
        refused("score", "zoo", "--suite", "suite/suite.yaml", "--dry-run", says=f"called '{name}'")
    file.write_text(valid)
    (room/"x.csv").write_text("model,task,score\na,model,.5\n")
    refused("import", "x.csv", says="called 'model'")
    for header in ("model,arc,arc", "arc,arc", "model,arc,model"):
        (room/"x.csv").write_text(header + "\n" + "a,.5,.5"[:2 * header.count(",") + 3] + "\n")
        refused("import", "x.csv", says="two columns")
    (room/"x.csv").write_text("model,mean,rank\na,.5,1\n")
    code, out, _ = command("import", "x.csv", "--json")
    assert code == 0 and json.loads(out) == [dict(model="a", mean=.5, rank=1)]

def test_a_member_may_be_called_as_a_column_is(room, command):
    import shutil
    for name in ("model", "mean"): shutil.copytree(room/"zoo"/"a", room/"named"/name)
    for more in ((), ("--json",)):
        code, out, err = command("similarity", "named", *more)
        assert code == 0 and "mean" in out, err

# --- many members

@pytest.mark.parametrize("line", ["zoo/a", "zoo/none", "zoo/a+adapter"])
def test_thousands_of_members_of_one_name_take_no_time(room, refused, line):
    (room/"many.yaml").write_text(f"- {line}\n" * 8000)
    began = time.monotonic()
    for name in ("doctor", "similarity"): refused(name, "many.yaml")
    assert time.monotonic() - began < 10

def test_thousands_of_names_are_listed_in_part(room, command):
    (room/"many.yaml").write_text("".join(f"- ./x{i}\n- ./y/x{i}\n" for i in range(3000)))
    code, _, err = command("doctor", "many.yaml")
    assert code == 2 and "3000 problems" in err and "2,900 more" in err and err.count("\n") < 110

# --- options

WRONG = ["x", -1, float("nan"), float("inf"), 1e9, 10**9, True, [], {}, "", [[1]]]

@pytest.mark.parametrize("strategy", strategies)
def test_every_setting_of_a_strategy_refuses_what_it_cannot_take(strategy):
    import inspect
    defaults = {p.name: p.default for p in list(inspect.signature(strategies[strategy]).parameters.values())[1:]}
    assert setting_kinds(strategies[strategy]).keys() == defaults.keys()
    assert not check_options(strategy, defaults)
    for name in defaults:
        for value in WRONG: assert len(check_options(strategy, {name: value})) == 1, (name, value)
        assert "Did you mean" in check_options(strategy, {name + "s": 1})[0]

@pytest.mark.parametrize("given", ["steps=x", "steps=-1", "steps=.nan", "steps=nan", "steps=1e9", "steps=true", "steps=1000000000",
                                   "steps=2.5", "steps=[3]", "rounds=3", "steps=" + "9" * 400])
def test_an_option_of_the_wrong_kind_is_one_line(refused, given, tmp_path):
    refused("search", "zoo", "--suite", "suite/suite.yaml", "--out", tmp_path/"run", "--option", given)
    assert not (tmp_path/"run").exists()

# --- text in another encoding

@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_templates_in_another_encoding(room, command, file):
    home = room/"zoo"/"b"
    before = (home/"tokenizer_config.json").read_bytes()
    text = "café {{ messages }}" if file.endswith("jinja") else json.dumps(fuzz.TOKENIZER_CONFIG | dict(chat_template="café"), ensure_ascii=False)
    (home/file).write_bytes(text.encode("latin-1"))
    (room/"x.yaml").write_text("merge_method: linear\nmodels: [zoo/a, zoo/b]\nchat_template: auto\n")
    code, _, err = command("merge", "x.yaml", "out", "--overwrite")
    (home/"tokenizer_config.json").write_bytes(before)
    (home/"chat_template.jinja").unlink(missing_ok=True)
    assert code == 0 and (room/"out"/"chat_template.jinja").exists(), err

@pytest.mark.parametrize("text,said", [(r'"\ud902x"', "\ufffdx"), (r'"\U0000dd7f"', "\ufffd"), (r'"\ud83d\ude42"', "\U0001f642"), (r'{"\udc00": 1}', {"\ufffd": 1})])
def test_half_characters_are_mended_in_yaml_as_in_json(text, said):
    "Found by the fuzzer in a card's licence: the merged card could not be written."
    from model_glue_nb.reading import parse_json, parse_yaml
    assert parse_yaml(text, "card") == said
    if "U" not in text: assert parse_json(text, "card", object) == said

def test_a_card_with_half_a_character_merges(tmp_path):
    from model_glue_nb.merging.merge import merge
    from model_glue_nb.merging.recipes import recipe
    from model_glue_nb.zoo.zoo import tiny_zoo
    zoo = tiny_zoo(tmp_path/"zoo", ["a", "b"])
    for m in zoo: (m.path/"README.md").write_text('---\n{"license": "\\ud902\\u00de"}\n---\n')
    out = merge(recipe("linear", ["a", "b"], [.3, .7]), zoo, tmp_path/"out")
    assert "\ufffd\u00de" in (out.path/"README.md").read_text()
