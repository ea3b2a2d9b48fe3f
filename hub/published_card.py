"""The model card on the Hub: the folder's README.md, its evaluation, and the repository's name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from mhconvert.errors import CheckpointError

from ..convert.checkpoint.card_front_matter import enclosed, front_matter
from ..convert.checkpoint.provenance import read_record
from ..convert.donor.reference import HUB_ID
from ..convert.storage.folder_kind import is_adapter
from ..convert.storage.safetensors_reader import read_json
from ..eval.report.model_card import CARD, usage
from ..eval.report.model_index import Evaluation, read_evaluation
from .local_paths import read_text

HEAD = re.compile(r"\A---\r?\n(?P<yaml>.*?)^---\s*?\n", re.DOTALL | re.MULTILINE)
BEGIN, END = "<!-- mhconvert eval -->", "<!-- end of mhconvert eval -->"
OLD_SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END) + "\n*", re.DOTALL)
BASE_TAG = "base_model:"  # peft writes such tags, also of a base model that is a folder on this machine


def published_card(folder: Path, repo_id: str, branch: str | None = None) -> str:
    """The text of README.md for `repo_id`; the file in `folder` is only read.

    It names the repository where a model is loaded, states a base model only if that is on the Hub, and has the
    figures of `evaluation.json`, where there is one, in `model-index` and as a table. branch: named in what loads
    the model; None: the default one. Whatever else the README says is kept.
    Raises CheckpointError for front matter that is no YAML and for an `evaluation.json` that cannot be read.
    """
    file = folder / CARD
    text = read_text(file) if file.is_file() else _bare(folder)
    data, body = _parted(text, file)
    adapter = is_adapter(folder)
    base = _base(folder, data)
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
        body = _with_section(body, evaluation)
    return enclosed(data) + "\n" + _loading_from(body, folder, repo_id, branch).lstrip("\n")


def _bare(folder: Path) -> str:
    """Return a card for a folder that has none."""
    library = "peft" if is_adapter(folder) else "transformers"
    head = front_matter(library=library, base=None, relation="", licence=None, tags=[])
    return f"{head}\n# {folder.resolve().name}\n"


def _parted(text: str, file: Path) -> tuple[ModelCardData, str]:
    """Return front matter and body of a card."""
    match = HEAD.match(text)
    try:
        stated = (yaml.safe_load(match["yaml"]) or {}) if match else {}
        if not isinstance(stated, dict):
            raise ValueError("not a mapping")
        json.dumps(stated, allow_nan=False, default=str)  # the Hub takes no NaN
        return ModelCardData(**stated), text[match.end() :] if match else text
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the front matter of {file} is not valid: {reason}") from error


def _base(folder: Path, data: ModelCardData) -> Any:
    """Return the base model's Hub id; None where the base is a local folder or file."""
    stated = data.get("base_model")
    if isinstance(stated, str):
        known = HUB_ID.fullmatch(stated) and "@" not in stated and not Path(stated).exists()
        stated = stated if known else None
    if stated:
        return stated
    donor = read_record(folder, strict=True).get("donor")
    return donor.get("hub_id") if isinstance(donor, dict) else None


def _with_section(body: str, evaluation: Evaluation) -> str:
    """Return `body` with the evaluation's table before the loading section; an older table is replaced."""
    lines = [BEGIN, "## Evaluation", "", "| | base model | this model | |", "|---|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in evaluation.rows]
    lines += ["", " ".join(["Measured with `mhconvert eval`.", *evaluation.settings]), END, "", ""]
    section = "\n".join(lines)
    body = OLD_SECTION.sub("", body)
    place = body.find("\n## Use")
    if place >= 0:
        return body[: place + 1] + section + body[place + 1 :]
    return f"{body.rstrip()}\n\n{section}".rstrip() + "\n"


def _loading_from(body: str, folder: Path, repo_id: str, branch: str | None) -> str:
    """Return `body` with the repository's name where it loads the folder; adds a loading section if it has none."""
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
