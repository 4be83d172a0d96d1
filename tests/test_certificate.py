"A fifth of the architecture certificate: a fixed spread over the table; `make certificate` does all."
import csv, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import certificate

sys.path.pop(0)
FIFTH = 5


def recorded():
    "The rows of the table."
    lines = [line for line in certificate.CSV.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


FAMILIES = "mixtral gpt_neox granitemoe hrm_text olmo_hybrid inkling_text".split() # names or values change as they load
KINDS = sorted({*sorted(r["model_type"] for r in recorded())[::FIFTH], *FAMILIES})


@pytest.mark.parametrize("kind", KINDS)
def test_architecture(kind, tmp_path):
    was = next(r for r in recorded() if r["model_type"] == kind)
    row, _ = certificate.certify(kind, tmp_path)
    better = {k: (was[k], row[k]) for k in ("doctor", "folder", "reload", "live", "generation")}
    assert all(now == before or now == "yes" or before == "no" for before, now in better.values()), f"{better}: {row['note']}"


def test_the_table_is_of_the_installed_version_and_large_enough():
    import transformers
    head = certificate.CSV.read_text(encoding="utf-8").splitlines()[0]
    assert f"transformers {transformers.__version__}" in head, "Run: make certificate"
    rows = recorded()
    assert len(rows) >= 60 and len({r["model_type"] for r in rows}) == len(rows)


def test_a_wrong_merge_would_show(tmp_path):
    "The comparison itself: another weight, a missing tensor and a NaN are all seen."
    import torch
    kind = "llama"
    certificate.write_pair(kind, tmp_path)
    a, b = (certificate.loaded(tmp_path/n)[0] for n in "ab")
    want = certificate.averaged(a, b)
    assert certificate.difference(want, want) == ""
    assert "values of" in certificate.difference(a.state_dict(), want)
    name = next(iter(want))
    assert certificate.difference({k: v for k, v in want.items() if k != name}, want).startswith("only one has")
    assert certificate.difference(want | {name: want[name] * torch.nan}, want) == f"values of {name}"
