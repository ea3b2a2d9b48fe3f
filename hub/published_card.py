"""The model card as published on the Hub: README.md of the folder with the evaluation and the repository's name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from mhconvert.errors import CheckpointError

from ..convert.checkpoint.card_front_matter import front_matter, render_front_matter
from ..convert.checkpoint.provenance import read_record
from ..convert.donor.reference import HUB_ID
from ..convert.storage.bounded_yaml import load_yaml
from ..convert.storage.folder_kind import is_adapter
from ..convert.storage.safetensors_reader import read_json
from ..eval.report.model_card import CARD, usage
from ..eval.report.model_index import Evaluation, read_evaluation
from .local_paths import read_text

HEAD = re.compile(r"\A---\r?\n(?P<yaml>.*?)^---\s*?\n", re.DOTALL | re.MULTILINE)
BEGIN, END = "<!-- mhconvert eval -->", "<!-- end of mhconvert eval -->"
OLD_SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + "\n*", re.DOTALL)
BASE_TAG = "base_model:"  # prefix of tags that peft writes, also for a base model in a local folder


def published_card(folder: Path, repo_id: str, branch: str | None = None) -> str:
    """The text of README.md as published under `repo_id`; the file in `folder` is not changed.

    The loading code names the repository, a base model is named only if it is on the Hub, and the results of
    `evaluation.json` are added to `model-index` and as a table. Everything else in the README stays.

    Args:
        branch: named in the loading code; None for the default branch.

    Raises:
        CheckpointError: the front matter is invalid, or `evaluation.json` cannot be read.
    """
    file = folder / CARD
    text = read_text(file) if file.is_file() else _minimal_card(folder)
    data, body = _split_card(text, file)
    adapter = is_adapter(folder)
    base = _base_model(folder, data)
    data["base_model"] = base
    data["base_model_relation"] = (
        (data.get("base_model_relation") or ("adapter" if adapter else "finetune")) if base else None
    )
    kept = [tag for tag in data.get("tags") or [] if base or not str(tag).startswith(BASE_TAG)]
    data["tags"] = list(dict.fromkeys([*kept, "mhconvert"]))
    evaluation = read_evaluation(folder)
    if evaluation is not None:
        if evaluation.results:
            data["model_name"], data["eval_results"] = repo_id.rpartition("/")[2], evaluation.results
        body = _with_evaluation(body, evaluation)
    return render_front_matter(data) + "\n" + _load_from_hub(body, folder, repo_id, branch).lstrip("\n")


def _minimal_card(folder: Path) -> str:
    """The card of a folder without README.md."""
    library = "peft" if is_adapter(folder) else "transformers"
    head = front_matter(library=library, base=None, relation="", licence=None, tags=[])
    return f"{head}\n# {folder.resolve().name}\n"


def _split_card(text: str, file: Path) -> tuple[ModelCardData, str]:
    """(front matter, body) of a card; raises CheckpointError if the front matter is invalid."""
    match = HEAD.match(text)
    try:
        front = (load_yaml(match["yaml"]) or {}) if match else {}
        if not isinstance(front, dict):
            raise ValueError("not a mapping")
        json.dumps(front, allow_nan=False, default=str)  # the Hub refuses NaN
        return ModelCardData(**front), text[match.end() :] if match else text
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the front matter of {file} is not valid: {reason}") from error


def _base_model(folder: Path, data: ModelCardData) -> Any:
    """The Hub id of the base model, from the front matter or the record; None for a local folder or file."""
    base = data.get("base_model")
    if isinstance(base, str):
        on_hub = HUB_ID.fullmatch(base) and "@" not in base and not Path(base).exists()
        base = base if on_hub else None
    if base:
        return base
    donor = read_record(folder, strict=True).get("donor")
    return donor.get("hub_id") if isinstance(donor, dict) else None


def _with_evaluation(body: str, evaluation: Evaluation) -> str:
    """`body` with the table of the evaluation before the section "Use"; an older table is replaced."""
    lines = [BEGIN, "## Evaluation", "", "| | base model | this model | |", "|---|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in evaluation.rows]
    lines += ["", " ".join(["Measured with `mhconvert eval`.", *evaluation.settings]), END, "", ""]
    section = "\n".join(lines)
    body = OLD_SECTION.sub("", body)
    position = body.find("\n## Use")
    if position >= 0:
        return body[: position + 1] + section + body[position + 1 :]
    return f"{body.rstrip()}\n\n{section}".rstrip() + "\n"


def _load_from_hub(body: str, folder: Path, repo_id: str, branch: str | None) -> str:
    """`body` with loading code that names the repository; the section "Use" is added if there is no such code."""
    target = f'"{repo_id}"' + (f', revision="{branch}"' if branch else "")
    if is_adapter(folder):
        return body.replace('"THIS_FOLDER"', target)
    title = re.search(r"^# (.+)$", body, re.MULTILINE)
    names = {folder.resolve().name} | ({title[1].strip()} if title else set())
    if "from_pretrained(" not in body:
        remote = "auto_map" in read_json(folder / "config.json")
        name = title[1].strip() if title else folder.resolve().name
        body = body.rstrip() + "\n\n" + "\n".join(usage(name, remote))
        names.add(name)
    for name in names:
        body = body.replace(f'from_pretrained("{name}"', f"from_pretrained({target}")
    return body
