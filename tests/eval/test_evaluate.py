"""The evaluation protocol end to end on tiny donors, against transformers' own loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhconvert import api
from mhconvert.convert.errors import MhconvertError
from mhconvert.eval.fidelity import text_rows
from mhconvert.eval.load import converted_method, open_model, recorded_donor
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


def loss(checkpoint: Path, rows: torch.Tensor) -> float:
    """transformers' own mean loss: rows of one length weigh the same."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=rows, labels=rows).loss.item()


def test_perplexity_is_the_exponential_of_transformers_loss(pair: tuple[Path, Path], text: Path) -> None:
    donor, other = pair
    result = api.evaluate(
        str(other), against=str(donor), text=text, sequence_length=LENGTH, sequences=ROWS, device="cpu"
    )
    rows = text_rows(make_tokenizer(), text, LENGTH, ROWS)
    assert result["tokens"] == ROWS * (LENGTH - 1)
    assert result["perplexity"]["donor"] == pytest.approx(math.exp(loss(donor, rows)), rel=1e-4)
    assert result["perplexity"]["converted"] == pytest.approx(math.exp(loss(other, rows)), rel=1e-4)
    assert result["kl"] > 0
    assert result["kv_elements_per_token"] == {"donor": 2 * 2 * 2 * 16, "converted": 2 * 2 * 2 * 16}
    assert 0 <= result["top1_agreement"] < 1


def test_the_donor_is_read_from_the_provenance(pair: tuple[Path, Path], text: Path) -> None:
    donor, other = pair
    (other / "mhconvert.json").write_text(json.dumps({"recipe": {"model": str(donor)}}))
    assert recorded_donor(str(other)) == str(donor)
    result = api.evaluate(str(other), text=text, sequence_length=LENGTH, sequences=1, device="cpu")
    assert result["against"] == str(donor)
    with pytest.raises(MhconvertError, match="name the donor with --against"):
        recorded_donor(str(donor))


def test_another_vocabulary_cannot_be_compared(pair: tuple[Path, Path], text: Path, folder: Path) -> None:
    small = make_donor(folder / "small", vocab=300)
    with pytest.raises(MhconvertError, match=r"300 tokens and .* has 320"):
        api.evaluate(str(small), against=str(pair[0]), text=text, sequence_length=LENGTH, sequences=ROWS)


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
