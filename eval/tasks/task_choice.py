"""From the names in the settings to lm-eval tasks: tasks, groups and globs of lm-eval, suites, the user's own tasks."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mhconvert.errors import MhconvertError, TextError

from ...convert.storage.atomic_files import sha256
from ..settings import EvalSettings
from . import generated_code, local_data, requirements, ruler
from .local_data import LocalTask
from .task_set import TaskSet, TaskSpec


def suites() -> dict[str, dict[str, Any]]:
    """The contents of `suites/<name>.yaml` by name."""
    return local_data.yaml_files("suites")


def resolve(settings: EvalSettings, folder: Path) -> TaskSet:
    """The tasks that `settings` name, each once.

    Args:
        folder: an empty folder, into which the YAMLs of tasks over local files are written.

    Raises:
        MhconvertError: lm-eval does not know a name, and the message lists near matches; or a task needs what is not
            there, or what may not be done, such as running the code that a model writes.
        TextError: a file is missing.
    """
    import lm_eval

    wanted = _ours_first(_wanted(settings), settings)
    requirements.refuse(list(wanted), settings)  # before lm-eval's tasks are listed, which takes seconds
    local = _ours(list(wanted), settings, folder)
    for name in local:
        if wanted[name] and not local[name].own_examples:
            raise TextError(
                f"{name} with {wanted[name]} examples draws them from the task's training split, which our form of it "
                "does not have; use --num-fewshot 0" + ", or no --data" * (settings.data_folder is not None)
            )
    local_data.write_yaml(list(local.values()), folder)
    manager = _manager(settings, folder, only_local=set(wanted) <= set(local))
    specs = []
    for pattern, num_fewshot in wanted.items():
        for name in _names(pattern, manager):
            file = local[name].file if name in local else None
            digest = local[name].digest if name in local else _digest(name, settings.task_folder)
            specs.append(TaskSpec(name, num_fewshot, file, f"lm-eval {lm_eval.__version__} {digest}"))
    found = list({spec.name: spec for spec in specs}.values())
    requirements.require(found, settings)
    return TaskSet(found, manager)


def _ours(names: list[str], settings: EvalSettings, folder: Path) -> dict[str, LocalTask]:
    """The tasks among `names` with a YAML of our own; the files of RULER's are written into `folder` later."""
    ours = {local_data.QUICK: local_data.quick_task()} if local_data.QUICK in names else {}
    ours |= {name: ruler.task(name, folder) for name in names if name in ruler.MAKERS}
    if settings.data_folder is not None:
        ours |= {task.name: task for task in local_data.local_tasks(names, settings.data_folder)}
    if not settings.run_generated_code:
        ours |= {
            name: generated_code.unrun(name, ours.get(name)) for name in names if name in generated_code.UNRUN
        }
    return ours


def _wanted(settings: EvalSettings) -> dict[str, int | None]:
    """Name or glob -> num_fewshot, in order; a name that is also in the suite has the suite's num_fewshot."""
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
    """lm-eval's task manager, without lm-eval's own tasks if `only_local`, since indexing them takes seconds."""
    from lm_eval.tasks import TaskManager

    folders = [folder]
    if settings.task_folder is not None:
        if not settings.task_folder.is_dir():
            raise TextError(f"--include-path {settings.task_folder} is no folder")
        folders.append(settings.task_folder)
    return TaskManager(include_path=[str(path) for path in folders], include_defaults=not only_local)


def _names(pattern: str, manager: Any) -> list[str]:
    """The names of lm-eval's tasks and groups that `pattern`, a name, tag or glob, stands for."""
    known = manager.all_tasks
    if pattern in manager.task_index:
        entry = manager.task_index[pattern]
        return sorted(entry.tags) if entry.kind.name == "TAG" else [pattern]
    if matches := _glob(pattern, known):
        return matches
    similar = difflib.get_close_matches(pattern, known, n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(similar)}?" if similar else "`lm-eval ls tasks` lists what there is"
    raise MhconvertError(f"lm-eval has no task '{pattern}'; {hint}")


def _glob(pattern: str, names: Iterable[str]) -> list[str]:
    """The `names` that the glob `pattern` matches; none for a pattern without wildcards."""
    return fnmatch.filter(names, pattern) if any(character in pattern for character in "*?[") else []


def _ours_first(wanted: dict[str, int | None], settings: EvalSettings) -> dict[str, int | None]:
    """`wanted`, where a glob that matches tasks in our own form, or with local copies, stands for these alone."""
    ours = [*ruler.MAKERS, *(local_data.templates() if settings.data_folder is not None else ())]
    ours += [] if settings.run_generated_code else generated_code.UNRUN
    names: dict[str, int | None] = {}
    for pattern, num_fewshot in wanted.items():
        names |= dict.fromkeys(_glob(pattern, ours) or [pattern], num_fewshot)
    return names


def _digest(name: str, own: Path | None) -> str:
    """SHA-256 of everything that defines a task except lm-eval's version.

    With --include-path this covers every file in that folder, as a task there may include the others, run their code
    and read their data.
    """
    digest = hashlib.sha256(name.encode())
    if own is not None:
        for file in sorted(own.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(own)} {sha256(file)}".encode())
    return digest.hexdigest()
