"""The real huggingface_hub against a stand-in: what arrives there, and what is never sent."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from mhconvert.errors import CheckpointError, PublishError
from mhconvert.hub.push import push
from mhconvert.progress import Progress
from tests.donors import make_donor
from tests.hub.pushing import REPO, files_at, pushed
from tests.hub.stand_in_write_hub import WriteHub


def test_everything_arrives_in_one_commit(hub: WriteHub, checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    told: list[Progress] = []
    result = push(checkpoint, REPO, message="first", on_progress=told.append)
    there = files_at(hub)
    assert there.keys() == before.keys()
    changed = {"README.md", "mhconvert.json", "recipe.yaml", "report.json"}  # without paths
    assert {path for path in there if there[path] != before[path]} == changed
    assert hub.repos[REPO].messages == ["initial commit", "first"]
    assert (result["repo"], result["revision"], result["private"]) == (REPO, "main", False)
    assert result["commit"] == hub.repos[REPO].branches["main"]
    assert result["url"] == f"{hub.endpoint}/{REPO}"
    assert result["files"] == [{"path": path, "bytes": len(there[path])} for path in sorted(there)]
    assert result["bytes"] == sum(map(len, there.values()))
    assert result["card"].encode() == there["README.md"]
    hashes = json.loads(there["mhconvert.json"])["sha256"]
    assert {path: hashlib.sha256(there[path]).hexdigest() for path in hashes} == hashes
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert (told[-1].stage, told[-1].done, told[-1].total) == ("push", 4, 4)


def test_hashes_are_of_what_is_published(hub: WriteHub, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.model.v3").write_text("pieces")
    (checkpoint / "notes.xyz").write_text("kept here")
    record = json.loads((checkpoint / "mhconvert.json").read_text())
    record["sha256"] |= {"tokenizer.model.v3": hashlib.sha256(b"pieces").hexdigest(), "notes.xyz": "0" * 64}
    (checkpoint / "mhconvert.json").write_text(json.dumps(record))
    push(checkpoint, REPO)
    there = files_at(hub)
    hashes = json.loads(there["mhconvert.json"])["sha256"]
    assert "tokenizer.model.v3" in hashes
    assert hashes.keys() <= there.keys()
    assert {path: hashlib.sha256(there[path]).hexdigest() for path in hashes} == hashes


def test_a_second_push_sends_only_what_changed(hub: WriteHub, checkpoint: Path) -> None:
    first = push(checkpoint, REPO)
    assert hub.count("PUT /blob/") == 1
    again = push(checkpoint, REPO)
    assert (again["commit"], pushed(hub)) == (first["commit"], 1)
    (checkpoint / "generation_config.json").write_text("{}")
    third = push(checkpoint, REPO)
    assert third["commit"] != first["commit"]
    assert (files_at(hub)["generation_config.json"], hub.count("PUT /blob/")) == (b"{}", 1)


def test_weights_of_an_earlier_push_go(hub: WriteHub, tmp_path: Path) -> None:
    push(make_donor(tmp_path / "one"), REPO)
    hub.repos[REPO].commit(
        "main", files_at(hub) | {"picture.png": b"", "x/model.safetensors": b""}, "by hand"
    )
    result = push(make_donor(tmp_path / "two", shards=2), REPO)
    assert result["removed"] == ["model.safetensors"]
    weights = {path for path in files_at(hub) if "safetensors" in path or path.endswith("png")}
    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert weights == shards | {"model.safetensors.index.json", "picture.png", "x/model.safetensors"}


def test_a_branch_is_made_and_main_stays(hub: WriteHub, checkpoint: Path) -> None:
    result = push(checkpoint, REPO, revision="v2")
    assert (result["revision"], result["url"]) == ("v2", f"{hub.endpoint}/{REPO}/tree/v2")
    assert files_at(hub) == {}
    assert hub.repos[REPO].branches["v2"] == result["commit"]
    assert f'from_pretrained("{REPO}", revision="v2", trust_remote_code=True)' in result["card"]
    (checkpoint / "LICENSE").write_text("other")
    push(checkpoint, REPO, revision="v2")  # the branch is there
    assert files_at(hub, branch="v2")["LICENSE"] == b"other"


def test_private(hub: WriteHub, checkpoint: Path) -> None:
    assert push(checkpoint, REPO, private=True)["private"]
    assert hub.repos[REPO].private
    assert push(checkpoint, REPO)["private"]  # as it is
    hub.repos[REPO].private = False
    with pytest.raises(PublishError, match=r"already and public: --private would not hide it"):
        push(checkpoint, REPO, private=True)
    assert pushed(hub) == 1


def test_a_name_alone_is_the_users(hub: WriteHub, checkpoint: Path) -> None:
    result = push(checkpoint, "tiny-mla")
    assert result["repo"] == "tester/tiny-mla"
    assert 'from_pretrained("tester/tiny-mla"' in result["card"]


def test_a_dry_run_asks_nothing(hub: WriteHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (checkpoint / ".env").write_text("secret")
    (checkpoint / "training_args.bin").write_bytes(b"pickle")
    (checkpoint / "checkpoint-10").mkdir()
    (checkpoint / "checkpoint-10" / "model.safetensors").write_bytes(b"")
    result = push(checkpoint, REPO, dry_run=True)
    assert hub.requests == []
    assert (result["commit"], result["dry_run"]) == (None, True)
    assert result["left_out"] == [".env", "checkpoint-10/model.safetensors", "training_args.bin"]
    assert "model.safetensors" in [file["path"] for file in result["files"]]


@pytest.mark.parametrize("name", ["a/b/c", "", "a b", "-a/b", "a/..", "user/repo@main", "user/repo.git"])
def test_names_that_are_none(hub: WriteHub, checkpoint: Path, name: str) -> None:
    with pytest.raises(PublishError, match="is not a repository's name: USER/REPO or REPO"):
        push(checkpoint, name)
    assert hub.requests == []


@pytest.mark.parametrize(
    "branch",
    [
        "0" * 40,
        "/",
        "a//b",
        "a b",
        "..",
        "a~",
        "a^",
        "a:b",
        "a?",
        "a*",
        "[a",
        "a..b",
        "a@{b",
        "a.lock",
        "a/",
        "-a",
        "a.",
    ],
)
def test_branches_that_are_none(hub: WriteHub, checkpoint: Path, branch: str) -> None:
    with pytest.raises(PublishError, match="^" + re.escape(f"'{branch}' is")):
        push(checkpoint, REPO, revision=branch)
    assert hub.requests == []


def test_without_a_token(hub: WriteHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        PublishError, match="there is no token for the Hub; run 'hf auth login', or set HF_TOKEN"
    ):
        push(checkpoint, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set; unset it to push"):
        push(checkpoint, REPO)
    assert hub.requests == []


def test_folders_that_are_none(hub: WriteHub, checkpoint: Path, tmp_path: Path) -> None:
    def refused(folder: Path, words: str, kind: type[Exception] = PublishError) -> None:
        with pytest.raises(kind, match=words):
            push(folder, REPO)

    refused(tmp_path / "absent", "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has neither config\.json nor adapter_config\.json")
    refused(checkpoint.rename(tmp_path / "out.partial"), "the work of a run that has not ended")
    sharded = make_donor(tmp_path / "sharded", shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, r"shard model-00002-of-00002\.safetensors .* is missing", CheckpointError)
    short = make_donor(tmp_path / "short")
    os.truncate(short / "model.safetensors", 5000)
    refused(short, "truncated", CheckpointError)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", r"there is no adapter_model\.safetensors")
    assert hub.requests == []
