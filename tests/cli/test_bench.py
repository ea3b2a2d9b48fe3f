"""`mhconvert bench`: words to the library call, its result to a table or one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhconvert import api
from tests.conftest import Main
from tests.convert.conversions import converted, donor_model
from tests.donors import make_donor

TIMING = {
    "prefill_tokens_per_s": 1234.5,
    "decode_tokens_per_s": 20.0,
    "step_seconds": 0.4,
    "step_spread": 0.05,
    "step_memory_bytes": 2**26,
}
RESULT = {
    "checkpoint": "latent",
    "against": "donor",
    "batch": 8,
    "new_tokens": 16,
    "step_tokens": 1,
    "chunk_tokens": None,
    "device": "cpu",
    "threads": 2,
    "dtype": "float32",
    "cache": "dynamic",
    "compiled": False,
    "rows": [
        {
            "context": 8192,
            "donor": TIMING | {"cache_bytes": 2**30},
            "converted": TIMING
            | {"decode_tokens_per_s": 50.0, "cache_bytes": 2**28, "step_memory_bytes": None},
            "reexpanded": {
                "decode_tokens_per_s": 5.0,
                "step_seconds": 1.6,
                "step_spread": 0.25,
                "step_memory_bytes": 2**30,
            },
            "ratio": 2.5,
            "prefill_ratio": 1.25,
            "cache_ratio": 0.25,
            "ratio_to_reexpanded": 10.0,
        }
    ],
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def bench(checkpoint: str, **options: Any) -> dict[str, Any]:
        seen.append({"checkpoint": checkpoint} | options)
        return RESULT

    monkeypatch.setattr(api, "bench", bench)
    return seen


def test_every_option_reaches_the_library(main: Main, calls: list[dict[str, Any]]) -> None:
    words = "bench latent --against donor --contexts 64,128 --batch 3 --new-tokens 5 --reexpand --compile"
    words += " --step-tokens 4 --chunk-tokens 16"
    assert main(*words.split(), "--static-cache", "--dtype", "bfloat16", "--device", "cpu", "-q") == 0
    assert main("bench", "donor", "--random", "--kv-bits", "16", "--kv-budget", "0.25", "-q") == 0
    for call in calls:
        assert callable(call.pop("on_progress"))
    assert calls[0] == {
        "checkpoint": "latent",
        "against": "donor",
        "contexts": [64, 128],
        "batch": 3,
        "new_tokens": 5,
        "step_tokens": 4,
        "chunk_tokens": 16,
        "reexpand": True,
        "static_cache": True,
        "compile": True,
        "random": None,
        "kv_budget": None,
        "kv_bits": None,
        "dtype": "bfloat16",
        "device": "cpu",
    }
    assert {key: calls[1][key] for key in ("contexts", "batch", "random", "kv_bits", "kv_budget")} == {
        "contexts": [512, 2048, 8192],
        "batch": 8,
        "random": "mla",
        "kv_bits": "16",
        "kv_budget": 0.25,
    }


def test_the_table(main: Main, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench", "latent") == 0
    out = capsys.readouterr().out
    assert out.startswith("donor → latent\nbatch 8, float32, cpu, 2 threads, dynamic cache\n")
    donor, latent, slow = (
        next(line for line in out.splitlines() if name in line)
        for name in (" donor ", " converted ", " re-expanded ")
    )
    assert [cell.strip() for cell in donor.split("│")[1:-1]] == [
        "8,192", "donor", "1,234", "× 1", "20.0", "5 %", "× 1", "1 GiB", "100 %", "64 MiB"
    ]  # fmt: skip
    assert [cell.strip() for cell in latent.split("│")[4:-1]] == [
        "× 1.25", "50.0", "5 %", "× 2.5", "256 MiB", "25 %", ""
    ]  # fmt: skip
    assert [cell.strip() for cell in slow.split("│")[3:-1]] == [
        "", "", "5.0", "25 %", "× 0.25", "", "", "1 GiB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("latent --contexts 2k", "'2k' is not a list of whole numbers"),
        ("latent --kv-budget 0.5", "--kv-budget goes with --random"),
        ("latent --kv-bits 16", "--kv-bits goes with --random"),
        ("donor --random --kv-bits 9", "'9' is not one of 16, auto, 2, 3, 4, 5, 6, 7, 8"),
        ("donor --random --against other", "--against does not go with --random"),
        ("donor --random --to moa", "'moa' is not a method"),
        ("latent --dtype int8", "int8"),
    ],
)
def test_wrong_usage(
    main: Main, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main("bench", *words.split()) == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_a_tiny_pair_as_one_json_object(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    donor = make_donor(tmp_path / "donor")
    converted(donor_model()).save_pretrained(tmp_path / "latent")
    words = (
        "--against",
        donor,
        "--contexts",
        "24",
        "--batch",
        2,
        "--new-tokens",
        2,
        "--json",
        "--device",
        "cpu",
    )
    assert main("bench", tmp_path / "latent", *words) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["rows"]
    assert row["context"] == 24
    assert row["converted"]["cache_bytes"] == row["donor"]["cache_bytes"] / 2 == 4 * 64 * 24 * 2
    assert "decode steps 2/2" in captured.err
    assert main("bench", donor, "--json", "--quiet") == 1
    captured = capsys.readouterr()
    assert "is no folder that mhconvert wrote" in json.loads(captured.out)["error"]
    assert captured.err.startswith("mhconvert: ")


def test_random_weights_of_a_mixture_of_heads(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    donor = make_donor(tmp_path / "donor", heads=4, kv_heads=2)
    words = [
        "--random",
        "--to",
        "moh",
        "--kv-budget",
        0.75,
        "--contexts",
        64,
        "--batch",
        1,
        "--new-tokens",
        2,
    ]
    assert main("bench", donor, *words, "--device", "cpu", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["converted"]["cache_bytes"] == row["donor"]["cache_bytes"]
