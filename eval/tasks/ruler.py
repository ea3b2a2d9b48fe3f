"""RULER's tasks (arXiv 2404.06654) as long as the models read: lm-eval's texts, made with the first model's tokenizer.

lm-eval makes these texts when it loads a task, anew for each model, with a tokenizer whose own code it would run. Here
they are made once, from one seed, and written to a file, which all models read.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from mhconvert.errors import MhconvertError

from ...convert.open_model import OpenModel
from ..generation import encode
from ..settings import EvalSettings
from .local_data import Function, LocalTask, standard_config
from .task_set import TaskSet

METRIC = "recall"
LONGEST = 4096  # tokens of a row where --max-length does not say it: lm-eval's own default
SEED = 42


TEXTS = 500  # of a task: lm-eval's own number
SHORTEST = 256  # tokens of a text, into which a question, a needle and some noise go
LEAD = "The special magic uuid for 5f0c3d2e-8a4b-4c6d-9e7f-0a1b2c3d4e5f mentioned in the provided text is"
SLACK = 8  # tokens that the joints of the parts may have more than the parts


@dataclass(frozen=True)
class Maker:
    """What makes a task's texts.

    Attributes:
        module, function: of lm-eval.
        samples: the function of the module that makes single texts, and is told how many.
        lead: as long as the words that lead to the answer, where the maker does not count them.
        answer: tokens of the answer, where it does not leave room for them.
    """

    module: str
    function: str
    samples: str
    lead: str
    answer: int


NEEDLES = (
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue "
    "niah_multiquery"
)
MAKERS = {name: Maker("niah_utils", name, "generate_samples", LEAD, 0) for name in NEEDLES.split()} | {
    "ruler_fwe": Maker("fwe_utils", "fwe_download", "sys_kwext", "", 50)
}
OF_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
REFUSED = {  # and why
    **dict.fromkeys(("ruler_vt", "ruler_cwe"), "its maker of texts does not end where one does not fit"),
    **dict.fromkeys(("ruler_qa_squad", "ruler_qa_hotpot"), "it downloads its documents from other sites"),
    "ruler": "some of its tasks cannot be had",
}


def task(name: str, folder: Path) -> LocalTask:
    """The task `name` of MAKERS over a file in `folder` that `written` writes."""
    file = folder / f"{name}.jsonl"
    config = standard_config(f"ruler/{name.removeprefix('ruler_')}.yaml") | {
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "process_results": Function(f"{__name__}.recall"),
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
    return LocalTask(name, file, config)


def recall(document: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """{METRIC: the share of the asked words or numbers that the response has}, in whatever case."""
    found = responses[0].lower()
    wanted = document["outputs"]
    return {METRIC: sum(word.lower() in found for word in wanted) / len(wanted)}


def written(tasks: TaskSet, opened: Sequence[OpenModel], settings: EvalSettings) -> TaskSet:
    """`tasks` with the texts of RULER's tasks in their files, for the tokenizer of the first model.

    A row, with the chat template and the answer, has as many tokens as --max-length says, or else as every model reads,
    at most LONGEST.

    Raises MhconvertError where no text is short enough.
    """
    specs = []
    for spec in tasks.specs:
        if spec.name in MAKERS and spec.local is not None:
            documents = _documents(spec.name, opened, settings)
            lines = "".join(json.dumps(document) + "\n" for document in documents)
            spec.local.write_text(lines, encoding="utf-8")
            spec = replace(spec, digest=f"{spec.digest} {task(spec.name, spec.local.parent).digest}")
        specs.append(spec)
    return replace(tasks, specs=specs)


def _row_length(opened: Sequence[OpenModel], settings: EvalSettings) -> int:
    if settings.max_length is not None:
        return settings.max_length
    return min([LONGEST, *(model.longest for model in opened if model.longest)])


def _documents(name: str, opened: Sequence[OpenModel], settings: EvalSettings) -> list[dict[str, Any]]:
    """lm-eval's documents of the task, the same at every call; with --limit the first ones alone."""
    maker, tokenizer, length = MAKERS[name], opened[0].tokenizer(), _row_length(opened, settings)
    module = importlib.import_module(f"lm_eval.tasks.ruler.{maker.module}")
    longest = length - _around(maker, tokenizer, bool(settings.chat_template))
    samples = getattr(module, maker.samples)
    number = min(TEXTS, settings.limit or TEXTS)
    made: dict[str, Any] = {}
    if longest >= SHORTEST:
        with (
            _seeded(),
            patch.object(module, "get_tokenizer", lambda *_: tokenizer),
            patch.object(module, maker.samples, lambda *a, **k: samples(*a, **k | {"num_samples": number})),
        ):
            try:
                made = getattr(module, maker.function)(max_seq_lengths=[longest])
            except ValueError:  # no text is short enough
                made = {}
    if not made:
        raise MhconvertError(
            f"{name} has no text for rows of {length} tokens; give a larger --max-length, or leave the task out"
        )
    return list(made["test"])


def _around(maker: Maker, tokenizer: Any, chat: bool) -> int:
    """Tokens of a row beside the text that the maker counts: the template, the lead and the answer."""
    template = encode(tokenizer, "a", chat, remedy="give --no-chat-template")["input_ids"].shape[1]
    return int(template) + len(tokenizer(maker.lead)["input_ids"]) + maker.answer + SLACK


@contextmanager
def _seeded() -> Iterator[None]:
    """The random numbers that the makers draw, from SEED; those of others go on as they were."""
    state, of_numpy = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)
