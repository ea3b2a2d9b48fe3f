"""Settings, steps and the machine: numbers as people write them, sizes that fit, configs that do not."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import strategies as st

from mhconvert.convert.recipe.heal_settings import HealSettings, token_count
from mhconvert.convert.recipe.weighted_names import loss_terms, weighted
from mhconvert.errors import HealError
from mhconvert.heal import schedule


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("200k", 200_000),
        ("20M", 20_000_000),
        ("1.5B", 1_500_000_000),
        ("2e6", 2_000_000),
        ("10_000", 10_000),
        (7, 7),
    ],
)
def test_numbers_of_tokens(text: str | int, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize("text", ["much", "20 m m", "-5", "1.5", "", True])
def test_no_numbers_of_tokens(text: Any) -> None:
    with pytest.raises(HealError, match="tokens"):
        token_count(text)


@pytest.mark.parametrize("text", ["1e400", "1e999k", "9" * 400])
def test_a_count_beyond_every_number_is_refused(text: str) -> None:
    for name in ("tokens", "layer_tokens", "batch_tokens", "eval_tokens"):
        with pytest.raises(HealError, match=rf"{name}={text} is not a whole number of tokens"):
            HealSettings(**{"tokens": 5, name: text})  # type: ignore[arg-type]
    with pytest.raises(HealError, match="tokens 'inf' is not a number of tokens"):
        HealSettings(tokens="inf")


def test_a_rate_as_yaml_reads_it() -> None:
    assert HealSettings(tokens=1, lr="3e-4").lr == 3e-4  # type: ignore[arg-type]


def test_words_with_weights() -> None:
    assert loss_terms("kl,ce=0.1") == {"kl": 1.0, "ce": 0.1}
    assert weighted("a=b/c.txt") == ("a=b/c.txt", None)
    assert weighted("a=b/c.txt=2") == ("a=b/c.txt", 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "how many tokens"),
        ({"tokens": 10, "lm_tokens": 20}, "lm_tokens=20 are a part of tokens=10"),
        ({"tokens": 1, "train": "mlp"}, "train 'mlp' is not one of attention, all, lora, hydra"),
        ({"tokens": 1, "loss": "kl,mse"}, "loss has no term 'mse'"),
        ({"tokens": 1, "loss": "kl=0"}, "every weight of loss is 0"),
        ({"tokens": 1, "data": {"a.txt": -1}}, "data a.txt=-1 is not a weight"),
        ({"tokens": 1, "data": {}}, "healing needs text"),
        (
            {"tokens": 1, "on_policy": 1.0},
            "on_policy=1.0 is not between 0 and 1: the other rows are the text",
        ),
        ({"tokens": 1, "on_policy_loss": 0.5}, "on_policy_loss is of rows that the student writes"),
        ({"tokens": 1, "on_policy": 0.5, "loss": "ce"}, "on_policy text is scored by the teacher"),
        ({"tokens": 8, "lm_tokens": 8, "on_policy": 0.5}, "leave it tokens that are not lm_tokens"),
        ({"tokens": 1, "lr": 2.0}, "lr=2.0 is not between 0 and 1"),
        ({"tokens": 1, "warmup": 1.0}, "warmup=1.0 is a share"),
        ({"tokens": 1, "micro_batch": 0}, "micro_batch=0 is too small"),
        ({"tokens": 1, "loss": ["kl"]}, r"loss: \['kl'\] is not a mapping"),
        ({"tokens": 1, "lr": "fast"}, "lr='fast' is not a number"),
        ({"tokens": 1, "epochs": 1.5}, "epochs=1.5 is not a whole number"),
        (
            {"tokens": 1, "gradient_checkpointing": "no"},
            "gradient_checkpointing='no' is neither true nor false",
        ),
        ({"tokens": 1, "schedule": "linear"}, "schedule 'linear' is not one of cosine, wsd, constant"),
    ],
)
def test_settings_that_say_nothing_sensible(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HealError, match=message):
        HealSettings(**settings)


def test_a_resumed_run_may_change_how_it_runs_and_not_what_it_learns() -> None:
    settings = HealSettings(tokens="20k", data=["a.txt"], lr=0.01)
    kept = json.loads(json.dumps(dataclasses.asdict(settings)))
    assert settings.same_run(kept) is None
    assert dataclasses.replace(settings, lr=0.001, micro_batch=4).same_run(kept) is None
    assert dataclasses.replace(settings, seed=1).same_run(kept) == "seed"


@given(
    tokens=st.integers(1, 10**9),
    processes=st.integers(1, 16),
    limit=st.sampled_from([None, 512, 4096]),
    batch=st.sampled_from([None, 1000, 8192, 300_000]),
)
def test_steps_cover_the_tokens_and_divide_evenly(
    tokens: int, processes: int, limit: int | None, batch: int | None
) -> None:
    steps = schedule.divide(HealSettings(tokens=tokens, batch_tokens=batch), limit, processes, "cpu")
    assert steps.length == min(1024, limit or 1024)
    assert steps.batch_rows % (processes * steps.micro_rows) == 0
    assert tokens <= steps.rows * steps.length < tokens + steps.step_tokens
    assert steps.lm_from == steps.steps


def test_the_last_tokens_are_for_the_text_alone() -> None:
    steps = schedule.divide(HealSettings(tokens=40960, lm_tokens=8192, batch_tokens=4096), 512, 1, "cpu")
    assert (steps.steps, steps.lm_from) == (10, 8)


def test_sizes_that_do_not_go_together() -> None:
    with pytest.raises(HealError, match="sequence_length=2048 is more than the models read; choose .* ≤ 512"):
        schedule.divide(HealSettings(tokens=1, sequence_length=2048), 512, 1, "cpu")
    with pytest.raises(HealError, match="micro_batch=3 does not divide the 4 rows"):
        schedule.divide(HealSettings(tokens=1, batch_tokens=2048, micro_batch=3), 512, 1, "cpu")


class Machine:
    """An accelerator as far as the check looks."""

    def __init__(self, kind: DistributedType, version: int = 2, accumulation: int = 1):
        self.distributed_type, self.gradient_accumulation_steps = kind, accumulation
        self.num_processes = 1
        self.state = type("State", (), {"fsdp_plugin": type("Plugin", (), {"fsdp_version": version})()})()


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine(DistributedType.DEEPSPEED), "asks for DEEPSPEED, which healing does not run on"),
        (Machine(DistributedType.FSDP, version=1), "asks for FSDP 1; set fsdp_version: 2"),
        (Machine(DistributedType.NO, accumulation=4), "accumulates 4 steps"),
    ],
)
def test_accelerate_configs_that_do_not_fit(machine: Any, message: str) -> None:
    with pytest.raises(HealError, match=message):
        schedule._require_supported(machine)


def test_devices() -> None:
    with pytest.raises(HealError, match="device 'tpu' is neither cpu nor cuda"):
        schedule.make_accelerator(HealSettings(tokens=1, device="tpu"))


def test_a_machine_that_somebody_has_set_up_is_taken_as_it_is() -> None:
    first = schedule.make_accelerator(HealSettings(tokens=1, device="cpu"))
    again = schedule.make_accelerator(HealSettings(tokens=1))
    assert again.mixed_precision == first.mixed_precision
    assert again.device == first.device
