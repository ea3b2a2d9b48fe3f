"""Local copies of standard tasks: lm-eval's own prompts and metrics, over a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhconvert.errors import MhconvertError, TextError
from mhconvert.eval.settings import EvalSettings
from mhconvert.eval.tasks import local_data
from mhconvert.eval.tasks.task_choice import resolve
from mhconvert.eval.tasks.wikitext import articles

CHOICES = {"text": ["a stone", "a fish", "a cloud", "a drum"], "label": ["A", "B", "C", "D"]}
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "hellaswag": (
        "hellaswag_val.jsonl",
        {"query": "He", "choices": ["runs.", "sits.", "is.", "was."], "gold": 2},
    ),
    "arc_easy": ("arc_easy_test.jsonl", {"question": "What swims?", "choices": CHOICES, "answerKey": "B"}),
    "arc_challenge": (
        "arc_challenge_test.jsonl",
        {"question": "What swims?", "choices": CHOICES, "answerKey": "B"},
    ),
    "piqa": (
        "piqa_validation.jsonl",
        {"goal": "Cut bread", "sol1": "Use a knife", "sol2": "Use a song", "label": 0},
    ),
    "winogrande": (
        "winogrande_xl_validation.jsonl",
        {
            "sentence": "The cup fell off the table because _ was wet.",
            "option1": "cup",
            "option2": "table",
            "answer": "2",
        },
    ),
    "gsm8k_cot": ("gsm8k_test.jsonl", {"question": "How many?", "answer": "#### 3"}),
    "openbookqa": (
        "openbookqa_test.jsonl",
        {"question_stem": "Fish live in", "choices": CHOICES, "answerKey": "A"},
    ),
}
WRITTEN = ("ifeval", "humaneval", "longbench")  # of which test_generative_tasks.py asks some
WIKI = (
    " \n = First = \n \n Some text . \n \n = = Part = = \n \n More . \n \n = Second = \n \n Other text . \n"
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name, (file, line) in LINES.items():
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(json.dumps(line) + "\n", encoding="utf-8")
    (folder / "wiki.test.raw").write_text(WIKI, encoding="utf-8")
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    return folder


def test_every_template_names_a_task_of_lm_eval_and_finds_its_file(data: Path, place: Path) -> None:
    templates = local_data.templates()
    names = tuple(name for name in templates if not name.startswith(WRITTEN))
    assert set(names) == {*LINES, "wikitext"}
    assert len(templates) == len(names) + 3 + 19  # of LongBench
    named = {
        name: local_data.standard_config(template["standard"])["task"] for name, template in templates.items()
    }
    assert {name: task for name, task in named.items() if name != task} == {}
    found = resolve(EvalSettings(tasks=names, data=str(data)), place)
    assert [spec.name for spec in found.specs] == list(names)
    loaded = found.manager.load(list(names))["tasks"]
    assert {name: len(list(task.eval_docs)) for name, task in loaded.items()} == {
        **dict.fromkeys(LINES, 1),
        "wikitext": 2,
    }


@pytest.mark.parametrize(
    ("name", "prompt", "choices", "target"),
    [
        ("hellaswag", "He", ["runs.", "sits.", "is.", "was."], 2),
        ("arc_easy", "Question: What swims?\nAnswer:", CHOICES["text"], 1),
        ("arc_challenge", "Question: What swims?\nAnswer:", CHOICES["text"], 1),
        ("piqa", "Question: Cut bread\nAnswer:", ["Use a knife", "Use a song"], 0),
        ("openbookqa", "Fish live in", CHOICES["text"], 0),
    ],
)
def test_prompts_are_those_of_lm_eval(
    data: Path, place: Path, name: str, prompt: str, choices: list[str], target: int
) -> None:
    task = resolve(EvalSettings(tasks=(name,), data=str(data)), place).manager.load([name])["tasks"][name]
    (document,) = task.eval_docs
    assert task.doc_to_text(document) == prompt
    assert task.doc_to_choice(document) == choices
    assert task.doc_to_target(document) == target


def test_winogrande_has_its_option_in_the_sentence(data: Path, place: Path) -> None:
    task = resolve(EvalSettings(tasks=("winogrande",), data=str(data)), place).manager.load(["winogrande"])[
        "tasks"
    ]["winogrande"]
    (document,) = task.eval_docs
    assert task.doc_to_choice(document) == [
        "The cup fell off the table because cup",
        "The cup fell off the table because table",
    ]
    assert task.doc_to_target(document) == "was wet."
    assert task.doc_to_text(document) == 1


def test_hellaswag_as_it_is_on_the_hub_goes_through_process_docs(data: Path, place: Path) -> None:
    raw = {"activity_label": "Cooking", "ctx_a": "A man stirs.", "ctx_b": "then he", "label": "1", "ind": 0}
    raw["endings"] = ["sings [title] loud.", "eats.", "runs.", "sits."]
    (data / "hellaswag" / "hellaswag_val.jsonl").write_text(json.dumps(raw) + "\n", encoding="utf-8")
    task = resolve(EvalSettings(tasks=("hellaswag",), data=str(data)), place).manager.load(["hellaswag"])[
        "tasks"
    ]["hellaswag"]
    (document,) = task.eval_docs
    assert task.doc_to_text(document) == "Cooking: A man stirs. Then he"
    assert task.doc_to_choice(document)[0] == "sings. loud."


def test_articles_are_cut_at_titles_of_the_first_level() -> None:
    first, second = articles(WIKI)
    assert "= = Part = =" in first
    assert second.startswith(" = Second = ")
    assert first + "\n" + second == WIKI


def test_missing_files_are_named_all_together(data: Path, place: Path) -> None:
    (data / "piqa" / "piqa_validation.jsonl").unlink()
    (data / "wiki.test.raw").unlink()
    with pytest.raises(
        TextError, match=r"have no file for piqa \(piqa_validation\*.jsonl or .*\), wikitext \("
    ):
        resolve(EvalSettings(tasks=("piqa", "wikitext", "arc_easy"), data=str(data)), place)
    with pytest.raises(TextError, match="nowhere is no folder"):
        resolve(EvalSettings(tasks=("piqa",), data=str(data / "nowhere")), place)


def test_a_file_with_other_columns_is_no_copy(data: Path, place: Path) -> None:
    file = data / "piqa" / "piqa_validation.jsonl"
    file.write_text('{"question": "?"}\n', encoding="utf-8")
    with pytest.raises(TextError, match=r"is no copy of piqa: line 1 has \['question'\] instead of goal"):
        resolve(EvalSettings(tasks=("piqa",), data=str(data)), place)
    file.write_text("not json\n", encoding="utf-8")
    with pytest.raises(TextError, match="piqa, line 1, is no JSON"):
        resolve(EvalSettings(tasks=("piqa",), data=str(data)), place)


def test_shots_have_nowhere_to_come_from(data: Path, place: Path) -> None:
    with pytest.raises(TextError, match="piqa with 5 examples draws them from the task's training split"):
        resolve(EvalSettings(tasks=("piqa",), data=str(data), num_fewshot=5), place)


def test_an_unknown_task_has_near_matches(place: Path) -> None:
    with pytest.raises(MhconvertError, match=r"lm-eval has no task 'helaswag'; did you mean .*hellaswag"):
        resolve(EvalSettings(tasks=("helaswag",)), place)


def test_a_changed_file_changes_the_digest_and_its_place_does_not(
    data: Path, place: Path, tmp_path: Path
) -> None:
    def digest(folder: Path) -> str:
        return resolve(EvalSettings(tasks=("piqa",), data=str(folder)), place).specs[0].digest

    before = digest(data)
    data.rename(tmp_path / "moved")
    assert digest(tmp_path / "moved") == before
    with open(tmp_path / "moved" / "piqa" / "piqa_validation.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")
    assert digest(tmp_path / "moved") != before


def test_a_suite_has_its_shots_and_a_task_named_beside_it_its_own(place: Path) -> None:
    found = resolve(EvalSettings(tasks=("mhconvert_quick",), suite="quick"), place)
    assert [(spec.name, spec.num_fewshot) for spec in found.specs] == [("mhconvert_quick", None)]
    task = found.manager.load(["mhconvert_quick"])["tasks"]["mhconvert_quick"]
    documents = list(task.eval_docs)
    assert len(documents) == 40
    assert len({document["query"] for document in documents}) == 40
    assert {document["gold"] for document in documents} == {0, 1, 2, 3}


def test_all_tasks_of_the_papers_suites_exist_in_lm_eval() -> None:
    from lm_eval.tasks import TaskManager

    from mhconvert.eval.tasks.task_choice import suites

    named = {
        entry["task"] if isinstance(entry, dict) else entry
        for suite in suites().values()
        for entry in suite["tasks"]
    }
    assert named - set(TaskManager().all_tasks) == {"mhconvert_quick"}


def test_a_later_line_that_lacks_a_value_is_named(data: Path, place: Path) -> None:
    file = data / "piqa" / "piqa_validation.jsonl"
    line = json.dumps(LINES["piqa"][1])
    file.write_text(f"{line}\n{line.replace('Use a song', '')[:-1]}\n", encoding="utf-8")
    with pytest.raises(TextError, match="piqa, line 2, is no JSON"):
        resolve(EvalSettings(tasks=("piqa",), data=str(data)), place)
    file.write_text(line + "\n" + json.dumps(LINES["piqa"][1] | {"sol2": None}) + "\n", encoding="utf-8")
    with pytest.raises(
        TextError, match=r"is no copy of piqa: line 2 has \['goal', 'label', 'sol1'\] instead of"
    ):
        resolve(EvalSettings(tasks=("piqa",), data=str(data)), place)
    half = json.dumps(LINES["piqa"][1] | {"goal": "\ud800"})
    file.write_text(f"{line}\n{half}\n", encoding="utf-8")
    with pytest.raises(
        TextError, match=r"piqa, line 2, cannot be used: as JSON, its character \d+ is \\ud800"
    ):
        resolve(EvalSettings(tasks=("piqa",), data=str(data)), place)
    file.write_text("", encoding="utf-8")
    with pytest.raises(TextError, match="piqa_validation.jsonl of task piqa has no documents"):
        resolve(EvalSettings(tasks=("piqa",), data=str(data)), place)


def test_a_glob_means_the_local_copies(data: Path, place: Path) -> None:
    found = resolve(EvalSettings(tasks=("arc_*",), data=str(data)), place)
    assert [spec.name for spec in found.specs] == ["arc_challenge", "arc_easy"]
    assert all(spec.local for spec in found.specs)


OWN = "task: {name}\ntag: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
OWN += "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: 0\ndoc_to_choice: c\n"


def test_ones_own_tasks_by_tag_and_what_their_digest_depends_on(tmp_path: Path, place: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.jsonl").write_text('{"q": "x", "c": ["a", "b"]}\n')
    for name in ("one", "two"):
        (own / f"{name}.yaml").write_text(OWN.format(name=name, file=own / "a.jsonl"))

    def digests() -> list[str]:
        specs = resolve(EvalSettings(tasks=("mine",), include_path=str(own)), place).specs
        assert [spec.name for spec in specs] == ["one", "two"]
        return [spec.digest for spec in specs]

    before = digests()
    assert digests() == before
    (own / "a.jsonl").write_text('{"q": "y", "c": ["a", "b"]}\n')
    assert not set(digests()) & set(before)
