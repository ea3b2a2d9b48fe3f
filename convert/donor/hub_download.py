"""Downloads from the Hugging Face Hub, of the needed files only.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are read by huggingface_hub.
"""

from __future__ import annotations

import glob
import threading
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_url, snapshot_download

from mhconvert.errors import CheckpointError

from ..storage.safetensors_reader import INDEX, WEIGHTS, no_weights, read_weight_map, weights_present

NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # chat templates beside the default one
TEXT_FILES = (  # tokenizer, chat templates, processor and generation settings
    "tokenizer*.json",
    "tokenizer*.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "chat_template*",
    NAMED_TEMPLATES,
    "*processor_config.json",
    "generation_config.json",
)
# Copied byte for byte from the donor to the converted checkpoint.
CARRIED_FILES = (*TEXT_FILES, "LICEN[SC]E*", "NOTICE*", "USE_POLICY*")
CODE = "*.py"  # run, and a tokenizer's copied, only with trust_remote_code
CONFIG_FILES = ["config.json", "README.md", "mhconvert.json", *CARRIED_FILES, CODE]
PROBE_SECONDS = 5.0
# The errors of httpx or requests, depending on the version of huggingface_hub.
TRANSPORT_ERRORS: tuple[type[BaseException], ...] = (getattr(errors, "HTTPError", OSError), OSError)
LOOKUP_ERRORS: tuple[type[BaseException], ...] = (*TRANSPORT_ERRORS, ValueError)
CACHE_ERRORS: tuple[type[BaseException], ...] = (*LOOKUP_ERRORS, CheckpointError)


def download_config(reference: str) -> Path:
    """The snapshot folder of `org/name[@revision]` with config, tokenizer and licence, but no weights.

    Raises:
        CheckpointError: the repository has no config.json or cannot be downloaded.
    """
    repo, _, revision = reference.partition("@")
    folder = _download(repo, revision or None, CONFIG_FILES)
    if not (folder / "config.json").is_file():
        raise CheckpointError(_incomplete(repo, folder))
    return folder


def download_weights(reference: str, *, revision: str) -> Path:
    """The snapshot folder of `org/name` at the commit `revision` with its safetensors in it.

    Raises:
        CheckpointError: the repository has no safetensors or cannot be downloaded.
    """
    repo = reference.partition("@")[0]
    folder = _download(repo, revision, [WEIGHTS, INDEX])
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        shards = sorted(set(read_weight_map(folder).values()))
        folder = _download(repo, revision, [glob.escape(file) for file in shards])
    elif not (folder / WEIGHTS).is_file():
        raise CheckpointError(_incomplete(repo, folder))
    return folder


def unavailable(repo: str) -> str | None:
    """The reason why `repo` cannot be downloaded; None if it is cached or the Hub answers within PROBE_SECONDS."""
    try:
        patterns = [*CONFIG_FILES, WEIGHTS, INDEX]
        cached = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        if (cached / "config.json").is_file() and weights_present(cached):
            return None
    except CACHE_ERRORS:
        pass
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and it is not in the local cache"
    outcome: list[str | None] = ["the Hub does not answer"]
    # Name resolution has no timeout, so the request runs in a daemon thread that can be abandoned.
    request = threading.Thread(target=_request, args=(repo, outcome), daemon=True)
    request.start()
    request.join(PROBE_SECONDS + 1)
    return outcome[0]


def _request(repo: str, outcome: list[str | None]) -> None:
    """Set `outcome[0]` to None if the Hub has `repo`, else to the reason why it cannot be downloaded."""
    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=PROBE_SECONDS)
        outcome[0] = None
    except errors.HfHubHTTPError as error:
        outcome[0] = f"the Hub refuses it ({type(error).__name__})"
    except Exception as error:  # after any failure the fallback of the alias is used
        outcome[0] = f"the Hub cannot be reached ({type(error).__name__})"


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot folder with the files that match; raises CheckpointError if the download fails."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repo}"
        raise CheckpointError(
            f"{repo} is gated: accept its terms at {page}, then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision '{revision}' on the Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is not on the Hub (nor a folder here); check the name, or for a private model "
            "run 'hf auth login' or set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(_unreachable(repo, error.__cause__)) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"'{repo}' is not a Hub id (org/name)") from error
    except TRANSPORT_ERRORS as error:
        raise CheckpointError(f"{repo} cannot be downloaded: {_one_line(error)}") from error


def _unreachable(repo: str, cause: BaseException | None) -> str:
    """The message for a repository that is neither in the cache nor reachable."""
    if constants.HF_HUB_OFFLINE:
        return (
            f"{repo} is not in the local cache and HF_HUB_OFFLINE is set; unset it, "
            "or give a folder or .gguf file"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        return f"{repo} cannot be downloaded: {_one_line(cause)}"
    return (
        f"{repo} cannot be downloaded: {constants.ENDPOINT} cannot be reached and the local cache lacks it; "
        "check the connection, or give a folder or .gguf file"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _incomplete(repo: str, folder: Path) -> str:
    """The message for a snapshot `folder` without the requested files: the repository lacks them, or the cache does."""
    try:
        names = HfApi().list_repo_files(repo, revision=folder.name)
    except LOOKUP_ERRORS as error:
        return _unreachable(repo, error)
    if "config.json" not in names and not any(name.endswith((".gguf", ".bin")) for name in names):
        return f"{repo} on the Hub has no config.json: not a transformers model"
    return no_weights(f"{repo} on the Hub", names)
