"""The evaluation protocol end to end on tiny donors, against transformers' own loss."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mhconvert import api
from mhconvert.convert.checkpoint.identity import converted_method
from mhconvert.convert.open_model import open_model, recorded_donor
from mhconvert.errors import CheckpointError, MhconvertError
from mhconvert.eval.fidelity import text_rows
from mhconvert.eval.settings import EvalSettings
from tests.convert.conversions import converted, donor_model
from tests.donors import make_donor, make_tokenizer

LENGTH, ROWS = 32, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(
        "Water boils at 100 degrees at sea level; nobody counted the boats. " * 20, encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Path, Path]:
    return make_donor(folder / "one", seed=0), make_donor(folder / "other", seed=1)


def on(text: Path, rows: int) -> EvalSettings:
    return EvalSettings(text=(str(text),), sequences=rows, sequence_length=LENGTH)


def loss(checkpoint: Path, rows: torch.Tensor) -> float:
    """transformers' own mean loss: rows of one length weigh the same."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=rows, labels=rows).loss.item()


def test_perplexity_is_the_exponential_of_transformers_loss(pair: tuple[Path, Path], text: Path) -> None:
    donor, other = pair
    result = api.evaluate(str(other), on(text, ROWS), against=str(donor), device="cpu")
    rows = text_rows(make_tokenizer(), text, LENGTH, ROWS)
    (found,) = result["texts"]
    assert (found["text"], found["tokens"]) == ("text.txt", ROWS * (LENGTH - 1))
    assert found["models"][0]["perplexity"] == pytest.approx(math.exp(loss(donor, rows)), rel=1e-4)
    assert found["models"][1]["perplexity"] == pytest.approx(math.exp(loss(other, rows)), rel=1e-4)
    assert (found["models"][0]["kl"], found["models"][0]["top1_agreement"]) == (0, 1)
    assert found["models"][1]["kl"] > 0
    assert 0 <= found["models"][1]["top1_agreement"] < 1
    assert result["cache"] == [{"kv_elements_per_token": 2 * 2 * 2 * 16}] * 2


def test_the_donor_is_read_from_the_provenance(pair: tuple[Path, Path], text: Path) -> None:
    donor, other = pair
    (other / "mhconvert.json").write_text(json.dumps({"recipe": {"model": str(donor)}}))
    assert recorded_donor(str(other)) == str(donor)
    result = api.evaluate(str(other), on(text, 1), device="cpu")
    assert [model["reference"] for model in result["models"]] == [str(donor), str(other)]
    with pytest.raises(MhconvertError, match="name the donor with --against"):
        recorded_donor(str(donor))


@pytest.mark.parametrize("reference", ["half", "out/half"])  # the second could be a name on the Hub
def test_what_is_not_there_is_not_asked_for_its_donor(
    tmp_path: Path, text: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"{reference}.partial").mkdir(parents=True)
    unfinished = f"^{reference} is unfinished, there is only {reference}.partial: .* --resume"
    for work in (lambda: api.evaluate(reference, on(text, 1)), lambda: open_model(reference)):
        with pytest.raises(CheckpointError, match=unfinished):
            work()
    with pytest.raises(CheckpointError, match="^there is no folder nowhere$"):
        api.evaluate("nowhere", on(text, 1))


def test_another_vocabulary_cannot_be_compared(pair: tuple[Path, Path], text: Path, folder: Path) -> None:
    small = make_donor(folder / "small", vocab=300)
    with pytest.raises(MhconvertError, match=r"300 tokens and .* has 320"):
        api.evaluate(str(small), on(text, ROWS), against=str(pair[0]))


def test_texts_are_read_as_calibration_text_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """JSON lines are their documents; a token that no model has is named."""
    documents = ["Water boils at 100 degrees. " * 20, "Nobody counted the boats. " * 20]
    plain, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    plain.write_text("\n\n".join(documents), encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"text": each}) for each in documents), encoding="utf-8")
    rows = [text_rows(make_tokenizer(), file, LENGTH, ROWS) for file in (plain, lines)]
    assert rows[0].equal(rows[1])
    donor = tmp_path / "donor"
    shutil.copytree(pair[0], donor)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<t{number}>" for number in range(320)])
    tokenizer.save_pretrained(donor)
    plain.write_text("a <t319> b " * 200, encoding="utf-8")
    with pytest.raises(MhconvertError, match=r"\('<t319>'\), and the model's embedding has 320 rows"):
        api.evaluate(str(donor), on(plain, ROWS), against=str(donor), device="cpu")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    converted(donor_model()).save_pretrained(folder / "converted")
    make_tokenizer().save_pretrained(folder / "converted")
    return folder / "converted"


def damaged(checkpoint: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """A copy of `checkpoint` at `place` with its tensors changed."""
    shutil.copytree(checkpoint, place)
    weights = load_file(place / "model.safetensors")
    change(weights)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return str(place)


UP, NORM = "model.layers.1.self_attn.kv_b_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(UP), f"tensor {UP} is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "tensor extra is unexpected"),
        (lambda w: w[NORM].fill_(math.nan), f"tensor {NORM} in .* holds NaN values"),
    ],
    ids=["missing", "unexpected", "nan"],
)
def test_a_damaged_checkpoint_is_not_measured(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    """transformers gives a missing tensor random values and goes on."""
    assert api.generate(str(checkpoint), "hi", max_new_tokens=2, device="cpu")["new_tokens"] > 0
    with pytest.raises(CheckpointError, match=words):
        api.generate(damaged(checkpoint, tmp_path / "damaged", change), "hi", device="cpu")


def test_a_truncated_checkpoint_and_one_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated: 5000 bytes of"):
        api.generate(str(tmp_path / "cut"), "hi", device="cpu")
    shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="the tokenizer in .* cannot be loaded"):
        api.generate(str(tmp_path / "bare"), "hi", device="cpu")


def test_only_folders_made_by_a_method_are_opened_by_our_classes(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    assert converted_method(str(pair[0])) is None
    assert converted_method("smollm2-135m") is None
    assert open_model(str(pair[0])).donor is not None
    (tmp_path / "config.json").write_text('{"model_type": "mla_llama"}')
    assert converted_method(str(tmp_path)) == "mla"
    (tmp_path / "config.json").write_text("[]")
    assert converted_method(str(tmp_path)) is None
