"""Shares of heads as whole numbers, and every refusal of numbers that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from mhconvert.convert.methods.budget_division import LayerNeed
from mhconvert.convert.methods.moh.budget import heads_of
from mhconvert.convert.methods.moh.method import MoH
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.errors import BudgetError
from tests.donors import make_config


@pytest.mark.parametrize(
    ("settings", "active", "shared"),
    [
        ({"active": 0.75, "shared": 0.5, "uniform": True}, (6, 6, 6), (4, 4, 4)),
        ({"active": 2 / 3, "shared": 0, "uniform": True}, (5, 5, 5), (0, 0, 0)),  # 5 1/3 heads are 5
        ({"active": 2 / 3, "shared": 0}, (6, 5, 5), (0, 0, 0)),  # of 24: exactly 16
        ({"active": [7, 0.5, 8], "shared": [3, 0, 8]}, (7, 4, 8), (3, 0, 8)),
        ({"active": 1, "shared": 1.0}, (8, 8, 8), (8, 8, 8)),
        ({"active": 0.75, "shared_heads": "first"}, (6, 6, 6), (2, 2, 2)),
        ({"active": 0.5, "shared": [8, 1, 1]}, (8, 2, 2), (8, 1, 1)),
    ],
)
def test_shares_become_numbers(
    settings: dict[str, Any], active: tuple[int, ...], shared: tuple[int, ...]
) -> None:
    found = heads_of(MoHSettings(**settings), 8, 3, survey=False)
    assert (found.active, found.shared) == (active, shared)


@given(active=st.floats(0.01, 1), shared=st.floats(0, 1), units=st.integers(1, 64), layers=st.integers(1, 40))
def test_any_share_fits_or_is_refused(active: float, shared: float, units: int, layers: int) -> None:
    """Never more than the share asked for, less than a head below it, and no layer beyond its limits."""
    try:
        found = heads_of(MoHSettings(active, shared), units, layers, survey=False)
    except BudgetError:
        least = max(1, int(shared * units + 1e-9)) * layers
        event("refused")
        assert int(active * units * layers + 1e-9) < least
        return
    if active == shared:
        assert found.active == tuple(max(1, n) for n in found.shared)
        return
    assert active * units * layers - 1 < sum(found.active) <= active * units * layers + 1e-6
    assert all(max(1, s) <= a <= units for a, s in zip(found.active, found.shared, strict=True))
    assert found.survey_shares()[-1] == 1.0
    assert len(found.survey_shares()) <= 7


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"active": 0}, "active=0 is not a share"),
        ({"active": 1.5}, "active=1.5 is not a share"),
        ({"active": True}, "active=True is not a number"),
        ({"active": "most"}, "'most' is neither a share of heads nor a list"),
        ({"shared": -0.1}, "shared=-0.1 is not a share"),
        ({"active": []}, "active is an empty list"),
        ({"active": [3, 0]}, "active, layer 1: 0 is neither"),
        ({"active": [3, 2.5]}, "active, layer 1: 2.5 is neither"),
        ({"shared": [1, None]}, "shared, entry 1=None is not a number"),
        ({"router": "random"}, "router 'random' is not one of learned, norm"),
        ({"shared_heads": "last"}, "shared_heads 'last'"),
        ({"route": "layers"}, "route 'layers'"),
        ({"uniform": "yes"}, "uniform='yes'"),
        ({"active": [3, 3], "uniform": True}, "leave out uniform"),
    ],
)
def test_what_is_no_number_of_heads_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BudgetError) as error:
        MoHSettings(**settings)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"active": 0.3, "shared": 0.5},
            "active=0.3 is 2 of 8 heads and shared=0.5 takes 4 of them; choose a",
        ),
        ({"active": [4]}, "active has 1 entries and the donor 2 layers"),
        ({"active": [4, 5]}, "active, layer 1: 5 heads, and the donor has 4 in a layer"),
        ({"active": [4, 2], "shared": [1, 3]}, "layer 1: 2 active heads, of which 3 are shared"),
        ({"active": 0.3, "shared": 0, "route": "groups", "uniform": True}, "active=0.3 is 0 of 4 groups"),
    ],
)
def test_numbers_that_the_donor_has_not_are_refused_before_it_is_read(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(BudgetError) as error:
        MoH(make_config(heads=4, kv_heads=2), MoHSettings(**settings), "quick")
    assert words in str(error.value)


def test_what_is_refused_says_the_smallest_share_that_is_not() -> None:
    config = make_config(heads=9, kv_heads=3, hidden=144, head_dim=16)
    with pytest.raises(BudgetError, match=r"active ≥ 0\.4445"):
        MoH(config, MoHSettings(0.4, 0.5), "quick")
    MoH(config, MoHSettings(0.4445, 0.5), "quick")


def test_heads_go_where_a_survey_heard_them_missed() -> None:
    method = MoH(make_config(heads=4, kv_heads=2, layers=2), MoHSettings(0.75, 0.25), "quick")
    assert method.divisible
    assert method.survey_shares == (0.25, 0.5, 0.75, 1.0)
    errors = (0.5, 0.2, 0.05, 0.0)
    method.share_out([LayerNeed(method.survey_shares, errors, 0.5, kl) for kl in (0.001, 1.0)])
    assert method.active == [2, 4]
    assert method.layer_sizes(1) == {"active_heads": 4, "shared_heads": 1}
    assert method.totals()["active_heads"] == {"donor": 8, "converted": 6}


@pytest.mark.parametrize(
    "settings", [MoHSettings(0.75, 0.25, uniform=True), MoHSettings([2, 4]), MoHSettings(1.0)]
)
def test_nothing_is_divided_that_is_fixed(settings: MoHSettings) -> None:
    assert not MoH(make_config(heads=4, kv_heads=2), settings, "quick").divisible


def test_a_list_is_at_no_other_budget() -> None:
    assert MoHSettings(0.75, router="norm").at_budget(0.5) == MoHSettings(0.5, router="norm")
    with pytest.raises(BudgetError, match="leave it out to vary"):
        MoHSettings([3, 3]).at_budget(0.5)


def test_looking_at_a_plan_changes_no_layer_that_was_converted() -> None:
    method = MoH(make_config(heads=4, kv_heads=2), MoHSettings(0.5, 0.25, router="norm"), "quick")
    chosen = {"active_heads": 3, "shared_heads": [2], "norm_scale": [1.0, 2.0, 3.0], "norm_offset": [0.5] * 3}
    method.restore(1, chosen)
    method.new_parameters()
    method.totals()
    method.example_config()
    config = method.finish()
    assert {name: getattr(config, name)[1] for name in chosen} == chosen


def test_a_layer_has_its_own_least() -> None:
    """Layer 0 shares three of four heads; what is divided is what the others may have beside."""
    method = MoH(make_config(heads=4, kv_heads=2, layers=3), MoHSettings(0.6, [3, 0, 0]), "quick")
    assert method.divisible
    errors = (0.5, 0.4, 0.3, 0.2)
    method.share_out([LayerNeed((0.25, 0.5, 0.75, 1.0), errors, 0.25, kl) for kl in (0.001, 0.001, 1.0)])
    assert method.active == [3, 1, 3]


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_as_many_shared_heads_as_active_ones_route_nothing(share: float) -> None:
    config = make_config(heads=9, kv_heads=3, hidden=144, head_dim=16, layers=4)
    method = MoH(config, MoHSettings(share, share), "quick")
    assert not method.divisible
    assert method.active == list(method.budget.shared) == [int(share * 9)] * 4


def test_flops_and_parameters_are_those_of_every_layer() -> None:
    """Two layers route, one has all heads; a window shows less than the context."""
    config = make_config(family="mistral", heads=4, kv_heads=2, layers=3, sliding_window=64)
    method = MoH(config, MoHSettings([4, 2, 3], [1, 1, 2]), "quick")
    maps, head = 2 * 64 * (2 * 64 + 2 * 32), 4 * 16 * 64
    # score, routed, shared and stage: a single head, chosen or shared, needs no coefficient
    routers = [0, 64 * 3 + 3 + 64 * 2, 64 * 2 + 2 + 64 * 2 + 64 * 2]
    flops = method.totals()["attention_flops"]
    assert flops["donor"] == 3 * maps + 12 * head
    assert flops["converted"] == 3 * maps + 9 * head + 2 * sum(routers)
    assert method.new_parameters() == maps // 2 + -(-sum(routers) // 3)


def test_groups_say_how_many_kv_heads_a_step_reads() -> None:
    config = make_config(heads=4, kv_heads=2, layers=2)
    totals = MoH(config, MoHSettings([1, 2], 0, route="groups"), "quick").totals()
    assert totals["kv_heads_read"] == {"donor": 4, "converted": 3}
    assert totals["active_heads"] == {"donor": 8, "converted": 6}
    assert "kv_heads_read" not in MoH(config, MoHSettings(0.5, 0), "quick").totals()
