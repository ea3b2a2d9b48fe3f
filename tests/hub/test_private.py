"""What a push never sends: this machine's paths, files from elsewhere, figures of another adapter."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from mhconvert import api
from mhconvert.convert.methods.hydra.settings import HydraSettings
from mhconvert.convert.open_model import of_model, open_model
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import CheckpointError
from mhconvert.hub.push import push
from tests.donors import make_donor
from tests.hub.pushing import REPO, files_at
from tests.hub.stand_in_write_hub import WriteHub


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A Hydra adapter of a donor on this machine."""
    folder, donor = tmp_path / "tiny-hydra", make_donor(tmp_path / "donor")
    api.convert(Recipe(model=str(donor), method="hydra", settings=HydraSettings(), output=str(folder)))
    return folder


def require_private(hub: WriteHub, *places: Path) -> None:
    """Nothing there holds one of `places`, and every hash is that of what is there."""
    there = files_at(hub)
    for content in there.values():
        assert not any(str(place).encode() in content for place in places)
    hashes = json.loads(there["mhconvert.json"])["sha256"]
    assert {path: hashlib.sha256(there[path]).hexdigest() for path in hashes} == hashes


def test_a_checkpoint_without_paths(hub: WriteHub, converted: Path, checkpoint: Path, tmp_path: Path) -> None:
    facts = json.loads((checkpoint / "mhconvert.json").read_text())
    text = str(tmp_path / "my texts" / "private.txt")
    facts["healed"] = [{"settings": {"data": [text]}, "resumed": "~/runs/one"}]  # as healing leaves it
    (checkpoint / "mhconvert.json").write_text(json.dumps(facts))
    (checkpoint / "evaluation.html").write_text(f"<td>{text}</td><p>in {checkpoint}</p>")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    push(checkpoint, REPO)
    require_private(hub, tmp_path, converted.parent)
    assert files_at(hub)["evaluation.html"] == b"<td>private.txt</td><p>in tiny-mla</p>"
    assert b"~/runs" not in files_at(hub)["mhconvert.json"]
    assert json.loads(files_at(hub)["mhconvert.json"])["recipe"]["model"] == "donor"
    same = ("tokenizer.json", "config.json", "model.safetensors")
    assert {name: files_at(hub)[name] for name in same} == {name: before[name] for name in same}
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_an_adapter_without_paths(hub: WriteHub, adapter: Path, tmp_path: Path) -> None:
    (note,) = push(adapter, REPO)["notes"]
    assert "donor is only on this machine: others cannot load the adapter until it is public" in note
    require_private(hub, tmp_path)
    assert json.loads(files_at(hub)["adapter_config.json"])["base_model_name_or_path"] == "donor"


def test_the_base_of_an_adapter_is_that_on_the_hub(hub: WriteHub, adapter: Path, tmp_path: Path) -> None:
    facts = json.loads((adapter / "mhconvert.json").read_text())
    facts["donor"]["hub_id"] = "org/donor"
    (adapter / "mhconvert.json").write_text(json.dumps(facts))
    assert push(adapter, REPO)["notes"] == []
    require_private(hub, tmp_path)
    assert json.loads(files_at(hub)["adapter_config.json"])["base_model_name_or_path"] == "org/donor"
    assert b'AutoModelForCausalLM.from_pretrained("org/donor")' in files_at(hub)["README.md"]


@pytest.mark.parametrize("here", [True, False])
def test_an_adapter_that_has_changed_since_its_evaluation(adapter: Path, tmp_path: Path, here: bool) -> None:
    donor = tmp_path / "donor"
    models = [
        {"reference": str(place), "fingerprint": of_model(open_model(str(place), device="cpu"))}
        for place in (donor, adapter)
    ]
    texts = [{"text": "t", "models": [{"perplexity": 2.0}, {"perplexity": 3.0}]}]
    (adapter / "evaluation.json").write_text(json.dumps({"models": models, "texts": texts}))
    if not here:
        donor.rename(tmp_path / "moved")
    assert "| perplexity, t |" in push(adapter, REPO, dry_run=True)["card"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"scale": 2.0}))
    with pytest.raises(CheckpointError, match="measures other files than"):
        push(adapter, REPO, dry_run=True)


def test_only_known_kinds_that_lie_in_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    (checkpoint / "model.safetensors").rename(blobs / ("a" * 64))
    (checkpoint / "model.safetensors").symlink_to(os.path.relpath(blobs / ("a" * 64), checkpoint))
    (checkpoint / ".env").write_text("secret")
    (checkpoint / "hidden.json").symlink_to(".env")
    (checkpoint / "linked.json").symlink_to(outside)
    (checkpoint / "dangling.json").symlink_to(tmp_path / "nowhere")
    for name in ("id_rsa", "train.py", "log.csv", "texts.jsonl"):
        (checkpoint / name).write_text("x")
    (checkpoint / "metrics.jsonl").write_text("{}")
    result = push(checkpoint, REPO, dry_run=True)
    assert set(result["left_out"]) == {
        *(
            ".env",
            "hidden.json",
            "linked.json",
            "dangling.json",
            "id_rsa",
            "train.py",
            "log.csv",
            "texts.jsonl",
        )
    }
    sent = {file["path"] for file in result["files"]}
    assert {"model.safetensors", "modeling_mla.py", "configuration_mla.py", "metrics.jsonl"} <= sent


@pytest.mark.parametrize(
    ("name", "content"),
    [("README.md", b"\xff"), ("evaluation.json", b"\xff"), ("evaluation.json", b'{"models": [{"a": NaN}]}')],
)
def test_files_that_are_no_text(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        push(checkpoint, REPO, dry_run=True)
