"""Tasks over files: lm-eval's own YAML of a standard task, told to read a local copy of its documents."""

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

QUICK = "mhconvert_quick"
PLACES = ("include", "dataset_kwargs")
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class LocalTask:
    """A task and the file that holds its documents. config: what differs from the standard task, as lm-eval's YAML."""

    name: str
    file: Path
    config: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of what is asked, wherever file and package lie."""
        asked = {key: value for key, value in self.config.items() if key not in PLACES}
        return hashlib.sha256(f"{json.dumps(asked)} {sha256(self.file)}".encode()).hexdigest()


def templates() -> dict[str, dict[str, Any]]:
    """The standard tasks that can be read from files, by name, as `local_tasks/<name>.yaml` describe them."""
    found = {}
    for path in sorted(_package("local_tasks").glob("*.yaml")):
        found[path.stem] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def find(names: Sequence[str], data: Path) -> list[LocalTask]:
    """Those of `names` that have a template, each with its file somewhere in the folder `data`.

    Raises TextError when `data` is no folder, and with all that is missing when it lacks a file.
    """
    if not data.is_dir():
        raise TextError(f"--data {data} is no folder")
    found, missing = [], []
    for name, template in templates().items():
        if name not in names:
            continue
        file = _matching(data, template["files"])
        if file is None:
            missing.append(f"{name} ({' or '.join(template['files'])})")
        else:
            found.append(LocalTask(name, file, _config(name, template, file)))
    if missing:
        raise TextError(f"{data} and its folders have no file for {', '.join(missing)}")
    return found


def quick() -> LocalTask:
    """The task of items of our own."""
    folder = _package("quick")
    config = yaml.safe_load((folder / f"{QUICK}.yaml").read_text(encoding="utf-8"))
    file = folder / "items.jsonl"
    return LocalTask(QUICK, file, config | {"dataset_kwargs": {"data_files": {"test": str(file)}}})


def write(tasks: Sequence[LocalTask], folder: Path) -> None:
    """`<name>.yaml` of each task into `folder`, which is then an --include-path for lm-eval itself too."""
    for task in tasks:
        text = yaml.dump(task.config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        (folder / f"{task.name}.yaml").write_text(text, encoding="utf-8")


class Function(str):
    """The dotted name of a function, written into YAML as lm-eval's `!function`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _config(name: str, template: dict[str, Any], file: Path) -> dict[str, Any]:
    import lm_eval.tasks

    split, place = template["split"], str(file.resolve())
    form = _form(name, template["forms"], file)
    config = {
        "include": str(Path(lm_eval.tasks.__file__).parent / template["standard"]),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: place}},
        **dict.fromkeys(SPLITS),
        f"{split}_split": split,
    }
    if "raw" in form:
        config["custom_dataset"] = Function(form["raw"])
        config["dataset_kwargs"] = {"path": place, "split": split}
    return config | (form.get("overrides") or {})


def _form(name: str, forms: list[dict[str, Any]], file: Path) -> dict[str, Any]:
    """The form that the file has: by the keys of its lines, or as raw text. Raises TextError, with the line."""
    if file.suffix != ".jsonl":
        return next(form for form in forms if "raw" in form)
    known = [form for form in forms if "columns" in form]
    found: dict[str, Any] | None = None
    for number, keys in _keys_by_line(name, file):
        if found is None:
            found = next((form for form in known if keys >= set(form["columns"])), None)
        if found is None or not keys >= set(found["columns"]):
            wanted = " or ".join(", ".join(form["columns"]) for form in ([found] if found else known))
            raise TextError(
                f"{file} is no copy of {name}: line {number} has {sorted(keys)} instead of {wanted}"
            )
    if found is None:
        raise TextError(f"{file} of task {name} has no documents")
    return found


def _keys_by_line(name: str, file: Path) -> Iterator[tuple[int, set[str]]]:
    """(number, the keys that have a value) of every line of a JSON lines file."""
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except ValueError as error:
                raise TextError(f"{file} of task {name}, line {number}, is no JSON: {error}") from error
            values = document if isinstance(document, dict) else {}
            yield number, {key for key, value in values.items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{file} of task {name} cannot be read as JSON lines: {error}") from error


def _matching(data: Path, patterns: list[str]) -> Path | None:
    for pattern in patterns:
        found = sorted(path for path in data.rglob(pattern) if path.is_file())
        if found:
            return found[0]
    return None


def _package(folder: str) -> Path:
    return Path(str(resources.files("mhconvert.eval.tasks"))) / folder
