"""What tasks need beside lm-eval, asked for before weights are read: packages, data, and leave to run code."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from mhconvert.errors import MhconvertError, TextError

from ..settings import EvalSettings
from .generated_code import UNRUN
from .ruler import MAKERS, OF_ESSAYS, REFUSED
from .task_set import TaskSpec

PACKAGES = {  # what a task's name begins with: the extra of lm-eval, and the modules that its code imports
    "ifeval": ("ifeval", ("langdetect", "immutabledict", "nltk")),
    "longbench": ("longbench", ("jieba", "fuzzywuzzy", "rouge")),
    "niah_": ("ruler", ("wonderwords", "nltk")),
}
IMPORTS_NLTK = {  # lm-eval's modules that fetch PUNKT when they are imported, also where it is not needed
    "ifeval": "lm_eval.tasks.ifeval.instructions_util",
    "niah_": "lm_eval.tasks.ruler.prepare_niah",
}
PUNKT = "punkt_tab"  # nltk's data, which splits sentences
OF_SENTENCES = (b"length_constraints:number_sentences", b"change_case:capital_word_frequency")  # that need it
RUNS_CODE = re.compile("humaneval|mbpp|cruxeval|pseudo_to_code")  # by their names; a group may hide them


def require(specs: Sequence[TaskSpec], settings: EvalSettings) -> None:
    """Raises MhconvertError as `refuse`, and for data and metrics that cannot be had."""
    refuse([spec.name for spec in specs], settings)
    running = [spec.name for spec in specs if RUNS_CODE.search(spec.name)]
    if settings.run_generated_code and running:
        _require_metric(running)
    needing = [spec.name for spec in specs if _splits_sentences(spec)]
    if needing:
        _require_punkt(needing)
    for start, module in IMPORTS_NLTK.items():
        if not needing and any(spec.name.startswith(start) for spec in specs):
            with patch("nltk.download"):
                importlib.import_module(module)


def refuse(names: Sequence[str], settings: EvalSettings) -> None:
    """Raises MhconvertError for tasks, by their names, whose packages are not there, with the command that installs
    them; for those that are not run; and for those that run what a model writes where that is not allowed."""
    for name in names:
        if name in REFUSED:
            raise MhconvertError(
                f"{name} is not run: {REFUSED[name]}; RULER's others are {', '.join(MAKERS)}"
            )
        refuse_code(name, settings)
    _require_packages(names)


def refuse_code(name: str, settings: EvalSettings, *, marked: bool = False) -> None:
    """Raises MhconvertError for a task, by its name or `marked` by lm-eval, that runs what a model writes, where that
    is not allowed."""
    runs = marked or RUNS_CODE.search(name)
    if runs and name not in UNRUN and not settings.run_generated_code:
        raise MhconvertError(
            f"{name} runs the code that a model writes, on this machine and with your rights; --run-generated-code "
            "allows that"
        )


def _require_packages(names: Sequence[str]) -> None:
    lacking: dict[str, list[str]] = {}  # by extra
    asking: list[str] = []
    for name in names:
        for start, (extra, modules) in PACKAGES.items():
            missing = (
                [module for module in modules if find_spec(module) is None] if name.startswith(start) else []
            )
            if missing:
                lacking[extra] = missing
                asking.append(name)
    if asking:
        packages = ", ".join(package for missing in lacking.values() for package in missing)
        raise MhconvertError(
            f"{', '.join(asking)} need{'s' * (len(asking) == 1)} {packages}: pip install "
            f"'lm_eval[{','.join(lacking)}]', or name other tasks with --tasks"
        )


def _require_metric(names: Sequence[str]) -> None:
    import evaluate

    os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric asks for this too
    try:
        evaluate.load("code_eval")
    except Exception as error:  # of the Hub, of a file, or of the metric's own code
        reason = " ".join(str(error).split())[:200]
        raise MhconvertError(
            f"{', '.join(names)} with --run-generated-code needs the metric code_eval of evaluate, which is fetched "
            f"from the Hub and cannot be had: {reason}; leave out --run-generated-code"
        ) from error


def _splits_sentences(spec: TaskSpec) -> bool:
    if spec.name in OF_ESSAYS:
        return True
    if not spec.name.startswith("ifeval"):
        return False
    return spec.local is None or any(words in _bytes(spec.local) for words in OF_SENTENCES)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TextError(f"{file} cannot be read: {error.strerror or error}") from error


def _require_punkt(names: Sequence[str]) -> None:
    import nltk

    for fetched in (False, True):
        try:
            nltk.data.find(f"tokenizers/{PUNKT}")
            return
        except LookupError as error:
            if fetched:
                raise MhconvertError(
                    f"{', '.join(names)} split sentences with nltk's data {PUNKT}, which is not here and cannot be "
                    f"fetched; where there is a network, run python -m nltk.downloader {PUNKT}, and bring the folder "
                    f"to ~/nltk_data/tokenizers/{PUNKT}"
                ) from error
            nltk.download(PUNKT, quiet=True)
