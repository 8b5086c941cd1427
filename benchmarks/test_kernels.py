"""The reader of machine code: kinds and widths of accesses, and what is in a loop."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from benchmarks import kernels, roofline

DIVISION = "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)"
END = ["EXIT", ".L_1: NOP"]
DIVIDE = ["$__internal_0_$__cuda_sm20_div_s64: IADD3 R1, R1, 1, RZ", "RET.REL.NODEC R2 `(kernel)"]


def read(*lines: str) -> kernels.Row:
    """The counts of a kernel whose instructions are `lines`, with labels before some of them."""
    offset = itertools.count(0, 16)
    text = ['\t.section\t.text.kernel,"ax",@progbits', "kernel:"]
    for line in lines:
        label, colon, rest = line.rpartition(": ")
        text += [label + ":"] * bool(colon)
        text.append(f"        /*{next(offset):04x}*/                   {rest} ;")
    ((name, row),) = kernels.kernels("\n".join(text))
    assert name == "kernel"
    return row


def test_accesses_are_counted_by_kind_and_width() -> None:
    row = read(
        "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "LDG.E.U16 R4, desc[UR4][R2.64]",
        "LDG.E.EF R4, desc[UR4][R2.64]", "@!P0 STG.E.64 desc[UR4][R2.64], R4", "LDS.U.64 R1, [R4]",
        "LD.E R1, desc[UR4][R2.64]", "@P1 STL [R1+0x8], R4", "BAR.SYNC.DEFER_BLOCKING 0x0",
        "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "EXIT", "NOP",
    )  # fmt: skip
    expected = {"LDG": 3, "STG": 1, "LDS": 1, "LD": 1, "STL": 1, "BAR": 1, "SHFL": 1, "STS": 0}
    assert {what: row[what] for what in expected} == expected
    widths = {"LDG": 128, "STG": 64, "LDS": 64, "LD": 32, "STL": 32, "STS": 0}
    assert {what: row[f"{what} bits"] for what in widths} == widths
    assert row["instructions"] == 10 and row["calls"] == 0


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([DIVISION, *END], 0),
        ([".L_0: " + DIVISION, "@P0 BRA `(.L_0)", *END], 1),
        ([".L_0: MOV R1, R2", "BRA P1, `(.L_0)", DIVISION, *END], 0),
        # two ways around one loop: both ways are in it
        ([".L_0: @P0 BRA `(.L_2)", DIVISION, ".L_2: @P1 BRA `(.L_0)", *END], 1),
        # out of the way, at the end, and back: no loop
        (["@P0 BRA `(.L_2)", ".L_3: MOV R1, R2", "EXIT", ".L_2: " + DIVISION, "BRA `(.L_3)"], 0),
        # the same within a loop
        (
            [".L_3: @P0 BRA `(.L_2)", "@P1 BRA `(.L_3)", "EXIT", ".L_2: " + DIVISION,
             "BRA `(.L_3)"],
            1,
        ),
        # threads that part and meet again, the meeting out of the way
        (
            [".L_0: BSSY B0, `(.L_2)", "@P0 BRA `(.L_3)", "BSYNC B0", ".L_2: @P1 BRA `(.L_0)",
             "EXIT", ".L_3: " + DIVISION, "BSYNC B0"],
            1,
        ),
        # a function that divides, called in a loop and not
        ([".L_0: CALL.REL.NOINC `($f)", "@P0 BRA `(.L_0)", "EXIT", "$f: " + DIVISION, "RET R2"], 1),
        (["CALL.REL.NOINC `($f)", "EXIT", "$f: " + DIVISION, "RET R2"], 0),
    ],
)  # fmt: skip
def test_divisions_in_loops(lines: list[str], expected: int) -> None:
    row = read(*lines, *DIVIDE)
    assert (row["divisions"], row["in loops"]) == (1, expected)


def test_a_table_has_ranges_over_the_variants() -> None:
    rows = [read("LDG.E R1, desc[UR4][R2.64]", "EXIT"), read("LDG.E.64 R2, [R4]", *["EXIT"] * 3)]
    for row in rows:
        row |= {"kernel": "k", "registers": 32}
    head, _, line = kernels.table(rows).split("\n")
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["instructions"] == "2–4" and cells["LDG"] == "1 (64)" and cells["STG"] == "0"


def test_the_docs_have_the_calls_that_are_counted() -> None:
    page = (Path(__file__).parent.parent / "docs/backends.md").read_text()
    table = page.partition("<!-- python -m benchmarks.roofline -->")[2].partition("\n\n|")[2]
    shown = re.findall(r"^\| ([^|]+) \|", table.partition("\n\n")[0], re.M)
    assert shown[0] != "call" and shown == list(roofline.calls(small=False))
