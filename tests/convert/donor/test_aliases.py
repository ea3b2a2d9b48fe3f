"""Aliases are well formed, and a slip of the pen finds the one that was meant."""

import pytest

from mhconvert.convert.donor.aliases import ALIASES, WHEEL_MODELS, near_matches
from mhconvert.convert.donor.reference import HUB_ID


def test_every_alias_is_lower_case_and_names_a_hub_id():
    for alias, hub_id in ALIASES.items():
        assert alias == alias.lower()
        assert "/" not in alias
        assert HUB_ID.fullmatch(hub_id)


def test_the_chat_models_are_marked():
    for alias, hub_id in ALIASES.items():
        if alias.endswith("-instruct"):
            assert hub_id.lower().endswith("-it") or "instruct" in hub_id.lower()


def test_embedded_donors_have_an_alias_of_the_same_hub_id():
    for alias, facts in WHEEL_MODELS.items():
        assert ALIASES[alias] == facts.hub_id
        assert len(facts.wheel_sha256) == 64


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("smollm2-135", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("smolm2-135m", "smollm2-135m"),
        ("llama-3-8b", "llama3-8b"),
        ("llama3_1-8b", "llama3.1-8b"),
        ("qwen25-0.5b", "qwen2.5-0.5b"),
        ("mistral7b", "mistral-7b"),
    ],
)
def test_near_matches(written, meant):
    assert meant in near_matches(written)[:3]


def test_nothing_is_near_to_noise():
    assert near_matches("xyzzy") == []
    assert near_matches("") == []
