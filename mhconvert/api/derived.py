"""What is made from a converted checkpoint or an adapter for others to load, and whether it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mhconvert.convert.storage.byte_size import DEFAULT_SHARD_SIZE
from mhconvert.progress import Listener


def merge(
    adapter: str,
    output: str | None = None,
    *,
    base: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    force: bool = False,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write a plain checkpoint: the base model with a Hydra or LoRA adapter in its weights, one tensor at a time.

    Args:
        adapter: a folder that peft or `convert` wrote.
        output: the folder; None: ./<adapter>-merged.
        base: the base model, instead of the one that the adapter names.
        dtype: of the written weights; None: each tensor's own.
        max_shard_size: of a safetensors file, such as "5GB".
        force: replace an existing output folder.
        trust_remote_code: let the base model run its own code.
        on_progress: called with the progress.

    Returns:
        base, output, dtype, modules (changed), replaced (base tensors that the adapter had whole), output_bytes,
        seconds.

    Raises:
        MhconvertError: What a user can correct. An output folder that exists afterwards is whole.
    """
    from mhconvert.convert.adapters import merge as merging

    return merging.merge_adapter(
        adapter,
        output,
        base=base,
        dtype=dtype,
        max_shard_size=max_shard_size,
        force=force,
        trust_remote_code=trust_remote_code,
        on_progress=on_progress,
    )


def export(
    checkpoint: str,
    to: str = "auto",
    output: str | None = None,
    *,
    base: str | None = None,
    dtype: str | None = None,
    kind: str = "bf16",
    pad_row: int | None = None,
    engine: Literal["vllm", "sglang", "llama.cpp", "transformers"] | None = None,
    duplicate: bool = False,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write a converted checkpoint, or a Hydra adapter, in a form that others load, and prove that it is the same.

    Args:
        checkpoint: a folder that `convert` or `heal` wrote.
        to: deepseek_v3, youtu, own, gguf (of mla with profile portable); llama, nemotron-nas (of dha); lora (of
            hydra); auto: the first of these that is exact; for engine llama.cpp, gguf.
        output: the folder, or a gguf's file; None: ./<checkpoint>-<to>.
        base: the base model, instead of the one that an adapter names.
        dtype: of the weights; None: their own.
        kind: of a gguf's matrices.
        pad_row: elements of a row (320, 512 or 576, for vLLM) that an mla latent is widened to with zeros.
        engine: refuse what this engine refuses; None: the report says what each takes.
        duplicate: let heads of dha be cached twice where that makes groups equal.
        verify: reload in a bare process, compare logits and a greedy continuation, and measure the cache; the export
            is removed where they differ.
        force: replace an existing output.
        dry_run: tell which engines load it, and write nothing.
        device: a torch device; None: CUDA if present.
        trust_remote_code: let the code of a base model's or the checkpoint's tokenizer run, and take it along.
        on_progress: called with the progress.

    Returns:
        to, why (of auto), output and the facts of that form.

    Raises:
        ExportError: What would be lost.
    """
    from mhconvert.convert.export import forms

    form = (output, base, dtype, kind, pad_row, engine, duplicate)
    options = forms.Options(*form, verify, force, dry_run, device, trust_remote_code)
    return forms.export_checkpoint(checkpoint, to, options, on_progress)


def serving(
    checkpoint: str,
    engine: str = "auto",
    *,
    output: str | None = None,
    python: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "bfloat16",
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """The command of an engine that serves a model; a checkpoint that it does not know is exported first.

    Args:
        checkpoint: a converted folder, an export, any model folder, or a .gguf file.
        engine: vllm, llama-server, transformers; auto: vllm where it is installed and takes the model, else
            transformers.
        output: where an export is written; None: ./<checkpoint>-<form>.
        python: the interpreter of the environment that has the engine; None: this one.
        host: where it listens.
        port: where it listens.
        dtype: of weights and cache: bfloat16 or float32.
        trust_remote_code: let code in the folder that mhconvert does not ship run.
        on_progress: called with the progress of an export.

    Returns:
        engine, model (what is served), exported (whether it was written now), command (words).

    Raises:
        ExportError: The engine is missing or does not take the model, or the port is in use.
    """
    from mhconvert.convert.export import serving_command

    server = serving_command.Server(engine, python, host, port, dtype, trust_remote_code)
    return serving_command.serving(checkpoint, server, output, on_progress)


def verify(
    folder: str,
    *,
    against: str | None = None,
    tolerance: float | None = None,
    python: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Load `folder` in a bare process and compare it with the model that it should be, or with `against`.

    Args:
        folder: a whole model.
        against: None: of an export its checkpoint; of a converted checkpoint itself, by mhconvert's own class.
        tolerance: of the largest logit difference, in standard deviations of the logits; None: by dtype, and with
            `against` nothing is refused.
        python: the interpreter of another environment, to try its transformers.
        trust_remote_code: let code run that mhconvert does not ship.
        on_progress: called with the progress.

    Returns:
        folder, against, relative_difference (in those deviations), relative_logit_error, greedy_equal, cache (of the
        float32 model), transformers, model_class.

    Raises:
        ExportError: The two differ by more.
        MhconvertError: What else a user can correct.
    """
    from mhconvert.convert.export import verify_folder

    return verify_folder.verify_folder(
        folder,
        against=against,
        tolerance=tolerance,
        python=python,
        trust_remote_code=trust_remote_code,
        on_progress=on_progress,
    )


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    message: str | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Publish a checkpoint or an adapter on the Hugging Face Hub in one commit; the folder is only read.

    Args:
        folder: what is published.
        repo_id: USER/REPO; REPO alone is the token owner's.
        private: make the repository private.
        revision: a branch; None: main.
        dry_run: check, and send nothing.
        message: of the commit.
        on_progress: called with the progress.

    Returns:
        repo, url, revision, commit, files [{path, bytes}], bytes, left_out, removed, private, dry_run, card. What is
        returned as done, the Hub lists in full.

    Raises:
        PublishError: The branch is then as it was.
    """
    from mhconvert.hub import push as publishing

    return publishing.push(
        Path(folder).expanduser(),
        repo_id,
        private=private,
        revision=revision,
        dry_run=dry_run,
        message=message,
        on_progress=on_progress,
    )
