"What the command line says and writes, whatever it is given."
import json, os, re, sys
import pytest

from model_glue_nb.core import NAME_BYTES, InputError, Run, file_name

# ---- names from files, tables

@pytest.mark.parametrize("text", ["../../x", "/etc/x", "a/b", "a\\b", ".x", "-rf", "a\x1b[2J", "a\0b", "a\nb", "", ".", "..", "\ud800",
                                  "x" * 256, "é" * 200, "a.", "a ", "\u202eabc", "ﬁ", "~", "CON:", "*?"])
def test_names_from_files_are_safe_names_of_files(text, tmp_path):
    name = file_name(text)
    assert name != text and len(name.encode()) <= NAME_BYTES and name[0] not in ".-"
    assert not re.search(r"[\x00-\x1f\x7f/\\]", name)
    (tmp_path/f".{name}.recipe.json.abcdefgh.part").write_text("") # beside it there is room for temporary names
    assert file_name(name) != name, "a made name is never taken for a given one"

def test_other_names_give_other_files():
    names = ["a/b", "a\\b", "a-b", "a:b", "a//b", "x" * 300, "x" * 301]
    assert len({file_name(n) for n in names}) == len(names)
    for plain in ("c1-merged", "all-LlamaForCausalLM-0", "Qwen2.5-0.5B", "模型"): assert file_name(plain) == plain

def test_nothing_leads_out_of_a_run(tmp_path):
    run = Run.start(tmp_path/"run", {}); (tmp_path/"out").mkdir(); (tmp_path/"out.json").write_text("{}")
    (run.path/"models").symlink_to(tmp_path/"out"); (run.path/"zoo.json").symlink_to(tmp_path/"out.json")
    for step in (lambda: run.place("models/x"), lambda: run.write_json("../out", {}), lambda: run.read_json("zoo"), lambda: run.place("/etc")):
        with pytest.raises(InputError, match="leads out of the run"): step()
    assert (tmp_path/"out.json").read_text() == "{}" and not any((tmp_path/"out").iterdir())

def test_cells_are_never_formulas_and_come_back(tmp_path):
    import pandas as pd
    names = ["=HYPERLINK(1)", "+1", "-a", "@x", "\tx", "\rx", "'=x", "''-", "'a", "nan", "NULL", "a=b"]
    table = pd.DataFrame({"model": names, "score": [-1.5] * len(names), "=task": range(len(names))}).assign(mixed=[None, *names[1:]])
    run = Run.start(tmp_path/"run", {}); file = run.write_table("t", table)
    import csv
    rows = list(csv.reader(file.open(newline="")))
    assert not any(c[:1] in set("=+-@\t\r") and not re.fullmatch(r"-?[\d.]+", c) for row in rows for c in row)
    assert {r[1] for r in rows[1:]} == {"-1.5"}
    pd.testing.assert_frame_equal(run.read_table("t"), table)
    square = pd.DataFrame([[1., .5], [.5, 1.]], ["=a", "b"], ["=a", "b"]); run.write_table("s", square, index=True)
    pd.testing.assert_frame_equal(run.read_table("s", index=True), square)
