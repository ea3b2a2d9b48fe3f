"""Timing in turns: who is timed when, what the ratios are of, and what the caches weigh."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mhconvert.eval.speed import speed
from mhconvert.eval.speed.speed import PREFILLS, WARM_STEPS, Load, Run, compare, switch_absorption
from tests.convert.conversions import converted, donor_model

DONOR_ELEMENTS, LATENT_ELEMENTS = 2 * 2 * 2 * 16, 2 * 32  # of a token, over two layers


@pytest.fixture(scope="module")
def donor() -> Any:
    return donor_model()


@pytest.fixture(scope="module")
def latent(donor: Any) -> Any:
    return converted(donor)


def clock(monkeypatch: pytest.MonkeyPatch, durations: Iterator[float]) -> list[torch.device]:
    """Work takes the next of `durations`; the devices it ran on are kept."""
    timed: list[torch.device] = []

    def seconds(work: Callable[[], Any], device: torch.device) -> float:
        work()
        timed.append(device)
        return next(durations)

    monkeypatch.setattr(speed, "seconds", seconds)
    return timed


def alternating(*steps: float) -> Iterator[float]:
    """Prefills of two models that take 2 and 4 s, then `steps` over and over."""
    return itertools.chain([2.0, 4.0] * PREFILLS, itertools.cycle(steps))


def test_models_take_turns_and_the_ratio_is_of_their_tokens_per_second(
    donor: Any, latent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = clock(monkeypatch, alternating(0.4, 0.1, 0.5))
    heard: list[int] = []
    row = compare(donor, latent, Load(40, 3, 8), reexpand=True, on_step=lambda: heard.append(1))
    assert len(timed) == 2 * PREFILLS + 3 * 8
    assert len(heard) == 8
    assert row["context"] == 40
    assert row["donor"]["prefill_tokens_per_s"] == (40 - WARM_STEPS - 8) / 2.0
    assert row["converted"]["prefill_tokens_per_s"] == (40 - WARM_STEPS - 8) / 4.0
    assert row["donor"]["decode_tokens_per_s"] == 3 / 0.4
    assert row["converted"]["decode_tokens_per_s"] == 3 / 0.1
    assert row["reexpanded"] == {
        "decode_tokens_per_s": 3 / 0.5,
        "step_seconds": 0.5,
        "step_spread": 0.0,
        "steps": 8,
        "step_memory_bytes": row["reexpanded"]["step_memory_bytes"],
    }
    assert row["ratio"] == pytest.approx(4.0)
    assert row["ratio_to_reexpanded"] == pytest.approx(5.0)


def test_drafted_tokens_and_a_prompt_in_pieces(
    donor: Any, latent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, alternating(0.5))
    lengths: list[int] = []
    forward = type(latent).forward
    monkeypatch.setattr(
        type(latent),
        "forward",
        lambda self, input_ids, **rest: (
            lengths.append(input_ids.shape[1]) or forward(self, input_ids=input_ids, **rest)
        ),
    )
    row = compare(donor, latent, Load(58, 2, 3, step_tokens=4, chunk_tokens=12))
    assert lengths == [12, 12, 6] * PREFILLS + [4] * (WARM_STEPS + 3)
    assert row["converted"]["cache_tokens"] == 116
    assert row["converted"]["decode_tokens_per_s"] == 2 * 4 / 0.5
    assert row["converted"]["prefill_tokens_per_s"] == 30 / 4.0
    assert row["prefill_ratio"] == 0.5


def test_the_median_outlives_a_slow_step(donor: Any) -> None:
    run = Run(donor, Load(40, 2, 5))
    run.steps = [0.1, 0.2, 9.0, 0.2, 0.3]
    assert run.decode_speed() == {
        "decode_tokens_per_s": 2 / 0.2,
        "step_seconds": 0.2,
        "step_spread": pytest.approx((0.3 - 0.2) / 0.2),
        "steps": 5,
        "step_memory_bytes": None,
    }


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("context", "batch"), [(24, 1), (33, 3)])
def test_the_cache_is_weighed_when_it_holds_the_context(
    donor: Any, latent: Any, context: int, batch: int, static: bool
) -> None:
    row = compare(donor, latent, Load(context, batch, 4, static_cache=static))
    for name, elements in (("donor", DONOR_ELEMENTS), ("converted", LATENT_ELEMENTS)):
        assert row[name]["cache_tokens"] == context * batch
        assert row[name]["cache_bytes"] == 4 * elements * context * batch
        assert row[name]["steps"] == 4
        assert row[name]["decode_tokens_per_s"] == batch / row[name]["step_seconds"] > 0
    assert row["cache_ratio"] == LATENT_ELEMENTS / DONOR_ELEMENTS
    assert "reexpanded" not in row


@pytest.mark.parametrize("static", [False, True])
def test_a_filled_batch_continues_as_its_row_would(latent: Any, static: bool) -> None:
    run = Run(latent, Load(20, 3, 8, static_cache=static))
    run.prefill()
    run.fill(run.row)
    with torch.no_grad():
        token = torch.full((3, 1), 7)
        batch = latent(input_ids=token, past_key_values=run.cache).logits
        row = latent(input_ids=token[:1], past_key_values=run.row).logits
    torch.testing.assert_close(batch, row.expand_as(batch), atol=1e-4, rtol=0)


def test_re_expansion_runs_out_of_patience_and_the_others_do_not(
    donor: Any, latent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, itertools.chain([2.0, 4.0], itertools.cycle([1.0])))
    monkeypatch.setattr(speed, "TIME_LIMIT", 2.5)
    row = compare(donor, latent, Load(40, 2, 9), reexpand=True)
    assert row["reexpanded"]["steps"] == 3
    assert row["donor"]["steps"] == row["converted"]["steps"] == 9


def test_a_slow_prefill_is_not_repeated(donor: Any, latent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = clock(monkeypatch, itertools.chain([1.0, 99.0], itertools.cycle([1.0])))
    compare(donor, latent, Load(20, 2, 1))
    assert len(timed) == 2 + 2


def test_absorption_is_switched_off_for_re_expansion_alone(donor: Any, latent: Any) -> None:
    attention = latent.model.layers[1].self_attn
    usual, calls = attention.max_absorbed_tokens, []
    expand = type(attention).expand_kv
    attention.expand_kv = lambda *arguments: calls.append(1) or expand(attention, *arguments)
    compare(donor, latent, Load(64, 2, 3), reexpand=True)
    del attention.expand_kv
    assert len(calls) == PREFILLS + WARM_STEPS + 3
    assert attention.max_absorbed_tokens == usual > 0
    switch_absorption(donor, False)  # a donor has nothing to switch
    assert not any(hasattr(module, "max_absorbed_tokens") for module in donor.modules())


def test_compiled_steps_call_the_compiled_model(
    donor: Any, latent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name, model in (("donor", donor), ("converted", latent)):
        compiled = lambda name=name, model=model, **inputs: calls.append(name) or model(**inputs)  # noqa: E731
        monkeypatch.setattr(model, "get_compiled_call", lambda _, compiled=compiled: compiled, raising=False)
    row = compare(donor, latent, Load(20, 2, 3, static_cache=True, compile=True))
    assert calls == ["donor"] * 3 + ["converted"] * 3 + ["donor", "converted"] * (WARM_STEPS - 3 + 3)
    assert row["converted"]["cache_tokens"] == 40
