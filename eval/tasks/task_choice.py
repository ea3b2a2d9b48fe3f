"""Which lm-eval tasks a word means: names, groups and globs of lm-eval, suites of the papers, tasks of one's own."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mhconvert.errors import MhconvertError, TextError

from ...convert.storage.atomic_files import sha256
from ..settings import EvalSettings
from . import local_data


@dataclass(frozen=True)
class Spec:
    """One task, group or tag to run. local: the file that its documents come from. digest: of what defines it."""

    name: str
    num_fewshot: int | None
    local: Path | None
    digest: str


@dataclass
class TaskSet:
    """Specs in order, and lm-eval's manager that loads them by name."""

    specs: list[Spec] = field(default_factory=list)
    manager: Any = None


def suites() -> dict[str, dict[str, Any]]:
    """The suites by name, as `suites/<name>.yaml` hold them."""
    folder = Path(__file__).parent / "suites"
    return {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))
    }


def resolve(settings: EvalSettings, folder: Path) -> TaskSet:
    """The tasks of `settings`, each once. `folder`: an empty one, for the YAMLs of tasks over files.

    Raises MhconvertError for a name that lm-eval does not know, with near matches, and TextError for missing files.
    """
    import lm_eval

    wanted = _wanted(settings)
    if settings.data_folder is not None:
        wanted = _local_first(wanted)
    local = {local_data.QUICK: local_data.quick()} if local_data.QUICK in wanted else {}
    if settings.data_folder is not None:
        local |= {task.name: task for task in local_data.find(list(wanted), settings.data_folder)}
    for name in local:
        if wanted[name]:
            raise TextError(
                f"{name} with {wanted[name]} examples draws them from the task's training split, which a local copy "
                "does not have; use --num-fewshot 0, or no --data"
            )
    local_data.write(list(local.values()), folder)
    manager = _manager(settings, folder, only_local=set(wanted) <= set(local))
    specs = []
    for word, shots in wanted.items():
        for name in _names(word, manager):
            file = local[name].file if name in local else None
            digest = local[name].digest if name in local else _digest(name, settings.task_folder)
            specs.append(Spec(name, shots, file, f"lm-eval {lm_eval.__version__} {digest}"))
    return TaskSet(list({spec.name: spec for spec in specs}.values()), manager)


def _wanted(settings: EvalSettings) -> dict[str, int | None]:
    """Names and shots in order; a name that the suite has too keeps the suite's shots."""
    wanted: dict[str, int | None] = {}
    if settings.suite is not None:
        known = suites()
        if settings.suite not in known:
            raise MhconvertError(f"'{settings.suite}' is no suite; choose one of {', '.join(known)}")
        content = known[settings.suite]
        for entry in content["tasks"]:
            entry = entry if isinstance(entry, dict) else {"task": entry}
            wanted[entry["task"]] = entry.get("num_fewshot", content.get("num_fewshot"))
    for name in settings.tasks:
        wanted.setdefault(name, None)
    if settings.num_fewshot is not None:
        wanted = dict.fromkeys(wanted, settings.num_fewshot)
    return wanted


def _manager(settings: EvalSettings, folder: Path, *, only_local: bool) -> Any:
    """lm-eval's manager. Reading all of its own tasks takes seconds, so it is left out where none is needed."""
    from lm_eval.tasks import TaskManager

    places = [folder]
    if settings.task_folder is not None:
        if not settings.task_folder.is_dir():
            raise TextError(f"--include-path {settings.task_folder} is no folder")
        places.append(settings.task_folder)
    return TaskManager(include_path=[str(place) for place in places], include_defaults=not only_local)


def _names(word: str, manager: Any) -> list[str]:
    known = manager.all_tasks
    if word in manager.task_index:
        entry = manager.task_index[word]
        return sorted(entry.tags) if entry.kind.name == "TAG" else [word]
    found = fnmatch.filter(known, word) if any(sign in word for sign in "*?[") else []
    if found:
        return found
    near = difflib.get_close_matches(word, known, n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists what there is"
    raise MhconvertError(f"lm-eval has no task '{word}'; {hint}")


def _local_first(wanted: dict[str, int | None]) -> dict[str, int | None]:
    """A glob means, where it matches tasks that can be read from files, those alone."""
    found: dict[str, int | None] = {}
    for word, shots in wanted.items():
        matching = fnmatch.filter(local_data.templates(), word) if any(sign in word for sign in "*?[") else []
        found |= dict.fromkeys(matching or [word], shots)
    return found


def _digest(name: str, own: Path | None) -> str:
    """Of all that defines a task beside lm-eval's version: with an --include-path every file in that folder, as a task
    there may include others, run their code and read their data."""
    digest = hashlib.sha256(name.encode())
    if own is not None:
        for file in sorted(own.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(own)} {sha256(file)}".encode())
    return digest.hexdigest()
