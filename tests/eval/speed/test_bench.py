"""What can be timed and what is refused, before weights are read; the whole result of a tiny pair."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mhconvert import api
from mhconvert.convert.open_model import OpenModel
from mhconvert.errors import BudgetError, MhconvertError
from mhconvert.eval.speed import bench, memory, memory_estimate
from tests.convert.conversions import converted, donor_model
from tests.donors import make_config, make_donor

QUICK: dict[str, Any] = {"contexts": [24], "batch": 2, "new_tokens": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A donor and a checkpoint that names it."""
    folder = tmp_path_factory.mktemp("bench")
    donor = make_donor(folder / "donor")
    converted(donor_model()).save_pretrained(folder / "latent")
    (folder / "latent" / "mhconvert.json").write_text(json.dumps({"recipe": {"model": str(donor)}}))
    return str(donor), str(folder / "latent")


def test_a_result_has_a_row_for_every_context(pair: tuple[str, str]) -> None:
    donor, latent = pair
    events: list[Any] = []
    options = QUICK | {"contexts": [32, 24, 32], "reexpand": True, "on_progress": events.append}
    result = api.bench(latent, **options)
    rows = result.pop("rows")
    assert result == {
        "checkpoint": latent,
        "against": donor,
        "batch": 2,
        "new_tokens": 2,
        "step_tokens": 1,
        "chunk_tokens": None,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "cache": "dynamic",
        "kv_cache_dtype": "auto",
        "compiled": False,
    }
    assert [row["context"] for row in rows] == [24, 32]
    for row in rows:
        speeds = [row[name]["decode_tokens_per_s"] for name in ("donor", "converted", "reexpanded")]
        assert min(speeds) > 0
        assert row["ratio"] == speeds[1] / speeds[0]
        assert row["ratio_to_reexpanded"] == speeds[1] / speeds[2]
        assert row["cache_ratio"] == 0.5
        # A layer's copy, rotary keys of 16 elements that are rotated, and twice the scores of 4 heads.
        for name, elements in (("donor", 64), ("converted", 32 + 16)):
            assert row[name]["step_memory_planned_bytes"] == 4 * 2 * row["context"] * (elements + 2 * 4)
    assert [event.done for event in events if event.stage == "speed"] == [0, 1, 2, 2, 3, 4]
    assert events[-1].total == 4


def test_dtype_and_static_cache(pair: tuple[str, str]) -> None:
    options = QUICK | {"dtype": "bfloat16", "static_cache": True, "against": pair[0]}
    result = api.bench(pair[1], **options)
    assert (result["dtype"], result["cache"]) == ("bfloat16", "static")
    assert result["rows"][0]["donor"]["cache_bytes"] == 2 * 128 * 24 * 2


@pytest.mark.parametrize("budget", [0.25, None])
def test_random_weights_of_a_shape(budget: float | None, tmp_path: Path) -> None:
    make_config(family="mistral", sliding_window=None, kv_heads=1).save_pretrained(
        tmp_path
    )  # no weights at all
    result = api.bench(str(tmp_path), random="mla", kv_bits=16, kv_budget=budget, **QUICK)
    assert (result["checkpoint"], result["random"]) == (None, "mla")
    assert result["rows"][0]["cache_ratio"] == (budget or 0.5)
    with pytest.raises(BudgetError, match="outside"):
        api.bench(str(tmp_path), random="mla", kv_bits=16, kv_budget=2.0, **QUICK)


def test_random_weights_are_coded_unless_kv_bits_say_otherwise(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    [row] = api.bench(str(tmp_path), random="mla", kv_budget=0.25, **QUICK | {"contexts": (24,)})["rows"]
    assert (
        0 < row["cache_ratio"] <= 0.125
    )  # of a float32 cache, whose bytes are twice those that the budget is of
    with pytest.raises(MhconvertError, match="kv_bits does not apply to dha; leave it out"):
        api.bench(str(tmp_path), random="dha", kv_bits=16, **QUICK)


def test_a_donor_that_is_read_eagerly(tmp_path: Path) -> None:
    """Gemma 2's soft-caps have no fused kernel."""
    donor = make_donor(tmp_path / "gemma2", family="gemma2", kv_heads=2, query_pre_attn_scalar=16)
    options = bench.Options(contexts=(24,), batch=2, new_tokens=2)
    [row] = bench.bench_random(str(donor), "mla", 0.5, options, "cpu", kv_bits=16)["rows"]
    assert row["converted"]["cache_bytes"] * 2 == row["donor"]["cache_bytes"]


def test_what_is_not_converted_is_refused(pair: tuple[str, str]) -> None:
    donor, latent = pair
    for reference in (donor, "smollm2-135m", "nowhere"):
        with pytest.raises(MhconvertError, match=f"{reference} is no folder that mhconvert wrote"):
            api.bench(reference, **QUICK)
    with pytest.raises(MhconvertError, match=f"{latent} is converted already"):
        api.bench(latent, random="mla", **QUICK)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"hidden": 32}, "has hidden_size 64 and .* has 32"),
        ({"layers": 3}, "has num_hidden_layers 2 and .* has 3"),
        ({"vocab": 300}, "has vocab_size 320 and .* has 300"),
        ({"heads": 2}, "has num_attention_heads 4 and .* has 2"),
    ],
)
def test_a_donor_of_another_shape_is_refused(
    pair: tuple[str, str], tmp_path: Path, shape: dict[str, int], words: str
) -> None:
    other = make_donor(tmp_path / "other", **shape)  # type: ignore[arg-type]
    with pytest.raises(MhconvertError, match=words):
        api.bench(pair[1], against=str(other), **QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"contexts": [24, 513]}, "reads at most 512 tokens and 513 are asked for"),
        ({"contexts": [5]}, r"a context of 5 tokens has no room for 4 \+ 2 steps of 1; use more than 6"),
        ({"step_tokens": 5}, r"a context of 24 tokens has no room for 4 \+ 2 steps of 5; use more than 30"),
        ({"step_tokens": 0}, "start at 1"),
        ({"chunk_tokens": 0}, "start at 1"),
        ({"chunk_tokens": -1}, "start at 1"),
        ({"contexts": []}, "--contexts names one context or more"),
        ({"batch": 0}, "start at 1"),
        ({"new_tokens": 0}, "start at 1"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"device": "nonsense"}, "device 'nonsense' cannot be used"),
    ],
)
def test_loads_that_cannot_be_timed_are_refused(
    pair: tuple[str, str], options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenModel, "model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(MhconvertError, match=words):
        api.bench(pair[1], **(QUICK | options))


def test_a_batch_too_large_for_memory_is_refused_with_one_that_fits(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "available_memory", lambda _: 2**24)
    with pytest.raises(
        MhconvertError, match=r"--batch 999 at context 512 needs about .* 16 MiB are free"
    ) as caught:
        api.bench(pair[1], **(QUICK | {"contexts": [512], "batch": 999}))
    fitting = int(str(caught.value).split("--batch ")[-1].split()[0])
    assert 0 < fitting < 999
    assert api.bench(pair[1], **(QUICK | {"contexts": [512], "batch": fitting}))["batch"] == fitting
    monkeypatch.setattr(bench, "available_memory", lambda _: 2**10)
    with pytest.raises(MhconvertError, match="use shorter --contexts"):
        api.bench(pair[1], **QUICK)


def test_the_estimate_grows_with_the_load(pair: tuple[str, str]) -> None:
    donor, latent = (bench.open_model(reference, device="cpu").config for reference in pair)

    def needed(context: int, width: int = 4, reexpand: bool = False) -> tuple[int, int]:
        return memory_estimate.memory_needed(donor, latent, bench.speed.Load(context, 1, 1), width, reexpand)

    (fixed, row), (double_fixed, double_row) = needed(256), needed(512)
    assert double_row == 2 * row > 4 * 512 * (128 + 64)  # both caches at least
    weights = 2 * fixed - double_fixed
    assert weights == 4 * sum(model.num_parameters() for model in (donor_model(), converted(donor_model())))
    assert needed(256, width=2)[0] == fixed // 2
    assert row / 2 < needed(256, width=2)[1] < row  # scores are float32 anyway
    assert needed(256, reexpand=True)[1] > row
    assert (
        memory_estimate.memory_needed(donor, latent, bench.speed.Load(256, 1, 1, step_tokens=9), 4, False)[1]
        > row
    )


def test_the_memory_that_a_step_takes_is_measured() -> None:
    cpu, kept, layer = torch.device("cpu"), [], torch.nn.Identity()
    # Free memory of the process that fits such blocks, as other work leaves it behind.
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(memory.MMAP_THRESHOLD, memory.LARGE_BLOCK)
    other = [torch.ones(31 * 2**18) for _ in range(14)]  # 31 MiB each
    del other[1:13]
    grown = [torch.ones(2**23)] * 8  # 32 MiB each, one at a time replaced by a larger one

    def grow() -> None:
        for index, part in enumerate(grown):
            grown[index] = torch.cat((layer(part), part[:1]))

    found = [
        memory.peak_bytes(work, cpu)
        for work in (
            lambda: kept.append(torch.ones(1)),
            lambda: kept.append(torch.ones(2**25)),
            lambda: float(torch.ones(2**25).sum()),
            grow,
        )
    ]
    if None in found:
        pytest.skip("the machine does not tell")
    for taken, expected in zip(found, (0, 2**27, 2**27, 2**25), strict=True):
        # Linux counts the pages of a process by CPU and adds them up late: megabytes on machines with many of them.
        assert taken == pytest.approx(expected, abs=3 * 2**22)


def test_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_memory(cpu) == 4000 * 1024
    for limit, expected in (("max\n", 4000 * 1024), ("3000000\n", 2000000)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("1000000\n")
        assert memory.available_memory(cpu) == expected
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    assert memory.available_memory(cpu) is None
    assert memory.available_memory(torch.device("meta")) is None
