"""Tasks that are lm-eval's own but for what is changed: documents from a local file, or another metric."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mhconvert.errors import TextError

from ...convert.storage.atomic_files import sha256
from ...convert.storage.unicode_text import lone_surrogate

QUICK = "mhconvert_quick"
PATH_KEYS = ("include", "dataset_kwargs")  # of a task's config; their values are paths on this machine
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class LocalTask:
    """A task with a YAML of our own.

    Attributes:
        name: lm-eval's.
        file: holds its documents; None: they are on the Hub.
        config: the contents of its YAML, which includes that of the standard task.
        own_examples: it has examples of its own, and takes none from a training split.
    """

    name: str
    file: Path | None
    config: dict[str, Any]
    own_examples: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of the config and the documents, the same wherever the file and the package are; of a file that is
        not written yet, of the config."""
        config = {key: value for key, value in self.config.items() if key not in PATH_KEYS}
        documents = sha256(self.file) if self.file is not None and self.file.is_file() else ""
        return hashlib.sha256(f"{json.dumps(config)} {documents}".encode()).hexdigest()


def templates() -> dict[str, dict[str, Any]]:
    """The standard tasks that can be read from files, by name: what `local_tasks/<name>.yaml` says, or one that stands
    for several `names`, where {} is the name without the file's."""
    found = {}
    for stem, template in yaml_files("local_tasks").items():
        for name in template.pop("names", [""]):
            files = [pattern.format(name) for pattern in template["files"]]
            whole = f"{stem}_{name}" if name else stem
            found[whole] = template | {"standard": template["standard"].format(name), "files": files}
    return found


def yaml_files(folder: str) -> dict[str, dict[str, Any]]:
    """The contents of every YAML file in this package's `folder`, by the file's name without suffix."""
    paths = sorted(_package(folder).glob("*.yaml"))
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths}


def local_tasks(names: Sequence[str], data: Path) -> list[LocalTask]:
    """The tasks in `names` that have a template, each with its file in the folder `data` or below.

    Raises TextError when `data` is not a folder, or lacks files; the message lists all of them.
    """
    if not data.is_dir():
        raise TextError(f"--data {data} is no folder")
    tasks, missing = [], []
    for name, template in templates().items():
        if name not in names:
            continue
        file = _first_match(data, template["files"])
        if file is None:
            missing.append(f"{name} ({' or '.join(template['files'])})")
        else:
            own = bool(template.get("own_examples"))
            tasks.append(LocalTask(name, file, _config(name, template, file), own))
    if missing:
        raise TextError(
            f"{data} and its folders have no file for {', '.join(missing)}; add them, or name the tasks that it has "
            "with --tasks"
        )
    return tasks


def quick_task() -> LocalTask:
    """The task `mhconvert_quick`, whose items are in this package."""
    folder = _package("quick")
    config = yaml.safe_load((folder / f"{QUICK}.yaml").read_text(encoding="utf-8"))
    file = folder / "items.jsonl"
    return LocalTask(QUICK, file, config | {"dataset_kwargs": {"data_files": {"test": str(file)}}})


def write_yaml(tasks: Sequence[LocalTask], folder: Path) -> None:
    """`folder` has a `<name>.yaml` of each task afterwards, so that it can be lm-eval's --include_path."""
    for task in tasks:
        text = yaml.dump(task.config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        (folder / f"{task.name}.yaml").write_text(text, encoding="utf-8")


def standard_config(path: str) -> dict[str, Any]:
    """lm-eval's YAML at `path` below its folder of tasks, with what it includes and without its functions, whose
    modules are not imported."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    config = yaml.load((folder / path).read_text(encoding="utf-8"), Loader=_WithoutFunctions)
    included = config.pop("include", None)
    base = standard_config(str(Path(path).parent / included)) if included else {}
    return base | {key: value for key, value in config.items() if not isinstance(value, Function)}


class _WithoutFunctions(yaml.SafeLoader):
    pass


_WithoutFunctions.add_constructor(
    "!function",
    lambda loader, node: Function(loader.construct_scalar(node)),  # type: ignore[arg-type]
)


class Function(str):
    """The dotted name of a function, which YAML gets as lm-eval's tag `!function`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _config(name: str, template: dict[str, Any], file: Path) -> dict[str, Any]:
    import lm_eval.tasks

    split, path = template["split"], str(file.resolve())
    form = _form(name, template["forms"], file)
    config = {
        "include": str(Path(lm_eval.tasks.__file__).parent / template["standard"]),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: path}},
        **dict.fromkeys(SPLITS),
        f"{split}_split": split,
    }
    if "raw" in form:
        config["custom_dataset"] = Function(form["raw"])
        config["dataset_kwargs"] = {"path": path, "split": split}
    functions = {key: Function(name) for key, name in (form.get("functions") or {}).items()}
    return config | (form.get("overrides") or {}) | functions


def _form(name: str, forms: list[dict[str, Any]], file: Path) -> dict[str, Any]:
    """The entry of the template's `forms` that fits the file: by the keys of its lines, or as raw text.

    Raises TextError with the number of the first line that does not fit.
    """
    if file.suffix != ".jsonl":
        return next(form for form in forms if "raw" in form)
    known = [form for form in forms if "columns" in form]
    fitting: dict[str, Any] | None = None
    for number, keys in _keys_by_line(name, file):
        if fitting is None:
            fitting = next((form for form in known if keys >= set(form["columns"])), None)
        if fitting is None or not keys >= set(fitting["columns"]):
            wanted = " or ".join(", ".join(form["columns"]) for form in ([fitting] if fitting else known))
            raise TextError(
                f"{file} is no copy of {name}: line {number} has {sorted(keys)} instead of {wanted}"
            )
    if fitting is None:
        raise TextError(f"{file} of task {name} has no documents")
    return fitting


def _keys_by_line(name: str, file: Path) -> Iterator[tuple[int, set[str]]]:
    """(line number, keys with a value) of every non-empty line of a JSON lines file."""
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except ValueError as error:
                raise TextError(f"{file} of task {name}, line {number}, is no JSON: {error}") from error
            if (fault := lone_surrogate(json.dumps(document, ensure_ascii=False))) is not None:
                raise TextError(f"{file} of task {name}, line {number}, cannot be used: as JSON, its {fault}")
            values = document if isinstance(document, dict) else {}
            yield number, {key for key, value in values.items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{file} of task {name} cannot be read as JSON lines: {error}") from error


def _first_match(data: Path, patterns: list[str]) -> Path | None:
    for pattern in patterns:
        paths = sorted(path for path in data.rglob(pattern) if path.is_file())
        if paths:
            return paths[0]
    return None


def _package(folder: str) -> Path:
    return Path(str(resources.files("mhconvert.eval.tasks"))) / folder
