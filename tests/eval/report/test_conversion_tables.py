"""What people read: the table of a conversion, and units."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from mhconvert.eval.report import units
from mhconvert.eval.report.conversion_tables import conversion_rows, healing_line, show

FULL = {
    "output": "some/where/tiny-mla",
    "method": "mla",
    "donor": "tiny",
    "hub_id": "org/tiny",
    "licence": "apache-2.0",
    "notice": "taken from somewhere else",
    "perplexity": {"donor": 20.0, "converted": 25.0},
    "kl": 0.25,
    "top1_agreement": 0.75,
    "kv_bytes_per_token": {"donor": 4096, "converted": 1280},
    "parameters": {"donor": 1000, "converted": 990},
    "layers": [{"index": 0, "relative_error": math.nan}],
    "seconds": 61.0,
    "peak_rss_bytes": 3 * 2**30,
    "sample": {"prompt": "Once [upon]", "converted": " a time [/b]"},
    "calibration": {"source": "self", "tokens": 4096},
    "verified": {"largest_logit_difference": 0.0},
    "versions": {"mhconvert": "0.1.0"},
}


def test_the_share_of_codes_is_of_sixteen_bits_too() -> None:
    coded = {"kv_bytes_per_token": {"donor": 46080, "converted": 2880}, "layers": [{"kv_code_bytes": 96}]}
    expected = ("KV cache a token", "45 KiB", "2.812 KiB")
    [row] = conversion_rows(coded | {"dtype": "float32"})
    assert row == (*expected, "6.25 % of the donor's float32, 12.5 % of 16 bits, measured")
    [row] = conversion_rows(coded | {"dtype": "bfloat16"})
    assert row == (*expected, "6.25 % of the donor's, measured")


def test_a_tolerance_has_a_row_of_its_own() -> None:
    found = {"asked": "ppl=1.3", "kv_budget": 0.312, "measured": 1.25, "looked": [], "tried": []}
    row = ("tolerance ppl ≤ 1.3", "", "1.25", "at budget 31.2 %, on held-out text")
    assert row in conversion_rows(FULL | {"tolerance": found})
    assert not [quantity for quantity, *_ in conversion_rows(FULL) if quantity.startswith("tolerance")]
    found |= {"asked": "generation=0.2", "measured": 0.187, "stderr": 0.0152}
    row = (
        "tolerance generation ≤ 0.2",
        "",
        "0.187 ± 0.02",
        "at budget 31.2 %, KL on its own texts after 40 prompts",
    )
    assert row in conversion_rows(FULL | {"tolerance": found, "on_policy": {"count": 40}})


def test_the_time_of_a_chain_is_of_all_its_steps() -> None:
    steps = [{"method": "dha", "seconds": 51.0}, {"method": "moh", "seconds": 75.0}]
    row = ("time to convert", "", "2:06", "dha 51.0 s, moh 1:15")
    assert row in conversion_rows(FULL | {"seconds": 126.0, "steps": steps})
    assert ("time to convert", "", "1:01", "") in conversion_rows(FULL)


@pytest.mark.parametrize(
    ("predictions", "words"),
    [
        (
            700,
            "1,000 tokens (700 predicted, the others padding or the first of a text) in 4 steps, 1:01 in all",
        ),
        (950, "1,000 tokens in 4 steps, 1:01 in all"),
    ],
)
def test_a_healing_with_padding_says_what_was_predicted(predictions: int, words: str) -> None:
    healing = {"settings": {}, "steps": 4, "trained_tokens": 1000, "seconds": 61.0, "teacher": "x/tiny"}
    line = healing_line({"healing": healing | {"predictions": predictions}})
    assert line == f"{words}; teacher tiny"


def test_missing_facts_have_no_row() -> None:
    assert conversion_rows({"output": "x", "method": "mla"}) == []


def test_table_for_people() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    show(FULL, console)
    text = console.export_text()
    for words in (
        "perplexity",
        "× 1.250",
        "75 %",
        "1:01",
        "3 GiB",
        "Once [upon] a time [/b]",
        "trust_remote_code=True",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.size(46_080), "45 KiB"),
        (units.size(0), "0 B"),
        (units.size(5 * 2**40), "5 TiB"),
        (units.size(None), ""),
        (units.duration(8.25), "8.2 s"),
        (units.duration(75), "1:15"),
        (units.duration(4000), "1:06:40"),
        (units.duration(59.97), "60.0 s"),
        (units.share(0.5), "50 %"),
        (units.number(22.7512), "22.75"),
        (units.number(math.inf), "not finite"),
        (units.count(1_234_567), "1,234,567"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected
