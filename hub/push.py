"""Pushes a checkpoint or an adapter to the Hugging Face Hub in one commit, or not at all.

HF_TOKEN (or the token of `hf auth login`), HF_ENDPOINT and HF_HOME are read as in huggingface_hub.
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

# Files of an earlier push that would be loaded together with the new ones: stale shards, configs.
SUPERSEDED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin", *KINDS)
STEPS = 4
FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{")  # by git in a branch name
# Missing from the oldest supported huggingface_hub.
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
    """Publish `folder` on the Hub in one commit, and check that the Hub lists every file with its size.

    Args:
        folder: a checkpoint or an adapter; it is not changed.
        repo_id: "USER/REPO", or "REPO" for the user of the token.
        private: create the repository as private; an existing public one is refused.
        revision: a branch, created if missing; None for main.
        dry_run: make only the checks that need neither the Hub nor a token.
        message: of the commit.

    Returns:
        repo, url, revision (the branch), commit (None in a dry run), files [{path, bytes}], bytes, left_out (files of
        the folder that are not published), notes (sentences for the person who publishes it), removed (files of an
        earlier push that were deleted), private, dry_run, card (the published text of README.md).

    Raises:
        PublishError: the push is impossible or failed; as it is one commit, the branch is then unchanged.
    """
    branch = revision or constants.DEFAULT_REVISION
    _require_repo_id(repo_id)
    _require_branch(branch)
    named = branch if branch != constants.DEFAULT_REVISION else None
    content = contents(folder, repo_id, named)
    if dry_run:
        return _describe_push(repo_id, branch, content, private, dry_run)
    token, on_progress = _token(), on_progress or ignore
    api, attempts = HfApi(token=token), Attempts(repo_id, token, on_progress, sleep)
    on_progress(Progress("push", 0, STEPS, "the repository"))
    attempts.repo = repo = _repository(api, attempts, repo_id, private)
    content = contents(folder, repo, named)  # the Hub may have added the user's name
    hidden = _require_private(api, attempts, repo, private)
    on_progress(Progress("push", 1, STEPS, f"{len(content.files)} files to {repo}"))
    removed = _prepare_branch(api, attempts, repo, branch, content)
    title = message or f"Upload {folder.resolve().name}"
    commit = _send(api, attempts, repo, branch, content, removed, title)
    on_progress(Progress("push", 3, STEPS, "comparing with the Hub"))
    _require_arrived(api, attempts, repo, commit, content)
    on_progress(Progress("push", STEPS, STEPS, "done"))
    return _describe_push(repo, branch, content, hidden, dry_run) | {"commit": commit, "removed": removed}


def _repository(api: HfApi, attempts: Attempts, repo_id: str, private: bool) -> str:
    """The full name "USER/REPO" of the repository, which is created where there is none."""
    return attempts(
        "making the repository",
        lambda: api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id,
    )


def _describe_push(repo: str, branch: str, content: Contents, private: bool, dry_run: bool) -> dict[str, Any]:
    """The result of `push` before anything is sent: commit None, removed []."""
    sizes, card = content.sizes, content.files["README.md"]
    assert isinstance(card, bytes)
    tree = "" if branch == constants.DEFAULT_REVISION else f"/tree/{branch}"
    return {
        "repo": repo,
        "url": f"{constants.ENDPOINT}/{repo}{tree}",
        "revision": branch,
        "commit": None,
        "files": [{"path": path, "bytes": size} for path, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "left_out": content.left_out,
        "notes": content.notes,
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
    """The token for the Hub; raises PublishError if there is none."""
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
    """Whether the repository is private; raises PublishError for an existing public one that should be private."""
    hidden = bool(attempts("looking at the repository", lambda: api.model_info(repo)).private)
    if private and not hidden:
        raise PublishError(
            f"{repo} is on the Hub already and public: --private would not hide it; make it private in its settings, "
            "or choose another name"
        )
    return hidden


def _prepare_branch(api: HfApi, attempts: Attempts, repo: str, branch: str, content: Contents) -> list[str]:
    """Create the branch if needed.

    Returns its files that the push has to delete: superseded ones that it does not overwrite.
    """
    if branch != constants.DEFAULT_REVISION and not branch.startswith("refs/"):
        attempts("making the branch", lambda: api.create_branch(repo, branch=branch, exist_ok=True))
    existing = attempts("looking at the branch", lambda: _list_files(api, repo, branch))
    return sorted(
        path
        for path in existing.keys() - content.files.keys()
        if "/" not in path and any(fnmatch(path, pattern) for pattern in SUPERSEDED)
    )


def _send(
    api: HfApi,
    attempts: Attempts,
    repo: str,
    branch: str,
    content: Contents,
    removed: list[str],
    message: str,
) -> str:
    """Upload every file and delete the `removed` ones in one commit; returns its hash.

    upload_large_folder, and upload_folder with Xet storage, make several commits and would leave an interrupted push
    half published. Here the content is uploaded first and one commit makes it visible; content that has arrived is
    not sent again by the next attempt.
    """

    def commit() -> str:
        # Operations are created anew for each attempt and ask the Hub which files it has. So a commit whose response
        # was lost is not made twice.
        sources = ((path, source) for path, source in content.files.items())
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, source) for path, source in sources
        ]
        stale = removed and _list_files(api, repo, branch).keys() & set(removed)
        operations += [CommitOperationDelete(path) for path in sorted(stale or ())]
        return str(api.create_commit(repo, operations, commit_message=message, revision=branch).oid)

    return attempts("uploading", commit)


def _require_arrived(api: HfApi, attempts: Attempts, repo: str, commit: str, content: Contents) -> None:
    """Raises PublishError unless the commit has every file with its size."""
    uploaded = attempts("comparing with the Hub", lambda: _list_files(api, repo, commit))
    wrong = [path for path, size in content.sizes.items() if uploaded.get(path) != size]
    if wrong:
        raise PublishError(
            f"{repo} is not whole: at commit {commit} the Hub lacks {', '.join(wrong[:5])}"
            f"{' and more' if len(wrong) > 5 else ''}, or has another size of it; push again"
        )


def _list_files(api: HfApi, repo: str, revision: str) -> dict[str, int]:
    """path -> bytes of every file at `revision`."""
    items = api.list_repo_tree(repo, revision=revision, recursive=True)
    return {item.path: item.size for item in items if isinstance(item, RepoFile)}
