"""Values side by side: paired standard errors, noise, the average, against figures worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhconvert.eval.tasks.apart import part
from mhconvert.eval.tasks.scores import apart, average, task_row, task_rows


def outcome(
    values: list[float], *, name: str = "toy", metric: str = "acc", stderr: Any = 0.1
) -> dict[str, Any]:
    mean = sum(values) / len(values)
    return {
        "name": name,
        "results": {name: {"alias": name, f"{metric},none": mean, f"{metric}_stderr,none": stderr}},
        "samples": {name: {f"{metric},none": values}},
        "groups": {},
        "versions": {name: 1.0},
        "counts": {name: len(values)},
        "num_fewshot": {name: 0},
        "higher_is_better": {name: {metric: True}},
    }


def test_the_difference_is_paired() -> None:
    """99 equal answers and one lost: 1 % ± 1 %, where two independent samples would have ± 7 %."""
    right = [float(index % 2) for index in range(100)]
    lost = [0.0 if index == 1 else value for index, value in enumerate(right)]
    row = task_row([outcome(right), outcome(lost)], "toy.jsonl")
    first, second = row["metrics"][0]["models"]
    assert (first["difference"], first["within_noise"]) == (None, None)
    assert second["difference"] == pytest.approx(-0.01)
    assert second["difference_stderr"] == pytest.approx(0.01)
    assert second["within_noise"] is True
    assert (row["samples"], row["local"], row["version"]) == (100, "toy.jsonl", 1.0)


def test_a_difference_beyond_two_standard_errors_is_no_noise() -> None:
    right = [1.0] * 100
    lost = [0.0] * 10 + [1.0] * 90
    cell = task_row([outcome(right), outcome(lost)], None)["metrics"][0]["models"][1]
    assert cell["difference"] == pytest.approx(-0.1)
    assert cell["difference_stderr"] == pytest.approx(math.sqrt(0.1 * 0.9 / 99))
    assert cell["within_noise"] is False


def test_equal_models_differ_by_nothing_and_that_is_within_noise() -> None:
    cell = task_row([outcome([1.0, 0.0, 1.0])] * 2, None)["metrics"][0]["models"][1]
    assert (cell["difference"], cell["difference_stderr"], cell["within_noise"]) == (0, 0, True)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=3, max_size=60))
def test_the_paired_error_is_that_of_the_mean_of_differences(pairs: list[tuple[bool, bool]]) -> None:
    one, other = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    cell = task_row([outcome(one), outcome(other)], None)["metrics"][0]["models"][1]
    spread = np.subtract(other, one)
    assert cell["difference"] == pytest.approx(spread.mean(), abs=1e-12)
    assert cell["difference_stderr"] == pytest.approx(spread.std(ddof=1) / math.sqrt(len(pairs)))


def perplexity_outcome(pairs: np.ndarray) -> dict[str, Any]:
    value = math.exp(-pairs[:, 0].sum() / pairs[:, 1].sum())
    found = outcome([value], metric="word_perplexity", stderr="N/A")
    return found | {
        "samples": {"toy": {"word_perplexity,none": pairs.tolist()}},
        "counts": {"toy": len(pairs)},
    }


def test_perplexities_have_the_error_that_resampling_documents_gives() -> None:
    random = np.random.default_rng(0)
    weights = random.integers(50, 400, 200)
    noise = random.normal(0, 0.2, 200)
    donor = np.stack([-(3.0 + noise) * weights, weights], 1)
    other = np.stack([-(3.1 + noise + random.normal(0, 0.05, 200)) * weights, weights], 1)
    cell = task_row([perplexity_outcome(donor), perplexity_outcome(other)], None)["metrics"][0]["models"][1]

    def value(pairs: np.ndarray, chosen: np.ndarray) -> float:
        return math.exp(-pairs[chosen, 0].sum() / pairs[chosen, 1].sum())

    draws = [random.integers(0, 200, 200) for _ in range(2000)]
    resampled = np.std([value(other, chosen) - value(donor, chosen) for chosen in draws])
    assert cell["difference_stderr"] == pytest.approx(resampled, rel=0.1)
    assert cell["stderr"] is None
    assert cell["within_noise"] is False


def test_a_group_is_paired_over_its_tasks() -> None:
    def group(first: list[float], second: list[float]) -> dict[str, Any]:
        mean = sum(first + second) / len(first + second)
        return outcome(first, name="one") | {
            "name": "both",
            "results": {"both": {"acc,none": mean, "acc_stderr,none": 0.1}, "one": {}, "two": {}},
            "samples": {"one": {"acc,none": first}, "two": {"acc,none": second}},
            "groups": {"both": ["one", "two"]},
            "counts": {"one": len(first), "two": len(second)},
            "higher_is_better": {"both": {"acc": True}},
        }

    row = task_row([group([1.0, 1.0], [0.0, 1.0, 1.0]), group([1.0, 0.0], [0.0, 1.0, 1.0])], None)
    cell = row["metrics"][0]["models"][1]
    assert (row["task"], row["samples"]) == ("both", 5)
    assert cell["difference"] == pytest.approx(-0.2)
    assert cell["difference_stderr"] == pytest.approx(0.2)


def test_the_average_is_over_shares_alone() -> None:
    rows = [
        task_row([outcome([1.0, 0.0], name="a"), outcome([0.0, 0.0], name="a")], None),
        task_row([outcome([1.0, 1.0], name="b"), outcome([1.0, 1.0], name="b")], None),
        task_row([outcome([9.0], name="c", metric="word_perplexity")] * 2, None),
    ]
    found = average(rows)
    assert found is not None
    assert found["tasks"] == ["a", "b"]
    first, second = found["models"]
    assert (first["value"], second["value"]) == (0.75, 0.5)
    assert first["stderr"] == pytest.approx(math.sqrt(0.1**2 + 0.1**2) / 2)
    assert second["difference"] == pytest.approx(-0.25)
    assert second["difference_stderr"] == pytest.approx(0.5 / 2)
    assert average(rows[:1]) is None


def test_a_group_of_groups_is_paired_over_all_that_is_in_it() -> None:
    def nested(first: list[float], second: list[float]) -> dict[str, Any]:
        mean = sum(first + second) / len(first + second)
        return outcome(first, name="one") | {
            "name": "top",
            "results": {"top": {"acc,none": mean, "acc_stderr,none": 0.1}},
            "samples": {"one": {"acc,none": first}, "two": {"acc,none": second}},
            "groups": {"top": ["inner", "two"], "inner": ["one"]},
            "counts": {"one": len(first), "two": len(second)},
            "higher_is_better": {"top": {"acc": True}},
        }

    row = task_row([nested([1.0, 1.0], [0.0, 1.0, 1.0]), nested([1.0, 0.0], [0.0, 1.0, 1.0])], None)
    cell = row["metrics"][0]["models"][1]
    assert row["samples"] == 5
    assert cell["difference_stderr"] == pytest.approx(0.2)


def test_a_group_whose_tasks_count_alike_has_the_error_of_their_mean() -> None:
    def group(first: list[float], second: list[float]) -> dict[str, Any]:
        mean = (sum(first) / len(first) + sum(second) / len(second)) / 2
        return outcome(first, name="one") | {
            "name": "both",
            "results": {"both": {"acc,none": mean, "acc_stderr,none": 0.1}},
            "samples": {"one": {"acc,none": first}, "two": {"acc,none": second}},
            "groups": {"both": ["one", "two"]},
            "counts": {"one": len(first), "two": len(second)},
            "higher_is_better": {"both": {"acc": True}},
        }

    one, two = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0]
    cell = task_row([group([1.0] * 8, [1.0, 1.0]), group(one, two)], None)["metrics"][0]["models"][1]
    spreads = [np.subtract(values, 1.0) for values in (one, two)]
    errors = [spread.std(ddof=1) / math.sqrt(len(spread)) for spread in spreads]
    assert cell["difference_stderr"] == pytest.approx(math.hypot(*errors) / 2)


def test_a_perplexity_of_log_likelihoods_is_judged_on_its_own_scale() -> None:
    def lambada(values: list[float]) -> dict[str, Any]:
        found = outcome(values, metric="perplexity")
        found["results"]["toy"]["perplexity,none"] = math.exp(-sum(values) / len(values))
        return found

    random = np.random.default_rng(0)
    donor, other = (random.normal(-30, 20, 40).tolist() for _ in range(2))
    cell = task_row([lambada(donor), lambada(other)], None)["metrics"][0]["models"][1]
    rest = [[np.delete(values, index).mean() for index in range(40)] for values in (donor, other)]
    differences = np.exp(-np.array(rest[1])) - np.exp(-np.array(rest[0]))
    jackknife = math.sqrt(39 / 40 * ((differences - differences.mean()) ** 2).sum())
    assert cell["difference_stderr"] == pytest.approx(jackknife)


def test_what_is_no_share_or_better_when_lower_is_not_averaged() -> None:
    rows = [task_row([outcome([1.0, 0.0], name=name)] * 2, None) for name in "ab"]
    wide = task_row([outcome([137.8, 120.0], name="c", metric="ter")] * 2, None)
    lower = task_row([outcome([0.5, 0.5], name="d")] * 2, None)
    lower["metrics"][0]["higher_is_better"] = False
    found = average([*rows, wide, lower])
    assert found is not None
    assert found["tasks"] == ["a", "b"]


@pytest.mark.parametrize(
    ("task", "found"),
    [
        *(("mmlu", "MMLU"), ("mmlu_stem", "MMLU"), ("leaderboard_mmlu_pro", "MMLU")),
        *(("m_mmlu_de", "de"), ("mmlu_prox_fr_law", "fr"), ("cmmlu", "zh"), ("ceval-valid", "zh")),
        *(("xnli_es", "es"), ("mgsm_en_cot_de", "de"), ("include_base_44_german", "de")),
        *(("belebele_deu_Latn", "de"), ("truthfulqa_de_mc1", "de"), ("lambada_openai_mt_it", "it")),
        *(("belebele_zho_Hans", "zh"), ("belebele_arz_Arab", "ar"), ("sib_bem_prompt_1", "bem")),
        *(("kobest_copa", "ko"), ("haerae_history", "ko"), ("kmmlu_hard_law", "ko"), ("xwinograd_jp", "ja")),
        *(("tmmluplus_music", "zh"), ("darijammlu_law", "ar"), ("egymmlu", "ar"), ("arabicmmlu_law", "ar")),
        *(("turkishmmlu_art", "tr"), ("AraDiCE_piqa_egy", "ar"), ("hendrycksTest-law", "MMLU")),
        *(("arc_challenge_mt_de", "de"), ("mmmlu_pt_br_law", "pt"), ("afrimgsm_tt_swa", "sw")),
        *(("hrm8k_math", "ko"), ("hrm8k_math_en", None), ("mgsm_en_cot_en", None)),
        *(("my_task", None), ("id_cls", None), ("he_eval", None), ("te_classification", None)),
        *(
            ("pt_loss", None),
            ("hi_task", None),
            ("ca_test", None),
            ("tr_qa", None),
            ("agieval_lsat_ar", None),
        ),
        *(("agieval_en", None), ("lambada_openai_mt_en", None), ("belebele_eng_Latn", None)),
        *(("m_mmlu_en", "MMLU"), ("mmlu_management", "MMLU"), ("hendrycks_math_algebra", None)),
        *(("arc_easy", None), ("truthfulqa_mc2", None), ("nq_open", None), ("mhconvert_quick", None)),
    ],
)
def test_mmlu_and_languages_are_known_by_their_names(task: str, found: str | None) -> None:
    assert part(task) == found


def rows_of(*names: str) -> list[dict[str, Any]]:
    """Of two models, of which the second loses the first of ten questions, and in German the first five."""
    rows = []
    for name in names:
        lost = [0.0] * (5 if part(name) == "de" else 1)
        models = [outcome([1.0] * 10, name=name), outcome(lost + [1.0] * (10 - len(lost)), name=name)]
        rows.append(task_row(models, None))
    return rows


def test_the_average_mixes_in_neither_mmlu_nor_languages() -> None:
    rows = rows_of("mmlu", "piqa", "xnli_de", "hellaswag_de", "xnli_fr", "arc_easy")
    found = average(rows)
    assert found is not None
    assert found["tasks"] == ["piqa", "arc_easy"]
    assert found["models"][1]["difference"] == pytest.approx(-0.1)
    means = {each["name"]: each for each in apart(rows)}
    assert {name: each["tasks"] for name, each in means.items()} == {
        "MMLU": ["mmlu"],
        "de": ["xnli_de", "hellaswag_de"],
        "fr": ["xnli_fr"],
    }
    assert means["de"]["models"][1]["difference"] == pytest.approx(-0.5)
    error = rows[2]["metrics"][0]["models"][1]["difference_stderr"]
    assert means["de"]["models"][1]["difference_stderr"] == pytest.approx(error / math.sqrt(2))
    assert average(rows[:2]) is None  # MMLU beside one task is no mean of two


def grouped(group: str, members: dict[str, list[float]], groups: dict[str, list[str]]) -> dict[str, Any]:
    """The outcome of a group of tasks, each group's value being the mean over its documents."""
    whole = outcome([value for values in members.values() for value in values], name=group)
    for name, values in members.items():
        for key, found in outcome(values, name=name).items():
            if isinstance(found, dict):
                whole[key] |= found
    del whole["samples"][group]
    for name, inner in groups.items():
        values = [value for member in inner for value in members.get(member, [])]
        if name != group:
            whole["results"] |= outcome(values, name=name)["results"]
    return whole | {"groups": groups}


def test_groups_of_mmlu_and_languages_of_a_group_have_rows_of_their_own() -> None:
    groups = {
        "mmlu": ["mmlu_stem", "mmlu_other"],
        "mmlu_stem": ["mmlu_a", "mmlu_b"],
        "mmlu_other": ["mmlu_c"],
    }
    of_two = [
        grouped("mmlu", {"mmlu_a": [1.0, first, 1.0], "mmlu_b": [1.0, 0.0], "mmlu_c": [1.0, 0.0]}, groups)
        for first in (1.0, 0.0)
    ]
    rows = task_rows(of_two, None)
    assert [(row["task"], row.get("part_of")) for row in rows] == [
        *(("mmlu", None), ("mmlu_stem", "mmlu"), ("mmlu_other", "mmlu")),
    ]
    cell = rows[1]["metrics"][0]["models"][1]
    assert cell["difference"] == pytest.approx(-0.2)
    assert cell["difference_stderr"] == pytest.approx(0.2)  # of five documents, one of which is lost
    assert [each["tasks"] for each in apart(rows)] == [["mmlu"]]
    xnli = grouped("xnli", {"xnli_de": [1.0, 0.0], "xnli_fr": [1.0, 1.0]}, {"xnli": ["xnli_de", "xnli_fr"]})
    rows = [*task_rows([xnli, xnli], None), *rows_of("piqa", "arc_easy")]
    assert {each["name"]: each["tasks"] for each in apart(rows)} == {"de": ["xnli_de"], "fr": ["xnli_fr"]}
    assert (average(rows) or {})["tasks"] == ["piqa", "arc_easy"]


def test_tasks_answered_in_writing_have_a_mean_of_their_own() -> None:
    """With each language apart from the others, and without the share of code that parses, which is no score."""
    written = {
        "piqa": None,
        "arc_easy": None,
        "gsm8k_cot": True,
        "ifeval": True,
        "mgsm_de": True,
        "humaneval": True,
    }
    rows = [
        task_row([outcome([float(number), 1.0], name=name) | {"generative": flag}], None)
        for number, (name, flag) in enumerate(written.items())
    ]
    rows[-1]["metrics"][0] |= {"metric": "parses"}
    for row in rows:
        row["metrics"][0]["models"][0]["value"] = 0.25
    assert (average(rows) or {})["tasks"] == ["piqa", "arc_easy"]
    assert {mean["name"]: mean["tasks"] for mean in apart(rows)} == {
        "generative tasks": ["gsm8k_cot", "ifeval"],
        "generative tasks, de": ["mgsm_de"],
    }
