"""What constructors of settings take: the documented forms, numbers of other libraries, and refusals with the name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhconvert import (
    Calibration,
    EvalSettings,
    HealSettings,
    HydraSettings,
    MhconvertError,
    MLASettings,
    MoHSettings,
    Recipe,
)

DOCUMENTED = """\
from pathlib import Path
from mhconvert import Calibration, DHASettings, EvalSettings, HealSettings, HydraSettings
from mhconvert import MLASettings, MoHSettings, Recipe

HealSettings(tokens="20M")
HealSettings("20M", layer_tokens="5M", save_tokens="1M", batch_tokens="8k", data=["self"], loss="kl=1,ce=0.1")
HealSettings(tokens=5, data=("a.txt", "self"), loss={"kl": 1}, teacher=Path("teacher"))
HealSettings(tokens=5, data="a.txt", train=None)
HealSettings(tokens=5, data={"a.txt": 2})
Calibration(sources="self")
Calibration(sources=["a.txt", Path("b.txt")])
Recipe("x", "mla", MLASettings(kv_budget=0.25), output=Path("out"), max_shard_size=10**9)
MoHSettings(active="7,8", shared="0.5")
MoHSettings(active=[7, 0.5], shared=0.5)
HydraSettings(targets="o_proj,down_proj")
HydraSettings(targets=["o_proj"])
EvalSettings(suite="quick", tasks="piqa,arc_*", text=Path("a.txt"), data=Path("data"))
EvalSettings(tasks=["piqa"], text=("a.txt", "b.txt"))
DHASettings(kv_budget=0.5, plan=[{"k_heads": 2}, {"v_heads": 2}])
"""
HELD = """
count: int = HealSettings(tokens="20M").tokens
names: tuple[str, ...] = Calibration(sources="self").sources
weights: dict[str, float] = HealSettings(tokens=5, data="a").data
HealSettings(tokens=[1])
Calibration(sources=5)
"""


def test_documented_calls_are_taken() -> None:
    exec(DOCUMENTED, {})


def test_type_checkers_take_documented_calls(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "calls.py"
    file.write_text(DOCUMENTED + HELD, encoding="utf-8")
    options = ("--follow-imports=silent", "--no-site-packages", f"--cache-dir={tmp_path}")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(file)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    wrong = len((DOCUMENTED + HELD).splitlines())
    faults = [line.split(": error: ") for line in done.stdout.splitlines() if ": error: " in line]
    assert [place.rpartition(":")[2] for place, _ in faults] == [str(wrong - 1), str(wrong)], done.stdout
    assert all("incompatible type" in said for _, said in faults)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: HealSettings(tokens=np.int64(5)).tokens, 5),
        (lambda: HealSettings(tokens=5, rank=np.int32(8)).rank, 8),  # type: ignore[arg-type]
        (lambda: HealSettings(tokens=5, data={"a": np.float32(0.5)}).data, {"a": 0.5}),  # type: ignore[dict-item]
        (lambda: MLASettings(kv_budget=np.float64(0.25)).kv_budget, 0.25),
        (lambda: MoHSettings(active=[np.int64(7), np.float32(0.5)]).active, [7, 0.5]),  # type: ignore[list-item]
        (lambda: Recipe("x", "mla", max_shard_size=np.int64(7)).max_shard_size, "7"),
        (lambda: Recipe("x", "mla", max_shard_size=2.0).max_shard_size, "2"),
        (lambda: Recipe("x", "mla", max_shard_size="1e9").max_shard_size, "1000000000"),
        (lambda: Recipe("x", "mla", max_shard_size="2.5GB").max_shard_size, "2.5GB"),
        (lambda: MoHSettings(active="1").active, 1.0),
        (lambda: Recipe("x", "mla", verify=np.bool_(False)).verify, False),  # type: ignore[arg-type]
    ],
)
def test_numbers_of_numpy_are_pythons(made: Callable[[], Any], expected: Any) -> None:
    assert made() == expected
    assert type(made()) is type(expected)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (HealSettings, {"tokens": 5, "data": [""]}, "data has an empty name"),
        (HealSettings, {"tokens": 5, "data": (1,)}, "data: 1 is not text"),
        (HealSettings, {"tokens": -1}, "tokens=-1 is not a number of tokens such as 200k or 20M"),
        (HealSettings, {"tokens": True}, "tokens=True is not a whole number or text"),
        (HealSettings, {"tokens": 5, "loss": {"kl": True}}, "loss, entry kl=True is not a number"),
        (HealSettings, {"tokens": 5, "clip": float("nan")}, "clip=nan is outside (0, 1e+30]"),
        (Recipe, {"model": "\ud800", "method": "mla"}, "model='\\ud800': character 1 is \\ud800, half of a"),
        (
            Recipe,
            {"model": "x", "method": "mla", "output": Path("\udce9")},
            "output='\\udce9': character 1 is",
        ),
        (HealSettings, {"tokens": 5, "data": {"\ud800": 1}}, "data='\\ud800': character 1 is \\ud800"),
        (Calibration, {"sources": ["a", "b\ud800"]}, "sources='b\\ud800': character 2 is \\ud800"),
        (Calibration, {"sources": [""]}, "sources has an empty name"),
        (Calibration, {"sources": ()}, "sources is empty; name files, datasets, or self"),
        (Calibration, {"held_out": 1}, "held_out=1 rows measure nothing; use at least 2"),
        (
            Recipe,
            {"model": "x", "method": "mla", "dtype": "float64"},
            "dtype 'float64' is not one of float32,",
        ),
        (
            Recipe,
            {"model": "x", "method": "mla", "max_shard_size": 10**400},
            "max_shard_size is beyond every size",
        ),
        (HydraSettings, {"targets": [""]}, "targets has an empty name"),
        (HydraSettings, {"targets": "a,,b"}, "targets 'a,,b' has an empty name"),
        (EvalSettings, {"tasks": ""}, "tasks '' has no name of a task"),
        (EvalSettings, {"text": ["a", ""]}, "text has an empty name"),
        (
            MoHSettings,
            {"active": "many"},
            "active: 'many' is neither a share of heads nor a list such as 7,8,8,9",
        ),
        (MoHSettings, {"active": [True]}, "active, entry 0=True is not a number"),
        (MLASettings, {"kv_budget": 10**400}, "kv_budget"),
        (
            Recipe,
            {"model": "x", "method": "mla", "max_shard_size": 0.5},
            "max_shard_size '0.5' is not a size",
        ),
    ],
)
def test_refusals_name_the_field(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(MhconvertError) as caught:
        kind(**values)
    assert str(caught.value).startswith(message)
