"""Error bars on hand-made figures, and the verdict that follows from them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mhconvert.eval.writing.differences import beside, error, mean, paired
from mhconvert.eval.writing.prompts import Prompt
from mhconvert.eval.writing.verdict import drift_tokens, sentence, verdict
from mhconvert.eval.writing.writing_figures import Divergence, compared, donor_figures

COUNT = 8
PROMPTS = [Prompt("a", "story", "en"), Prompt("b", "list", "de")] * (COUNT // 2)
EVEN: dict[str, Any] = {
    "distinct_2": [0.9] * COUNT,
    "distinct_4": [0.95, 0.97] * (COUNT // 2),
    "longest_loop": [0.0] * COUNT,
    "loops": [0.0] * COUNT,
    "ends": [1.0, 0.0] * (COUNT // 2),
    "tokens": [40.0, 60.0] * (COUNT // 2),
    "format": [None, 1.0] * (COUNT // 2),
}
DONOR = {"greedy": EVEN, "sampled": EVEN | {"nats": [1.0, 1.2] * 4}, "again": EVEN | {"nats": [1.1, 1.1] * 4}}
SAME = [Divergence(None, None)] * COUNT


def found(
    greedy: dict[str, Any] | None = None,
    sampled: dict[str, Any] | None = None,
    kl: float = 0.0,
    template: str | None = None,
) -> dict[str, Any]:
    """The figures of a model whose texts differ from the donor's in these values alone; `kl` at each of 50 tokens."""
    ours = {"greedy": EVEN | (greedy or {}), "sampled": DONOR["sampled"] | (sampled or {})}
    return compared(PROMPTS, ours, DONOR, [[kl] * 50] * COUNT, SAME, template)


def test_means_and_errors_over_prompts() -> None:
    assert mean([1.0, None, 3.0]) == 2
    assert mean([None]) is None
    assert paired([1.0, None, 5.0], [0.0, 1.0, 7.0]) == [1, -2]
    assert error([1.0, 3.0, 5.0]) == pytest.approx(2 / math.sqrt(3))
    assert error([1.0]) is error([1.0, math.inf]) is None


def test_few_texts_that_changed_alike_are_not_certain() -> None:
    def changed(count: int, yes_or_no: bool = True) -> dict[str, Any]:
        return beside([0.0] * count, [1.0] * count, spread=0.0, yes_or_no=yes_or_no)

    assert changed(1)["difference"] == -1
    assert changed(1)["difference_stderr"] is changed(1)["within_noise"] is None
    assert changed(2)["difference_stderr"] == pytest.approx(0.5)  # with a pair of either sign: 1, −1, −1, −1
    assert changed(20)["difference_stderr"] < 0.1
    assert changed(20)["within_noise"] is False
    assert changed(2, yes_or_no=False)["difference_stderr"] == 0


def test_only_what_is_yes_or_no_is_counted_as_a_share() -> None:
    """The same texts: a length is no share though its differences are 0."""
    greedy = found()["greedy"]
    errors = {name: figure["difference_stderr"] for name, figure in greedy.items()}
    assert errors.pop("format") == pytest.approx(error([0.0] * (COUNT // 2) + [1.0, -1.0]))
    assert errors.pop("loops") == errors.pop("ends") == pytest.approx(error([0.0] * COUNT + [1.0, -1.0]))
    assert errors == dict.fromkeys(("distinct_2", "distinct_4", "longest_loop", "tokens"), 0)


def test_loops_beyond_noise_count_though_others_differ_more() -> None:
    """Greedy texts loop by more, and less surely, than sampled ones."""
    model = found()
    greedy = {"value": 0.4, "difference": 0.275, "difference_stderr": 0.129, "within_noise": False}
    sampled = {"value": 0.3, "difference": 0.25, "difference_stderr": 0.069, "within_noise": False}
    model["greedy"]["loops"], model["sampled"]["loops"] = greedy, sampled
    assert verdict(model, None)["words"] == "loops in 30 % of its texts"


def test_a_difference_is_noise_within_two_errors_or_what_another_seed_changes() -> None:
    theirs = [0.0, 0.0, 0.0, 0.0]
    ours = [1.0, 3.0, 1.0, 3.0]
    stderr = math.sqrt(4 / 3) / 2
    assert beside(ours, theirs, spread=0.0) == {
        "value": 2,
        "difference": 2,
        "difference_stderr": pytest.approx(stderr),
        "within_noise": False,
    }
    assert beside(ours, theirs, spread=2.0)["within_noise"] is True
    assert beside([-1.0, 3.0, -1.0, 3.0], theirs, spread=0.0)["within_noise"] is True
    assert beside([None] * 4, theirs, spread=0.0)["within_noise"] is None


def test_drift_is_where_half_of_the_texts_are_told_apart() -> None:
    """ln 20 = 2.996 nats: 30 tokens of a tenth of a nat, or the first token that brings them."""
    assert drift_tokens([[0.1] * 40]) == 30
    assert drift_tokens([[0.1] * 29]) is None
    assert drift_tokens([[3.0], [1.0] * 9, [0.0] * 9]) == 3
    assert drift_tokens([[3.0], [0.0] * 9, [0.0] * 9]) is None
    assert drift_tokens([[math.inf]]) == 1


def test_the_donors_texts_write_as_it_does() -> None:
    same = found()
    assert (same["verdict"], sentence(same)) == ("writes as its donor does",) * 2
    assert (same["kl"], same["length_ratio"], same["divergence"]["equal"]) == (0, 1, 1)
    assert same["perplexity"] == pytest.approx(math.exp(1.1))
    assert same["kl_by"] == {"kind": {"story": 0, "list": 0}, "language": {"en": 0, "de": 0}}


def test_kl_makes_a_drift() -> None:
    drifting = found(kl=0.25)
    assert (drifting["verdict"], sentence(drifting)) == ("drifts", "drifts after about 12 tokens")
    assert drifting["kl"] == 0.25
    assert found(kl=3.0)["words"] == "drifts after about 1 token"


def test_loops_beyond_the_donors_are_loops() -> None:
    few = found(greedy={"loops": [1.0] + [0.0] * 7})
    assert few["verdict"] == "writes as its donor does"
    many = found(greedy={"loops": [1.0] * 7 + [0.0]}, kl=0.25)
    assert sentence(many) == "loops in 87.5 % of its texts, drifts after about 12 tokens"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ends": [0.0] * COUNT}, None),  # half of eight texts: two errors, not three
        ({"tokens": [4.0, 6.0] * 4}, "writes shorter texts"),
        ({"distinct_4": [0.4, 0.5] * 4}, "repeats itself more"),
        ({"format": [None, 0.0] * 4}, None),  # all four that were asked for one: too few
        ({"ends": [0.0] * COUNT, "loops": [0.0] * COUNT}, None),
        ({"nats": [2.0, 2.3] * 4}, "writes what the donor finds less likely"),
        ({"nats": [1.05, 1.25] * 4}, "writes what the donor finds less likely"),
    ],
)
def test_other_figures_are_told_beyond_three_errors(changed: dict[str, Any], words: str | None) -> None:
    other = found(sampled=changed)
    assert other["notes"] == ([words] if words else [])
    assert other["verdict"] == ("drifts" if words else "writes as its donor does")


def test_greedy_texts_are_looked_at_too() -> None:
    other = found(greedy={"distinct_4": [0.4, 0.5] * 4}, sampled={"distinct_4": [0.4, 0.5] * 4})
    assert other["notes"] == found(greedy={"distinct_4": [0.4, 0.5] * 4})["notes"] == ["repeats itself more"]


def test_a_lost_template_is_said_first() -> None:
    assert found(template="has lost its donor's chat template")["notes"] == [
        "has lost its donor's chat template"
    ]


def test_the_donor_has_the_difference_of_its_seeds() -> None:
    of_donor = donor_figures(**DONOR)
    assert of_donor["sampled"]["nats"] == {"value": pytest.approx(1.1), "another_seed": pytest.approx(0.0)}
    assert of_donor["greedy"]["tokens"] == {"value": 50}
    assert verdict(found(), None)["notes"] == []
