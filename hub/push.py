"""Pushes a checkpoint or an adapter to the Hugging Face Hub in one commit, or not at all.

HF_TOKEN (or what `hf auth login` left), HF_ENDPOINT and HF_HOME mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    get_token,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from mhconvert.errors import PublishError
from mhconvert.progress import Listener, Progress, ignore

from ..convert.storage.folder_kind import KINDS
from .contents import Contents, contents
from .upload_errors import Attempts

# What an earlier push left and this one lacks would be loaded beside it: stale weights of other shards, a config.
SUPERSEDED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin", *KINDS)
STEPS = 4
FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{")  # by git, in a branch's name
# Newer than the oldest huggingface_hub that will do.
NO_TOKEN: type[Exception] = getattr(errors, "OIDCError", OSError)


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    message: str | None = None,
    on_progress: Listener | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Publish `folder` as `repo_id` (USER/REPO, or REPO of whom the token belongs to); the folder is only read.

    private: make the repository private; one that exists and is public is refused. revision: a branch, made if
    missing; None: main. dry_run: every check that needs no Hub, and nothing is sent; it needs no token.
    Returns repo, url, revision (the branch), commit (None in a dry run), files [{path, bytes}], bytes, left_out
    (files of the folder that are never published), notes (sentences for whoever publishes it), removed (what an
    earlier push had left on the branch), private, dry_run, card (the text of README.md as published).
    Raises PublishError, with the branch as it was: a push is one commit. It returns only when the Hub lists every file
    at its size.
    """
    _require_repo_id(repo_id)
    branch = revision or constants.DEFAULT_REVISION
    _require_branch(branch)
    named = branch if branch != constants.DEFAULT_REVISION else None
    found = contents(folder, repo_id, named)
    result = _result(repo_id, branch, found, private, dry_run)
    if dry_run:
        return result
    token = _token()
    tell = on_progress or ignore
    api, attempts = HfApi(token=token), Attempts(repo_id, token, tell, sleep)
    tell(Progress("push", 0, STEPS, "the repository"))
    repo = attempts(
        "making the repository",
        lambda: api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id,
    )
    if repo != repo_id:  # the Hub has put the user's name before it
        attempts.repo, found = repo, contents(folder, repo, named)
    hidden = _require_private(api, attempts, repo, private)
    tell(Progress("push", 1, STEPS, f"{len(found.files)} files to {repo}"))
    removed = _prepare_branch(api, attempts, repo, branch, found)
    commit = _send(api, attempts, repo, branch, found, removed, message or f"Upload {folder.resolve().name}")
    tell(Progress("push", 3, STEPS, "comparing with the Hub"))
    _require_arrived(api, attempts, repo, commit, found)
    tell(Progress("push", STEPS, STEPS, "done"))
    return _result(repo, branch, found, hidden, dry_run) | {"commit": commit, "removed": removed}


def _result(repo: str, branch: str, found: Contents, private: bool, dry_run: bool) -> dict[str, Any]:
    sizes, card = found.sizes, found.files["README.md"]
    assert isinstance(card, bytes)
    tree = "" if branch == constants.DEFAULT_REVISION else f"/tree/{branch}"
    return {
        "repo": repo,
        "url": f"{constants.ENDPOINT}/{repo}{tree}",
        "revision": branch,
        "commit": None,
        "files": [{"path": path, "bytes": size} for path, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "left_out": found.left_out,
        "notes": found.notes,
        "removed": [],
        "private": private,
        "dry_run": dry_run,
        "card": card.decode(),
    }


def _require_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(
            f"'{repo_id}' is not a repository's name: USER/REPO or REPO, of letters, digits, '-', '_' and '.', at most "
            "96 of them, neither beginning nor ending with '-' or '.'"
        ) from error


def _require_branch(branch: str) -> None:
    if constants.REGEX_COMMIT_OID.fullmatch(branch):
        raise PublishError(f"'{branch}' is a commit, which cannot be written to; name a branch")
    parts = branch.split("/")
    if (
        FORBIDDEN.search(branch)
        or branch in ("@", "HEAD")
        or branch.startswith("-")
        or branch.endswith(".")
        or any(not part or part.startswith(".") or part.endswith(".lock") for part in parts)
    ):
        raise PublishError(f"'{branch}' is no name for a branch; choose one such as v2")


def _token() -> str:
    if constants.HF_HUB_OFFLINE:
        raise PublishError("HF_HUB_OFFLINE is set; unset it to push")
    try:
        token = get_token()
    except NO_TOKEN as error:
        raise PublishError(f"no token can be had: {' '.join(str(error).split())}") from error
    if not token:
        raise PublishError(
            "there is no token for the Hub; run 'hf auth login', or set HF_TOKEN to one that may write"
        )
    return token


def _require_private(api: HfApi, attempts: Attempts, repo: str, private: bool) -> bool:
    """Whether the repository is private. Raises PublishError for an existing public one that should be private."""
    hidden = bool(attempts("looking at the repository", lambda: api.model_info(repo)).private)
    if private and not hidden:
        raise PublishError(
            f"{repo} is on the Hub already and public: --private would not hide it; make it private in its settings, "
            "or choose another name"
        )
    return hidden


def _prepare_branch(api: HfApi, attempts: Attempts, repo: str, branch: str, found: Contents) -> list[str]:
    """Create the branch if needed; return its files that this push replaces without a file of the same name."""
    if branch != constants.DEFAULT_REVISION and not branch.startswith("refs/"):
        attempts("making the branch", lambda: api.create_branch(repo, branch=branch, exist_ok=True))
    there = attempts("looking at the branch", lambda: _listing(api, repo, branch))
    return sorted(
        path
        for path in there.keys() - found.files.keys()
        if "/" not in path and any(fnmatch(path, pattern) for pattern in SUPERSEDED)
    )


def _send(
    api: HfApi,
    attempts: Attempts,
    repo: str,
    branch: str,
    found: Contents,
    removed: list[str],
    message: str,
) -> str:
    """Every file in one commit; its hash.

    Not upload_large_folder, nor upload_folder, which with Xet storage commits as it goes: either would leave a model
    half published when it is cut short. Here all content goes first and one commit makes it visible; what has
    arrived is not sent again by the next try or the next push.
    """

    def commit() -> str:
        # Made anew for each try: they ask the Hub which files it has, so that a commit whose answer was lost is found
        # to be done instead of being made twice.
        sources = ((path, source) for path, source in found.files.items())
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, source) for path, source in sources
        ]
        stale = removed and _listing(api, repo, branch).keys() & set(removed)
        operations += [CommitOperationDelete(path) for path in sorted(stale or ())]
        return str(api.create_commit(repo, operations, commit_message=message, revision=branch).oid)

    return attempts("uploading", commit)


def _require_arrived(api: HfApi, attempts: Attempts, repo: str, commit: str, found: Contents) -> None:
    there = attempts("comparing with the Hub", lambda: _listing(api, repo, commit))
    wrong = [path for path, size in found.sizes.items() if there.get(path) != size]
    if wrong:
        raise PublishError(
            f"{repo} is not whole: at commit {commit} the Hub lacks {', '.join(wrong[:5])}"
            f"{' and more' if len(wrong) > 5 else ''}, or has another size of it; push again"
        )


def _listing(api: HfApi, repo: str, revision: str) -> dict[str, int]:
    """Return path -> bytes of every file at `revision`."""
    found = api.list_repo_tree(repo, revision=revision, recursive=True)
    return {item.path: item.size for item in found if isinstance(item, RepoFile)}
