"""What is lost by source: the sums of its own rows, its noise, and the rule that warns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

import mhconvert
from mhconvert.convert.layer_pass.loss_by_source import BLOCK, blocks, by_source, warnings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.eval.fidelity import Fidelity
from mhconvert.eval.report.conversion_tables import conversion_rows
from mhconvert.eval.report.model_card import model_card
from tests.convert.conftest import LAYERS
from tests.convert.test_pipeline import stop_after


def drawn(kl: float, count: int, seed: int, spread: float = 0.3) -> list[Fidelity]:
    """Blocks whose mean divergence is spread around `kl`."""
    noise = 1 + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return [Fidelity(BLOCK, 2.0 * BLOCK, (2 + kl * x) * BLOCK, kl * x * BLOCK, 0) for x in noise.tolist()]


def test_one_source_that_loses_much_more_is_named_and_noise_is_not() -> None:
    for seed in range(20):
        level = by_source({name: drawn(0.1, 8, 3 * seed + n) for n, name in enumerate("abc")})
        assert not any(one["much"] for one in level)
        found = by_source({"a": drawn(0.1, 8, seed), "texts/b.txt": drawn(0.4, 8, 50 + seed)})
        assert [one["much"] for one in found] == [False, True]
        assert "on b.txt the conversion loses much more" in warnings(found)[0]
    loud = by_source({"a": drawn(0.1, 8, 0), "b": [*drawn(0.1, 7, 1), *drawn(4.0, 1, 2)]})
    assert loud[1]["kl"] > 3 * loud[0]["kl"]
    assert not loud[1]["much"], "one block makes all of the difference"
    assert not by_source({"a": drawn(1e-4, 8, 0), "b": drawn(5e-3, 8, 1)})[1]["much"], "both lose nothing"
    assert by_source({"a": drawn(0.1, 8, 0)}) == []


def test_means_and_errors_are_those_of_blocks() -> None:
    parts = drawn(0.2, 12, 3)
    found = by_source({"a": parts, "b": drawn(0.2, 1, 4)})
    each = [part.divergence / BLOCK for part in parts]
    assert found[0]["kl"] == pytest.approx(mean(each))
    assert found[0]["kl_stderr"] == pytest.approx(stdev(each) / 12**0.5)
    assert found[0]["perplexity_ratio_stderr"] == pytest.approx(
        found[0]["perplexity_ratio"] * stdev(each) / 12**0.5
    )
    assert (found[1]["kl_stderr"], found[1]["much"]) == (None, False)
    assert [(part.start, part.stop) for part in blocks(130)] == [(0, 64), (64, 128), (128, 130)]


def test_a_conversion_reports_each_source_and_a_resumed_one_the_same(
    recipe: Callable[..., Recipe], text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"def f{n}(x):\n    return x[{n}] + {n * 7}\n" for n in range(300)))
    asked = recipe(tmp_path / "whole")
    both = dataclasses.replace(asked.calibration, sources=(str(text), str(other)), held_out=4)
    report = mhconvert.convert(dataclasses.replace(asked, calibration=both))
    found = {one["source"]: one for one in report["by_source"]}
    assert set(found) == {str(text), str(other)}
    assert [one["tokens"] for one in found.values()] == [2 * 63, 2 * 63]
    assert mean(one["kl"] for one in found.values()) == pytest.approx(report["kl"])
    rows = {row[0]: row for row in conversion_rows(json.loads((tmp_path / "whole/report.json").read_text()))}
    assert rows["on other.txt"][3].startswith(f"KL {found[str(other)]['kl']:.4f} ± ")
    halved = dataclasses.replace(asked, calibration=both, output=str(tmp_path / "halved"))
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(halved, on_progress=stop_after(LAYERS - 1, KeyboardInterrupt()))
    assert mhconvert.convert(halved, resume=True)["by_source"] == report["by_source"]
    warned = model_card(report | {"warnings": ["on a <b> it loses"]})
    assert "Beware: on a \\<b\\> it loses." in warned
