"""Generation through the library: greedy repeats itself, samples follow their seed, the chat template is used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mhconvert import api
from mhconvert.errors import MhconvertError, TextError
from tests.donors import make_donor


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_donor(tmp_path_factory.mktemp("generation") / "tiny", layers=1))


def test_greedy_and_sampled(donor: str) -> None:
    def text(**options: object) -> str:
        return api.generate(donor, "The cache", max_new_tokens=12, device="cpu", **options)["text"]  # type: ignore[arg-type]

    assert text() == text(seed=1)
    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1)
    assert text(temperature=1.0, seed=1) != text(temperature=1.0, seed=2)


def test_the_text_is_heard_as_it_is_written(donor: str) -> None:
    heard: list[str] = []
    result = api.generate(donor, "The cache", max_new_tokens=8, device="cpu", on_text=heard.append)
    assert heard[0] == "The cache"
    assert "".join(heard[1:]) == result["text"]


def test_chat_wraps_the_prompt(donor: str, tmp_path: Path) -> None:
    plain = api.generate(donor, "hello", max_new_tokens=1, device="cpu")
    chat = api.generate(donor, "hello", max_new_tokens=1, device="cpu", chat=True)
    assert chat["prompt_tokens"] > plain["prompt_tokens"]
    mute = make_donor(tmp_path / "mute", layers=1)
    for file in mute.glob("chat_template*"):
        file.unlink()
    with pytest.raises(MhconvertError, match="no chat template"):
        api.generate(str(mute), "hello", chat=True, device="cpu")


def test_what_the_model_or_the_template_cannot_take(tmp_path: Path) -> None:
    folder = make_donor(tmp_path / "more", layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<t{number}>" for number in range(320)])
    tokenizer.chat_template = "{{ raise_exception('no user\\nhere') }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(TextError, match=r"\('<t319>'\), and the model's embedding has 320 rows, none for it"):
        api.generate(str(folder), "a <t319> b", device="cpu")
    with pytest.raises(
        MhconvertError, match="the chat template refuses the prompt: no user here; leave --chat away"
    ):
        api.generate(str(folder), "a", chat=True, device="cpu")


def test_half_a_character_is_no_prompt(donor: str) -> None:
    with pytest.raises(MhconvertError, match=r"the prompt cannot be used: character 7 is \\ud800, half of"):
        api.generate(donor, "hello \ud800", max_new_tokens=2)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"seed": 2**70}]
)
def test_options_out_of_range_are_refused(donor: str, options: dict[str, Any]) -> None:
    with pytest.raises(MhconvertError, match="is not between 0"):
        api.generate(donor, "x", device="cpu", **options)


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_that_cannot_compute_is_refused(donor: str, device: str) -> None:
    with pytest.raises(MhconvertError, match=f"device '{device}' cannot be used"):
        api.generate(donor, "x", device=device)
