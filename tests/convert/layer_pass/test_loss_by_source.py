"""What is lost by source: the sums of its own rows, its noise, and the rule that warns."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

import mhconvert
from mhconvert.convert.layer_pass.loss_by_source import by_source, warnings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.eval.fidelity import Fidelity
from mhconvert.eval.report.conversion_tables import conversion_rows
from mhconvert.eval.report.model_card import model_card
from tests.convert.conftest import LAYERS
from tests.convert.test_pipeline import stop_after

PREDICTIONS = 511  # of a row


def drawn(kl: float, rows: int, seed: int, spread: float = 0.3) -> list[Fidelity]:
    """Rows whose divergences are `kl`, times what is normal in its logarithm with this standard deviation."""
    effects = spread * torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    size = PREDICTIONS
    return [Fidelity(size, 2.0 * size, (2 + kl * x) * size, kl * x * size, 0) for x in effects.exp().tolist()]


def test_one_source_that_loses_much_more_is_named_and_noise_is_not() -> None:
    for seed in range(20):
        found = by_source({"a": drawn(0.1, 8, seed), "texts/b.txt": drawn(0.5, 8, 50 + seed, 0.2)})
        assert [one["much"] for one in found] == [False, True]
        assert "on b.txt the conversion loses much more" in warnings(found)[0]
    loud = by_source({"a": drawn(0.1, 8, 0), "b": [*drawn(0.1, 7, 1), *drawn(4.0, 1, 2)]})
    assert loud[1]["kl"] > 3 * loud[0]["kl"]
    assert not loud[1]["much"], "one row makes all of the difference"
    assert not by_source({"a": drawn(1e-4, 8, 0), "b": drawn(5e-3, 8, 1)})[1]["much"], "both lose nothing"
    assert by_source({"a": drawn(0.1, 8, 0)}) == []


@pytest.mark.parametrize(("sources", "rows"), [(2, 2), (5, 2), (2, 4), (5, 4)])
def test_equal_sources_are_warned_of_in_few_per_cent_and_different_ones_are(sources: int, rows: int) -> None:
    equal = different = 0
    for trial in range(300):
        seed = 1000 * trial
        parts = {f"{n}": drawn(0.1, rows, seed + n, 0.35) for n in range(sources)}
        equal += any(one["much"] for one in by_source(parts))
        different += by_source(parts | {"0": drawn(0.7, rows, seed, 0.35)})[0]["much"]
    assert equal <= 0.03 * 300
    assert different >= 0.6 * 300


def test_means_and_errors_are_those_of_rows() -> None:
    parts = drawn(0.2, 12, 3)
    found = by_source({"a": parts, "b": drawn(9.0, 1, 4)})
    each = [part.divergence / PREDICTIONS for part in parts]
    assert found[0]["kl"] == pytest.approx(mean(each))
    assert found[0]["kl_stderr"] == pytest.approx(stdev(each) / math.sqrt(12))
    assert found[0]["perplexity_ratio_stderr"] == pytest.approx(
        found[0]["perplexity_ratio"] * stdev(each) / math.sqrt(12)
    )
    assert (found[1]["kl_stderr"], found[1]["much"]) == (None, False), "one row has no noise to compare with"


def test_sources_of_one_file_name_are_told_apart_by_their_paths() -> None:
    found = by_source({"old/b.txt": drawn(0.1, 8, 0), "new/b.txt": drawn(0.9, 8, 1), "c": drawn(0.1, 8, 2)})
    assert warnings(found)[0].startswith("on new/b.txt the conversion loses")
    assert [row[0] for row in conversion_rows({"by_source": found})] == [
        "on old/b.txt",
        "on new/b.txt",
        "on c",
    ]


def test_a_conversion_reports_each_source_and_a_resumed_one_the_same(
    recipe: Callable[..., Recipe], text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"def f{n}(x):\n    return x[{n}] + {n * 7}\n" for n in range(300)))
    asked = recipe(tmp_path / "whole")
    both = dataclasses.replace(
        asked.calibration, sources=(str(text), str(other)), held_out=3, sequence_length=96
    )
    report = mhconvert.convert(dataclasses.replace(asked, calibration=both))
    found = {one["source"]: one for one in report["by_source"]}
    assert set(found) == {str(text), str(other)}
    assert [one["tokens"] for one in found.values()] == [2 * 95, 95]
    assert [one["kl_stderr"] is None for one in found.values()] == [False, True], "the row is the unit"
    several, single = (one["kl"] for one in found.values())
    assert (2 * several + single) / 3 == pytest.approx(report["kl"])
    rows = {row[0]: row for row in conversion_rows(json.loads((tmp_path / "whole/report.json").read_text()))}
    assert rows["on other.txt"][3].startswith(f"KL {found[str(other)]['kl']:.4f} ± ")
    halved = dataclasses.replace(asked, calibration=both, output=str(tmp_path / "halved"))
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(halved, on_progress=stop_after(LAYERS - 1, KeyboardInterrupt()))
    assert mhconvert.convert(halved, resume=True)["by_source"] == report["by_source"]
    warned = model_card(report | {"warnings": ["on a <b> it loses"]})
    assert "Beware: on a \\<b\\> it loses." in warned
