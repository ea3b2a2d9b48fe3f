"""What is evaluated: the settings of `mhconvert eval`, and of a recipe's stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mhconvert.errors import RecipeError

from ..convert.validation.field_types import Also

Suite = Literal["quick", "transmla", "moh", "dha", "open-llm"]


Backend = Literal["hf", "vllm"]


Names = Annotated[tuple[str, ...], Also(str)]


SUITES = ("quick", "transmla", "moh", "dha", "open-llm")


BACKENDS = ("hf", "vllm")


LEAST = {"limit": 1, "num_fewshot": 0, "sequences": 1, "sequence_length": 8, "batch_size": 1, "max_length": 2}


@dataclass(frozen=True)
class EvalStage:
    """Evaluation of the result beside its donor: a suite, tasks, text or retrieval, of which at least one is named.

    suite: a list of lm-eval tasks with their numbers of examples. tasks: lm-eval tasks, groups or globs, beside the
    suite's. text: UTF-8 files on which fidelity and perplexity are measured. data: a folder with
    local copies of the tasks' data. include_path: a folder of lm-eval task YAMLs. limit: questions a task (None: all).
    num_fewshot: examples before each question (None: the suite's, or the task's own number). chat_template: questions
    as a chat. retrieval: also whether a fact is found again in a long text. sequences, sequence_length: rows of
    text, and tokens a row. batch_size: rows of questions together (None: found by lm-eval on CUDA, 8 on
    a CPU). max_length: tokens of a row of a task (None: what the model reads). dtype: of the weights as
    loaded (None: as stored). backend: what runs the tasks.
    """

    suite: Suite | None = None
    tasks: Names = ()
    text: Names = ()
    data: str | None = None
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    retrieval: bool = False
    sequences: int = 16
    sequence_length: int = 1024
    batch_size: int | None = None
    max_length: int | None = None
    dtype: str | None = None
    backend: Backend = "hf"

    def __post_init__(self) -> None:
        for name in ("tasks", "text"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
            if not all(getattr(self, name)):
                raise RecipeError(f"{name} has an empty name")
        if not (self.suite or self.tasks or self.text or self.retrieval):
            raise RecipeError(
                "there is nothing to evaluate; name a suite, tasks or text, or set retrieval: true"
            )
        if self.suite is not None and self.suite not in SUITES:
            raise RecipeError(f"suite '{self.suite}' is not one of {', '.join(SUITES)}")
        if self.backend not in BACKENDS:
            raise RecipeError(f"backend '{self.backend}' is not one of {', '.join(BACKENDS)}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name}={value} is too small; use at least {least}")
