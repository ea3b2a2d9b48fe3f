"""Generation through the library: greedy repeats itself, samples follow their seed, the chat template is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhconvert import api
from mhconvert.convert.errors import MhconvertError
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


def test_a_negative_temperature_is_refused(donor: str) -> None:
    with pytest.raises(MhconvertError, match="negative"):
        api.generate(donor, "x", temperature=-1, device="cpu")
