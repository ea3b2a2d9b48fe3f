"""`eval --record`: what can stand in one file is put together, and no earlier figure is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhconvert.eval.report.recorded_evaluation import record_evaluation


def result(folder: Path, **changed: Any) -> dict[str, Any]:
    models = [
        {
            "reference": str(place),
            "role": role,
            "fingerprint": role,
            "dtype": "float32",
            "kv_cache_dtype": "auto",
        }
        for place, role in ((folder / "donor", "donor"), (folder, "converted"))
    ]
    text = {"text": "a.txt", "sequences": 4, "sequence_length": 64, "models": []}
    task = {"task": "piqa", "num_fewshot": 0, "metrics": [{"metric": "acc", "models": []}]}
    parts = {
        "texts": [text],
        "tasks": [task],
        "retrieval": None,
        "generation": None,
        "cache": None,
        "average": None,
    }
    settings = {"suite": None, "limit": 5, "batch_size": 8, "device": "cpu"}
    return {"models": models, **parts, "settings": settings, "versions": {"torch": "2"}} | changed


def recorded(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.fixture(autouse=True)
def one_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhconvert.eval.tasks.scores.average", lambda rows: len(rows))


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"suite": None, "limit": 100, "batch_size": 8, "device": "cpu"}},
        {"versions": {"torch": "3"}},
        {"texts": [{"text": "a.txt", "sequences": 4, "sequence_length": 128, "models": []}]},
        {"tasks": [{"task": "piqa", "num_fewshot": 5, "metrics": [{"metric": "acc", "models": []}]}]},
        {"tasks": [{"task": "piqa", "num_fewshot": 0, "metrics": [{"metric": "parses", "models": []}]}]},
    ],
)
def test_figures_in_other_settings_are_kept_aside(tmp_path: Path, change: dict[str, Any]) -> None:
    assert record_evaluation(result(tmp_path)) == {}
    first = recorded(tmp_path / "evaluation.json")
    assert record_evaluation(result(tmp_path, **change)) == {
        "kept_aside": [str(tmp_path / "evaluation-1.json")]
    }
    assert recorded(tmp_path / "evaluation-1.json") == first
    assert recorded(tmp_path / "evaluation.json") != first
    assert record_evaluation(result(tmp_path)) == {
        "kept_aside": [str(tmp_path / "evaluation-2.json")]
    }  # and back again
    assert len(list(tmp_path.iterdir())) == 3


def test_the_same_settings_stand_together(tmp_path: Path) -> None:
    record_evaluation(result(tmp_path))
    more = {"texts": [], "tasks": [{"task": "arc", "num_fewshot": 0, "models": []}]}
    assert record_evaluation(result(tmp_path, **more)) == {}
    whole = recorded(tmp_path / "evaluation.json")
    assert [row["text"] for row in whole["texts"]] == ["a.txt"]
    assert [row["task"] for row in whole["tasks"]] == ["piqa", "arc"]
    assert record_evaluation(result(tmp_path)) == {}  # measured again
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_newer_text_of_a_kind_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    text = {"sequences": 2, "sequence_length": 256, "models": []}
    own, theirs = ({"text": name, "kind": "fiction"} | text for name in ("fiction", "fiction (fiction.txt)"))
    record_evaluation(result(tmp_path))
    record_evaluation(result(tmp_path, texts=[own]))
    assert len(record_evaluation(result(tmp_path, texts=[theirs]))["kept_aside"]) == 1
    assert [row["text"] for row in recorded(tmp_path / "evaluation.json")["texts"]] == [
        "a.txt",
        theirs["text"],
    ]


@pytest.mark.parametrize(
    ("text", "aside"), [('{"moon": 1}', 0), ("{", 0), ('{"tasks": [7]}', 1), ('{"texts": 7}', 1)]
)
def test_a_file_of_another_kind(tmp_path: Path, text: str, aside: int) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    assert len(record_evaluation(result(tmp_path)).get("kept_aside", [])) == aside
    assert recorded(tmp_path / "evaluation.json")["tasks"]


def test_texts_of_other_lengths_are_kept_aside(tmp_path: Path) -> None:
    """The same texts anew take the place of earlier ones; what lacks them keeps them."""
    short, long = ({"prompts": "own", "max_new_tokens": size, "models": [{"kl": size}]} for size in (64, 256))
    assert record_evaluation(result(tmp_path, generation=short)) == {}
    assert record_evaluation(result(tmp_path)) == {}
    assert recorded(tmp_path / "evaluation.json")["generation"] == short
    assert record_evaluation(result(tmp_path, generation=short | {"models": [{"kl": 1}]})) == {}
    assert recorded(tmp_path / "evaluation.json")["generation"]["models"] == [{"kl": 1}]
    aside = {"kept_aside": [str(tmp_path / "evaluation-1.json")]}
    assert record_evaluation(result(tmp_path, generation=long)) == aside
    assert recorded(tmp_path / "evaluation.json")["generation"] == long


def test_refusals_of_other_requests_are_kept_aside(tmp_path: Path) -> None:
    ours, theirs = ({"requests": 24, "digest": digest, "models": []} for digest in ("a", "b"))
    assert record_evaluation(result(tmp_path, refusals=ours)) == {}
    assert record_evaluation(result(tmp_path, refusals=ours | {"models": [1]})) == {}
    assert len(record_evaluation(result(tmp_path, refusals=theirs))["kept_aside"]) == 1
    assert recorded(tmp_path / "evaluation.json")["refusals"] == theirs
    assert recorded(tmp_path / "evaluation-1.json")["refusals"]["models"] == [1]


@pytest.mark.parametrize("change", [{"lengths": [256]}, {"depths": [0.0]}, {"trials": 8}])
def test_retrieval_with_other_needles_is_kept_aside(tmp_path: Path, change: dict[str, Any]) -> None:
    first = {"lengths": [256, 512], "depths": [0.0, 1.0], "trials": 2, "left_out": [2048], "models": [0.25]}
    assert record_evaluation(result(tmp_path, retrieval=first)) == {}
    assert record_evaluation(result(tmp_path)) == {}  # keeps it
    assert record_evaluation(result(tmp_path, retrieval=first | {"left_out": [], "models": [0.5]})) == {}
    assert len(record_evaluation(result(tmp_path, retrieval=first | change))["kept_aside"]) == 1
    assert recorded(tmp_path / "evaluation.json")["retrieval"] == first | change
    assert recorded(tmp_path / "evaluation-1.json")["retrieval"]["models"] == [0.5]
