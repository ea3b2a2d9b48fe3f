"""Texts in a batch are those of single prompts, and their figures are those of plain forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhconvert.eval.generation import Options
from mhconvert.eval.writing.continuations import Text, judge, log_prob, write
from tests.donors import make_donor

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [20, 21, 22]]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("writers")
    return load(make_donor(folder / "one")), load(make_donor(folder / "other", seed=1))


def log_probs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """(tokens, vocab_size), from a forward of the whole row."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def nats(model: Any, prompt: list[int], text: Text) -> float:
    of_tokens = log_probs(model, prompt, text["tokens"])
    return -of_tokens.gather(1, torch.tensor(text["tokens"])[:, None]).sum().item()


def test_a_batch_writes_what_single_prompts_do(pair: tuple[Any, Any]) -> None:
    together = write(pair[0], PROMPTS, Options(12))
    alone = [write(pair[0], [prompt], Options(12))[0] for prompt in PROMPTS]
    assert [text["tokens"] for text in together] == [text["tokens"] for text in alone]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cost_of_a_text_is_that_of_a_forward(pair: tuple[Any, Any], temperature: float) -> None:
    for prompt, text in zip(
        PROMPTS, write(pair[0], PROMPTS, Options(12, temperature=temperature)), strict=True
    ):
        assert text["nats"] == pytest.approx(nats(pair[0], prompt, text), rel=1e-4)


def test_seeds_make_other_texts_and_the_same_again(pair: tuple[Any, Any]) -> None:
    first, again, other = (
        write(pair[0], PROMPTS, Options(12, temperature=1.0, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_text_ends_with_an_end_token_of_the_model(pair: tuple[Any, Any]) -> None:
    """Whatever it writes third is made an end token; without any, texts are as long as asked."""
    model = pair[0]
    whole = write(model, PROMPTS, Options(12))
    ends = model.generation_config.eos_token_id
    end = whole[0]["tokens"][2]
    try:
        model.generation_config.eos_token_id = [1, end]
        cut = write(model, PROMPTS, Options(12))
        assert cut[0]["tokens"] == whole[0]["tokens"][: whole[0]["tokens"].index(end) + 1]
        assert cut[0]["ended"]
        assert cut[0]["nats"] == pytest.approx(nats(model, PROMPTS[0], cut[0]), rel=1e-4)
        model.generation_config.eos_token_id = None
        endless = write(model, PROMPTS, Options(12, temperature=1.0))
        assert [len(text["tokens"]) for text in endless] == [12] * 3
        assert not any(text["ended"] for text in endless)
    finally:
        model.generation_config.eos_token_id = ends


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 3.0),
        ("no_repeat_ngram_size", 2),
        ("num_beams", 2),
        ("min_p", 0.9),
        ("suppress_tokens", list(range(160))),
        ("max_time", 1e-9),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_models_generation_config_hides_nothing(
    pair: tuple[Any, Any], name: str, value: Any, temperature: float
) -> None:
    model, options = pair[0], Options(12, temperature=temperature)
    plain, own = write(model, PROMPTS, options), getattr(model.generation_config, name)
    setattr(model.generation_config, name, value)
    try:
        assert write(model, PROMPTS, options) == plain
        assert getattr(model.generation_config, name) == value
    finally:
        setattr(model.generation_config, name, own)


def test_the_donors_reading(pair: tuple[Any, Any]) -> None:
    """KL(writer ‖ donor) at each token, each of the two after the prompt that it was asked."""
    writer, donor = pair
    text = write(writer, PROMPTS, Options(12, temperature=1.0))[0]
    judged = judge(writer, donor, PROMPTS[0], PROMPTS[1], text)
    ours = log_probs(writer, PROMPTS[0], text["tokens"])
    theirs = log_probs(donor, PROMPTS[1], text["tokens"])
    assert judged["kl"] == pytest.approx((ours.exp() * (ours - theirs)).sum(-1).tolist(), rel=1e-3)
    assert judged["nats"] == pytest.approx(nats(donor, PROMPTS[1], text), rel=1e-4)
    token = text["tokens"][1]
    before = [*PROMPTS[1], text["tokens"][0]]
    assert log_prob(donor, before, token) == pytest.approx(theirs[1, token].item(), rel=1e-4)
    itself = judge(writer, writer, PROMPTS[0], PROMPTS[0], text)
    assert itself["kl"] == pytest.approx([0] * len(text["tokens"]), abs=1e-6)
