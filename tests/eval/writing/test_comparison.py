"""A donor that writes stories, a conversion without loss, and three that were broken on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhconvert import Calibration, MLASettings, Recipe, api
from mhconvert.eval.report.model_index import read_evaluation
from mhconvert.eval.report.recorded_evaluation import record_evaluation
from mhconvert.eval.settings import EvalSettings
from mhconvert.eval.tasks.candidate import Candidate
from mhconvert.eval.writing import continuations
from tests.donors import make_donor

OPENING = "Once upon a time, there was a little girl named Lily. "
TEMPLATE = "{% for m in messages %}" + OPENING + "{{ m['content'] }}{% endfor %}"
BEGINNINGS = (
    "One day, Tom went to the park.",
    "The dog was big and",
    "She found a red ball.",
    "It was raining and",
    "Ben and Sue were friends.",
    "He saw a bird in the tree.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writing")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> str:
    (folder / "prompts.txt").write_text("\n".join(BEGINNINGS), encoding="utf-8")
    return str(folder / "prompts.txt")


@pytest.fixture(scope="module")
def donor(folder: Path, data: Path) -> Path:
    """The story writer, asked through a chat template."""
    shutil.copytree(data / "checkpoints" / "stories260k-gqa", folder / "donor")
    tokenizer = AutoTokenizer.from_pretrained(folder / "donor")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "donor")
    return folder / "donor"


def in_config(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def loop(folder: Path) -> None:
    """Whatever is read, one token is the likeliest by far: its row of the head points to where all states do."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        ids = tokenizer(OPENING + "She liked to play.", return_tensors="pt")["input_ids"]
        states = model.model(ids).last_hidden_state[0].mean(0)
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    head[tokenizer(" the")["input_ids"][-1]] += 40 * states / states.norm() ** 2
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    in_config(folder, tie_word_embeddings=False)


def wrong_theta(folder: Path) -> None:
    in_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


def lost_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def written(donor: Path, checkpoint: Path, prompts: str, **settings: Any) -> dict[str, Any]:
    asked = EvalSettings(generation=True, prompts=prompts, **{"max_new_tokens": 64} | settings)
    result: dict[str, Any] = api.evaluate(str(checkpoint), asked, against=str(donor), device="cpu")[
        "generation"
    ]
    return result


def test_a_conversion_without_loss_writes_as_its_donor(
    donor: Path, prompts: str, data: Path, folder: Path
) -> None:
    recipe = Recipe(
        model=str(donor),
        method="mla",
        settings=MLASettings(kv_budget=1.0, kv_bits="16"),
        output=str(folder / "whole"),
        fit_steps=0,
        verify=False,
        calibration=Calibration(
            (str(data / "calib" / "classic-books.jsonl"),), tokens=1024, sequence_length=128
        ),
    )
    api.convert(recipe)
    of_donor, whole = written(donor, folder / "whole", prompts)["models"]
    assert (whole["verdict"], whole["notes"]) == ("writes as its donor does", [])
    assert whole["kl"] == pytest.approx(0, abs=1e-5)
    assert whole["divergence"] == {"tokens": None, "equal": 1, "log_prob": None}
    assert [each["same_tokens"] for each in whole["texts"]] == [None] * len(BEGINNINGS)
    assert [each["text"] for each in whole["texts"]] == [each["text"] for each in of_donor["texts"]]
    assert whole["perplexity"] == pytest.approx(of_donor["perplexity"], rel=1e-4)


@pytest.mark.parametrize(
    ("fault", "verdict", "note"),
    [
        (loop, "loops", "repeats itself more"),
        (wrong_theta, "drifts", "writes what the donor finds less likely"),
        (lost_template, "drifts", "has lost its donor's chat template"),
    ],
    ids=["loop", "theta", "template"],
)
def test_what_is_broken_is_found(
    donor: Path, prompts: str, tmp_path: Path, fault: Callable[[Path], None], verdict: str, note: str
) -> None:
    shutil.copytree(donor, tmp_path / "broken")
    fault(tmp_path / "broken")
    found = written(donor, tmp_path / "broken", prompts)["models"][1]
    assert (found["verdict"], note in found["notes"]) == (verdict, True), found["notes"]


def test_an_interrupted_evaluation_goes_on(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two models with six prompts in batches of two: nine batches of the donor, six of the other, six readings."""
    monkeypatch.setenv("MHCONVERT_EVAL_CACHE", str(tmp_path / "cache"))
    donor, other = make_donor(tmp_path / "one", layers=1), make_donor(tmp_path / "two", layers=1, seed=1)
    calls: list[str] = []
    stop_at = 11

    def counted(name: str) -> None:
        real = getattr(continuations, name)

        def call(*arguments: Any) -> Any:
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(continuations, name, call)

    counted("write")
    counted("judge")
    settings = {"max_new_tokens": 4, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        written(donor, other, prompts, **settings)
    stop_at = 100
    first = written(donor, other, prompts, **settings)
    assert calls == ["write"] * 15 + ["judge"] * 6
    assert written(donor, other, prompts, **settings) == first
    assert len(calls) == 21


@pytest.mark.parametrize(("dtype", "loads"), [(None, 1), ("bfloat16", 2)])
def test_the_donor_is_read_once_for_texts_that_are_written_and_read(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None, loads: int
) -> None:
    """Texts are read in float32, so that writing in another dtype takes it once more."""
    monkeypatch.setenv("MHCONVERT_EVAL_CACHE", str(tmp_path / "cache"))
    donor, other = make_donor(tmp_path / "one", layers=1), make_donor(tmp_path / "two", layers=1, seed=1)
    loaded: list[str] = []
    load = Candidate.load

    def counted(candidate: Candidate, dtype: torch.dtype = torch.float32) -> Any:
        loaded.append(candidate.name)
        return load(candidate, dtype)

    monkeypatch.setattr(Candidate, "load", counted)
    text = tmp_path / "text.txt"
    text.write_text("The river runs through the valley and the town. " * 20)
    reading = {"text": (str(text),), "sequence_length": 32, "sequences": 1, "dtype": dtype}
    written(donor, other, prompts, max_new_tokens=4, **reading)
    assert loaded.count("one") == loads


def test_a_model_alone_and_one_with_a_coded_cache(prompts: str, tmp_path: Path) -> None:
    """A donor alone has no verdict; with another cache it is its own conversion, read without padding."""
    donor = make_donor(tmp_path / "tiny", layers=1)
    alone = api.evaluate(
        str(donor), EvalSettings(generation=True, prompts=prompts, max_new_tokens=8), device="cpu"
    )
    assert "verdict" not in alone["generation"]["models"][0]
    coded = written(donor, donor, prompts, max_new_tokens=64, kv_cache_dtype="int2")["models"]
    assert len(coded) == 2
    assert coded[1]["kl"] > 1e-4


def test_the_card_has_the_verdict(prompts: str, tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "tiny", layers=1)
    twin = make_donor(tmp_path / "twin", layers=1, seed=1)
    asked = EvalSettings(generation=True, prompts=prompts, max_new_tokens=8)
    result = api.evaluate(str(twin), asked, against=str(donor), device="cpu")
    theirs, model = result["generation"]["models"]
    assert result["generation"]["asked"] == list(BEGINNINGS)
    for ours, text in zip(model["texts"], theirs["texts"], strict=True):
        at = ours["same_characters"]
        assert (ours["text"][:at], ours["text"][at : at + 1]) != (
            text["text"][:at],
            text["text"][at : at + 1],
        )
        assert ours["text"][:at] == text["text"][:at]
    result["models"][1]["role"] = "converted"
    assert record_evaluation(result) == {}
    recorded = json.loads((twin / "evaluation.json").read_text())["generation"]
    assert "asked" not in recorded
    assert [set(each) & {"texts", "greedy"} for each in recorded["models"]] == [{"greedy"}] * 2
    card = read_evaluation(twin)
    assert card is not None
    assert {row[0] for row in card.rows} >= {"generation: KL on its own text", "generation: texts that loop"}
    assert any(model["words"] in line for line in card.settings)
    (kl,) = [each for each in card.results if each.metric_type == "kl"]
    assert kl.metric_value == pytest.approx(model["kl"])
