"""Figures of texts that are written by hand."""

from __future__ import annotations

import pytest

from mhconvert.eval.writing.text_figures import (
    distinct,
    figures,
    first_difference,
    is_json,
    is_python,
)


def test_distinct() -> None:
    assert distinct([1, 2, 3, 4], 2) == 1
    assert distinct([1, 2, 1, 2, 1], 2) == 2 / 4
    assert distinct([7] * 5, 4) == 1 / 2
    assert distinct([1, 2, 3], 4) is None


def test_a_text_loops_where_half_of_it_does() -> None:
    """Sixteen tokens in a loop are a loop; so are they not in a text of more than twice as many."""
    other = list(range(100, 200))
    assert figures([1] * 16 + other[:16], False, "", None)["loops"] == 1
    assert figures([1] * 16 + other[:17], False, "", None)["loops"] == 0
    assert figures([1] * 15, False, "", None)["loops"] == 0


def test_the_end_token_is_no_part_of_the_text() -> None:
    found = figures([4, 5, 6, 1], True, "", None)
    assert (found["tokens"], found["ends"], found["format"]) == (3, 1, None)
    assert figures([4, 5, 6, 1], False, "", None)["tokens"] == 4
    nothing = figures([1], True, "", "json")
    assert (nothing["tokens"], nothing["distinct_2"], nothing["longest_loop"]) == (0, None, 0)
    assert (nothing["loops"], nothing["format"]) == (0, 0)


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], [4]) == 0


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"a": [1, 2]}', True),
        ("Here it is:\n```json\n[1, 2]\n```\nAnything else?", True),
        ("```\n[1, 2]", True),
        ("7", False),
        ('{"a": 1} and more', False),
        ("{'a': 1}", False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_json(text: str, kept: bool) -> None:
    assert is_json(text) is kept


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("def f(x):\n    return x", True),
        ("Sure:\n```python\nclass A:\n    pass\n```", True),
        ("async def f(): ...", True),
        ("Sure", False),
        ("def f(x)\n    return x", False),
        ("def f():\n    return '\0'", False),
        ("def f(): return " + "(" * 5000, False),
        (r"def f(): return '\d'", True),
    ],
)
def test_python(text: str, kept: bool, recwarn: pytest.WarningsRecorder) -> None:
    assert is_python(text) is kept
    assert not recwarn.list


def test_code_is_never_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_python("print('run')\nraise SystemExit\ndef f(): ...")
    assert capsys.readouterr().out == ""
