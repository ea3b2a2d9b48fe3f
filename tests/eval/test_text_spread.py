"""Several texts together: the mean, the worst, and a text that is worse than the others by more than noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mhconvert.errors import MhconvertError, RecipeError, TextError
from mhconvert.eval.fidelity import STRETCH, Fidelity, text_rows
from mhconvert.eval.settings import EvalSettings
from mhconvert.eval.text_choice import Text, chosen, token_rows
from mhconvert.eval.text_spread import counted, over_texts, sentence
from tests.donors import make_tokenizer

KINDS = ["encyclopaedia", "textbook", "fiction", "chat", "code"]


def read(**ratios: float) -> list[dict[str, Any]]:
    """Texts on which a model has these perplexities ÷ the donor's, each ± 1 %."""
    return [
        {
            "text": name,
            "models": [
                {"perplexity": 20.0, "kl": 0.0},
                {"perplexity": 20.0 * ratio, "kl": 0.1, "ratio": ratio, "ratio_stderr": 0.01 * ratio},
            ],
        }
        for name, ratio in ratios.items()
    ]


def test_the_mean_is_geometric_and_the_worst_is_named() -> None:
    donor, model = over_texts(read(a=1.0, b=1.21)) or []
    assert (donor["ratio"], donor["worst"]) == (1.0, None)
    assert model["ratio"] == pytest.approx(1.1)
    assert (model["worst"], model["worst_ratio"]) == ("b", pytest.approx(1.21))
    assert over_texts(read(a=1.0)) is None


def test_texts_of_a_suite_are_told_of_without_the_users() -> None:
    texts = [*read(a=1.0, b=1.21), *read(mine=3.0)]
    for text in texts[:2]:
        text["kind"] = text["text"]
    _, model = over_texts(texts) or []
    assert (model["ratio"], model["worst"]) == (pytest.approx(1.1), "b")
    assert [len(counted(each)) for each in (texts, texts[2:])] == [2, 1]


@pytest.mark.parametrize(
    ("ratios", "worse"),
    [
        ({"wiki": 1.135, "history": 1.084, "fiction": 1.404}, ["fiction"]),
        ({"wiki": 1.11, "history": 1.2, "fiction": 1.27}, []),  # texts differ that much for any conversion
        ({"wiki": 1.001, "history": 1.002, "fiction": 1.02}, []),  # little, though ten times the others
        ({"wiki": 1.135, "fiction": 1.404}, []),  # which of two is the odd one cannot be said
    ],
)
def test_a_text_that_is_much_worse(ratios: dict[str, float], worse: list[str]) -> None:
    _, model = over_texts(read(**ratios)) or []
    assert [each["text"] for each in model["worse"]] == worse
    assert ("fiction is much worse than the other texts" in sentence(model)) is bool(worse)


def test_noise_and_what_is_not_finite_are_not_judged() -> None:
    texts = read(wiki=1.1, history=1.1, fiction=1.4)
    texts[2]["models"][1]["ratio_stderr"] = 0.12
    assert (over_texts(texts) or [])[1]["worse"] == []
    texts[0]["models"][1] |= {"perplexity": math.inf, "ratio": None, "ratio_stderr": None}
    _, model = over_texts(texts) or []
    assert (model["ratio"], model["worst"], model["worst_ratio"], model["worse"]) == (None, "wiki", None, [])


def test_errors_are_those_of_means_over_stretches() -> None:
    """Predictions of a stretch are alike, so their number does not make the error smaller."""
    found, generator = Fidelity(), torch.Generator().manual_seed(0)
    levels = torch.randn(64, generator=generator).tolist()
    for level in levels:  # a stretch whose predictions all cost `level` more
        donor, converted = torch.zeros(STRETCH, 2), torch.zeros(STRETCH, 2)
        converted[:, 1] = level
        found.add(donor, converted, torch.zeros(STRETCH, dtype=torch.long))
    more = torch.tensor(levels).exp().add(1).log().sub(math.log(2))
    assert found.errors()["log_ratio_stderr"] == pytest.approx(more.std().item() / math.sqrt(64), rel=1e-4)
    alone = Fidelity()
    alone.add(donor, converted, torch.zeros(STRETCH, dtype=torch.long))
    assert alone.errors() == {"log_ratio_stderr": None, "kl_stderr": None}


def test_the_standard_suite_has_five_kinds_of_our_own() -> None:
    texts = chosen(EvalSettings(suite="standard"))
    assert [text.name for text in texts] == KINDS
    for text in texts:  # a tokenizer without a chat template reads them too
        rows = text_rows(make_tokenizer(), text.file, text.sequence_length, text.sequences, text.chat)
        assert rows.shape == (text.sequences, text.sequence_length)
    assert chosen(EvalSettings(suite="quick")) == []


def test_files_of_the_kinds_are_taken_from_the_data(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name in ("fiction.jsonl", "codes.txt", "code.bin", "books/textbook.txt.gz", "books/wiki.test.raw"):
        (tmp_path / name).touch()
    names = [text.name for text in chosen(EvalSettings(suite="standard", data=tmp_path))]
    assert names == [
        *("encyclopaedia (wiki.test.raw)", "textbook (textbook.txt.gz)", "fiction (fiction.jsonl)"),
        *("chat", "code"),
    ]
    with pytest.raises(TextError, match="is no folder"):
        chosen(EvalSettings(suite="standard", data=tmp_path / "none"))


def test_texts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    given = [str(tmp_path / name) for name in ("a/x.txt", "b/x.txt", "y.txt", "y.txt")]
    names = [text.name for text in chosen(EvalSettings(text=tuple(given), sequences=3))]
    assert names == [given[0], given[1], "y.txt"]
    books = str(tmp_path / "fiction")
    names = [text.name for text in chosen(EvalSettings(suite="standard", text=(books, "code", "y.txt")))]
    assert names == [*KINDS, books, "./code", "y.txt"], "a user's file does not take the place of the suite's"


class Model:
    """As far as an open model is asked for texts."""

    vocab_size, tokenizer = 320, staticmethod(make_tokenizer)

    def __init__(self, longest: int | None) -> None:
        self.longest = longest

    def require_length(self, tokens: int) -> None:
        if self.longest and tokens > self.longest:
            raise MhconvertError("too long")


def read_by(texts: list[Text], *longest: int | None) -> list[tuple[int, ...]]:
    models: Any = list(map(Model, longest))
    return [tuple(ids.shape) for ids in token_rows(texts, models, beyond=False).values()]


def test_rows_of_the_suite_are_no_longer_than_the_models_read(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("The boats were counted. " * 200)
    texts = chosen(EvalSettings(suite="standard", text=(str(mine),), sequences=1, sequence_length=64))
    assert read_by(texts, None, 512) == [(2, 256)] * 5 + [(1, 64)]
    assert read_by(texts, 512, 100) == [(2, 100)] * 5 + [(1, 64)]
    with pytest.raises(MhconvertError, match="too long"):
        read_by(texts, 32)


def test_a_short_text_of_the_data_is_named_with_what_the_suite_needs(tmp_path: Path) -> None:
    (tmp_path / "fiction.txt").write_text("Nobody counted the boats.")
    texts = chosen(EvalSettings(suite="standard", data=tmp_path))
    words = r"fiction.txt has \d+ tokens and 2 × 256 = 512 are asked for; lengthen the file, or leave it out of --data"
    with pytest.raises(MhconvertError, match=words) as raised:
        read_by(texts, 512)
    assert "--sequence-length" not in str(raised.value)


@pytest.mark.parametrize("ignored", [{"sequence_length": 64}, {"sequences": 1}])
def test_rows_are_of_the_users_text_alone(ignored: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="sequences and sequence_length are of text"):
        EvalSettings(suite="standard", **ignored)
