"The list of changes that tests must notice stays in step with the modules, and the tool says truly what was noticed."
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/"tools"))
import mutate
from mutants import MUTANTS, WHY

def test_every_change_is_of_a_line_that_is_there_once():
    found = list(mutate.mutants())
    assert not list(mutate.out_of_step(found)), "renew tools/mutants.py"
    assert len(found) >= 150 and {"tensors.kernels", "merging.methods", "searching.strategies", "mixing.routers", "benchmarking.intervals", "benchmarking.harness"} <= set(MUTANTS)
    known = {(m.room, m.new) for m in found}
    assert set(WHY) <= known, "reasons for changes that are no longer tried"

@pytest.mark.parametrize("old, new, tests, says", [
    ("no such text", "x", ("tests/test_mutants.py",), "occurs 0 times"), ("def ", "x", ("tests/test_mutants.py",), "times"),
    ("changed = abs(d) > epsilon", "changed = abs(d) > epsilon", ("tests/test_mutants.py",), "isn't a change"), ("changed = abs(d) > epsilon", "x", ("tests/none.py",), "there is no tests/none.py"),
    ("changed = abs(d) > epsilon", "x", ("tests/test_mutants.py::test_none",), "there is no tests/test_mutants.py::test_none")])
def test_a_list_out_of_step_is_said(old, new, tests, says):
    assert any(says in text for text in mutate.out_of_step([mutate.Mutant("merging.methods", old, new, tests)]))

def test_each_change_compiles():
    "A change that is no Python would be noticed by whatever imports it, and say nothing about tests."
    for m in mutate.mutants():
        compile(mutate.replaced(mutate.module_of(m.room).read_text(), m), m.room, "exec")

@pytest.mark.parametrize("text, n",
                         [("if a: b(c, d); e = 1", 1), ("if a:\n    b(c,\n      d)\n    e = 1", 1), ("if a: b(c, d); e = 12", 1), ("if a: b(c, de)", 0), ("ifa: b(c, d); e = 1", 0)])
def test_a_place_is_found_however_its_lines_are_broken(text, n):
    change = mutate.Mutant("x", "if a: b(c, d); e = 1", "if a: b(d, c); e = 1", ())
    assert len(mutate.places(text, change.old)) == n
    assert ("b(d, c)" in mutate.replaced(text, change)) == bool(n)

def test_the_table_counts_what_survived():
    def result(old, verdict, said=""):
        return mutate.Result(mutate.Mutant("merging.methods", old, "x | y", ()), verdict, said, 1.)
    text, share = mutate.report(
        [result("a", "killed", "06_merging/01_methods.ipynb cell 3"), result("b", "hung", "hung"), result("c", "survived"), result("d", "killed", "tests/x.py")],
        4)
    assert share == .75 and "| merging.methods | 4 | 3 | 1 |" in text and "1 by a notebook, 2 by pytest" in text
    assert "| merging.methods | `c` | `x \\| y` | not looked into |" in text

def test_a_change_is_taken_back(tmp_path):
    file = mutate.module_of("merging.methods", tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n")
    mutate.compile_all(tmp_path)
    with mutate.changed(tmp_path, mutate.Mutant("merging.methods", "1", "2", ())):
        assert file.read_text() == "x = 2\n" and not mutate.bytecode(file).exists(), "old byte code would hide the change"
    assert file.read_text() == "x = 1\n" and mutate.bytecode(file).exists()
