"""Ratios of a run beside those of docs/speed.md: rows that fell are named, and nothing else."""

import sys
from pathlib import Path

import pytest

from scripts.bench import check

RUN = """idefics2: 217 M parameters, 2 threads, torch 2.13.0

| float32 | minivlm | transformers | ratio |
| --- | ---: | ---: | ---: |
| prefill, one 980×980 image | 2,000.0 ms | 2,100.0 ms | 1.05 |
| decode a token at 97 | 10.0 ms | 9.0 ms | 0.90 |
| peak memory, load and generate | 10 MiB | 12 MiB | 1.20 |

| bfloat16 | minivlm | transformers | ratio |
| --- | ---: | ---: | ---: |
| decode a token at 97 | 10.0 ms | 14.0 ms | 1.40 |

| nf4 | minivlm | transformers, bfloat16 | ratio |
| --- | ---: | ---: | ---: |
| decode a token at 97 | 10.0 ms | 30.0 ms | 3.00 |
| fails | | no such kernel | |
"""
TABLE = """# Speed

## AMD EPYC, AVX-512 with bf16

| Idefics2, 217 M | float32 | bfloat16 |
| --- | ---: | ---: |
| prefill, one 980×980 image | 1.10 | 0.84 |
| decode a token at 97 | 1.02 | 1.70 |

Text between tables.

| Idefics2 | nf4 / bfloat16 |
| --- | ---: |
| decode a token at 97 | **2.90** |

## Another processor

| Idefics2, 217 M | float32 |
| --- | ---: |
| prefill, one 980×980 image | 9.00 |
"""


def test_rows_are_found_in_both() -> None:
    found, kept = check.measured(RUN), check.stored(TABLE, "AMD EPYC")
    assert found["idefics2", "float32", "decode a token at 97"] == 0.90
    assert found["idefics2", "nf4 / bfloat16", "decode a token at 97"] == 3.0
    assert len(found) == 5
    assert len(kept) == 5
    assert kept.keys() <= found.keys() | {("idefics2", "bfloat16", "prefill, one 980×980 image")}


def test_what_fell_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run, table = tmp_path / "now.md", tmp_path / "speed.md"
    run.write_text(RUN, encoding="utf-8")
    table.write_text(TABLE, encoding="utf-8")
    arguments = ["check.py", str(run), "--table", str(table), "--kind"]
    monkeypatch.setattr(sys, "argv", [*arguments, "AMD EPYC"])
    assert check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 rows compared, 2 fell"
    assert lines[1].startswith("idefics2, bfloat16, decode a token at 97: 1.40, stored 1.70")
    assert lines[2].startswith("idefics2, float32, decode a token at 97: 0.90")  # within the slack, but below 1.0
    monkeypatch.setattr(sys, "argv", [*arguments, "AMD EPYC", "--slack", "0.3"])
    assert check.main() == 1
    monkeypatch.setattr(sys, "argv", [*arguments, "no such machine"])
    with pytest.raises(SystemExit, match="no row in common"):
        check.main()


def test_the_stored_tables_can_be_read() -> None:
    text = (Path(check.__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    kept = check.stored(text, "AMD EPYC")
    assert {"idefics2", "llava_next", "idefics"} <= {family for family, _, _ in kept}
    assert min(kept.values()) > 0.5
