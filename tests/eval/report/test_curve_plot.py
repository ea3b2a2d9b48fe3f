"""The picture of a curve: every point where it was measured, nothing smoothed, and refusals before the work."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mhconvert.errors import MhconvertError, OutputError
from mhconvert.eval.report import curve_plot

BUDGETS = (0.75, 0.5, 0.3125, 0.125)
RATIOS = (1.02, 1.2, 1.15, 9.98)  # not monotone
DIVERGENCES = (0.027, 0.19, 0.81, math.inf)
CURVE: dict[str, Any] = {
    "donor": "org/tiny",
    "donor_name": "tiny",
    "method": "mla",
    "fit_steps": 80,
    "perplexity": 18.56,
    "calibration": {"tokens": 4096},
    "measured_tokens": 2044,
    "measured_on": "held-out calibration text",
    "kv_share_of": "the bytes of the donor's cache at 16 bits an element",
    "kv_elements_per_token": 23040,
    "points": [
        {"kv_budget": budget, "kv_share": budget, "perplexity_ratio": ratio, "kl": kl}
        for budget, ratio, kl in zip(BUDGETS, RATIOS, DIVERGENCES, strict=True)
    ],
}


def test_the_donor_with_coded_caches_is_a_line_of_its_own() -> None:
    rivals = [
        {"name": f"donor {name}", "kv_share": share, "perplexity_ratio": ratio, "kl": kl}
        for name, share, ratio, kl in (("int8", 0.5625, 1.0, 1e-4), ("int2", 0.1875, 1.7, 0.5))
    ]
    left, right = curve_plot.draw(CURVE | {"baselines": rivals}).axes
    for axes, key in ((left, "perplexity_ratio"), (right, "kl")):
        of_donor = next(line for line in axes.lines if line.get_label() == "donor, quantised cache")
        assert [tuple(point) for point in of_donor.get_xydata()] == [
            (rival["kv_share"], rival[key]) for rival in reversed(rivals)
        ]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "MLA",
            "donor, quantised cache",
        ]
        assert axes.get_xlabel() == "KV cache, % of the bytes at 16 bits an element"


def test_the_points_are_the_measured_ones() -> None:
    left, right = curve_plot.draw(CURVE).axes
    expected = sorted(zip(BUDGETS, RATIOS, strict=True))
    assert [tuple(point) for point in left.lines[0].get_xydata()] == expected
    finite = [(b, kl) for b, kl in sorted(zip(BUDGETS, DIVERGENCES, strict=True)) if math.isfinite(kl)]
    assert [tuple(point) for point in right.lines[0].get_xydata()] == finite
    assert [text.get_text() for text in left.texts] == ["9.98 ×", "1.15 ×", "1.20 ×", "1.02 ×"]
    assert (left.get_yscale(), right.get_yscale()) == ("log", "log")
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["12.5", "31.25", "50", "75"]


@pytest.mark.parametrize("suffix", curve_plot.PICTURES)
def test_pictures(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"curve{suffix}"
    curve_plot.write(CURVE, file)
    assert file.stat().st_size > 2000
    if suffix == ".svg":
        written = file.read_text(encoding="utf-8")
        for text in ("tiny → MLA, 80 fit steps a layer", "9.98 ×", "31.25", "2,044 predictions"):
            assert text in written


def test_json_is_strict(tmp_path: Path) -> None:
    curve_plot.write(CURVE, tmp_path / "curve.json")
    read = json.loads((tmp_path / "curve.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [point["kl"] for point in read["points"]] == [0.027, 0.19, 0.81, None]
    assert read["perplexity"] == 18.56


@pytest.mark.parametrize("name", ["curve.gif", "curve"])
def test_an_unknown_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"ends in none of \.svg, \.png, \.pdf, \.json"):
        curve_plot.check([tmp_path / name], force=False)


def test_an_existing_file_is_replaced_by_force_alone(tmp_path: Path) -> None:
    file = tmp_path / "curve.svg"
    curve_plot.check([file], force=False)
    file.write_text("mine")
    with pytest.raises(OutputError, match=r"curve\.svg exists; .* --force"):
        curve_plot.check([file], force=False)
    curve_plot.check([file], force=True)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "curve.json").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        curve_plot.check([tmp_path / "curve.json"], force=True)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: there is no folder"):
        curve_plot.check([tmp_path / "absent" / "curve.json"], force=False)
    with pytest.raises(OutputError, match="cannot be written"):
        curve_plot.write(CURVE, tmp_path / "absent" / "curve.json")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    curve_plot.check([tmp_path / "curve.json"], force=False)
    with pytest.raises(MhconvertError, match=r"needs matplotlib: pip install 'mhconvert\[plot\]'"):
        curve_plot.check([tmp_path / "curve.svg"], force=False)
