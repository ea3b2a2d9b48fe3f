"""Checks that an export computes what its checkpoint computes: logits, a greedy continuation, and the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import CheckpointError, ProofError
from mhconvert.progress import Listener, Progress

from ..bare_process.reload import PROMPT, verify, write_probe
from ..calibration.token_rows import sampled_rows
from ..storage.safetensors_reader import read_json

ROWS, LENGTH = 4, 128  # of text sampled from the checkpoint, on which both are compared
NEW_TOKENS = 24
# The largest logit difference allowed, in standard deviations of the logits: for the same weights, and for weights that
# were multiplied by factors and rounded to bfloat16 once more (0.07 on SmolLM2-135M).
TOLERANCE, ROUNDED = 5e-3, 0.25
ROUNDED_ERROR = 0.03  # for rounded weights, of all logits together: relative error (0.0055 on SmolLM2-135M)


@dataclass(frozen=True)
class Expected:
    """What a checkpoint computes.

    Attributes:
        rows: (ROWS, LENGTH) ids.
        logits: (ROWS, LENGTH, V) float32.
        text: the greedy continuation of PROMPT.
        latents: per layer that caches a latent, the largest mean square of a token's latent.
    """

    rows: Tensor
    logits: Tensor
    text: str
    latents: list[float]


def expect(model: Any, tokenizer: Any, seed: int, tell: Listener) -> Expected:
    """Run a checkpoint on text that it samples itself.

    Args:
        model: float32, in eval mode.
        tokenizer: the checkpoint's.
        seed: of the sampled text.
        tell: called with the rows done.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    rows = sampled_rows(model, tokenizer, ROWS, min(LENGTH, limit), seed, lambda _: None)
    largest: dict[int, float] = {}
    hooks = [
        layer.self_attn.kv_a_proj_with_mqa.register_forward_hook(
            _record_largest(largest, index, layer.self_attn)
        )
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer.self_attn, "kv_lora_rank")
    ]
    try:
        logits = []
        with torch.inference_mode():
            for done, row in enumerate(rows, 1):
                logits.append(
                    model(input_ids=row[None].to(model.device), use_cache=False).logits[0].float().cpu()
                )
                tell(Progress("measure", done, len(rows), "what the checkpoint computes"))
    finally:
        for hook in hooks:
            hook.remove()
    return Expected(
        rows,
        torch.stack(logits),
        continuation(model, tokenizer),
        [largest[index] for index in sorted(largest)],
    )


def _record_largest(largest: dict[int, float], index: int, attention: Any) -> Any:
    """A forward hook that keeps the largest mean square of a token's latent of one layer in `largest`."""

    def keep(_: Any, __: Any, output: Tensor) -> None:
        latent = output[..., : attention.kv_lora_rank].float()
        largest[index] = max(largest.get(index, 0.0), latent.square().mean(-1).max().item())

    return keep


def continuation(model: Any, tokenizer: Any) -> str:
    """The greedy continuation of PROMPT."""
    encoded = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return str(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def prove(
    folder: Path,
    expected: Expected,
    probe: Path,
    *,
    exact: bool,
    elements_per_token: float,
    trusted: bool,
) -> dict[str, Any]:
    """Reload `folder` in a bare process and compare.

    Args:
        folder: the export.
        expected: what the checkpoint computes.
        probe: path of a temporary file.
        exact: whether its weights are the checkpoint's, or were changed in float32 only.
        elements_per_token: that the cache may hold, all layers together.
        trusted: whether code in the folder that this package does not ship may run.

    Returns:
        What `bare_process.reload.verify` returns, with greedy_equal.

    Raises:
        ProofError: where the logits differ, the continuation of an exact export does, or the cache is of another size.
    """
    removed = "the export is not what its checkpoint is, and was removed"
    try:
        reloaded = _reloaded(folder, expected, probe, TOLERANCE if exact else ROUNDED, trusted)
    except CheckpointError as error:
        raise ProofError(f"{removed}: {error}") from error
    text = reloaded["sample"]["text"]
    reloaded["greedy_equal"] = text == expected.text
    if exact and not reloaded["greedy_equal"]:
        raise ProofError(f"{removed}: it continues '{PROMPT}' with '{text}' instead of '{expected.text}'")
    if not exact and reloaded["relative_logit_error"] > ROUNDED_ERROR:
        raise ProofError(f"{removed}: its logits err by {reloaded['relative_logit_error']:.3g} of their size")
    require_cache(folder, reloaded["cache"], elements_per_token, removed)
    return reloaded


def _reloaded(
    folder: Path, expected: Expected, probe: Path, tolerance: float, trusted: bool
) -> dict[str, Any]:
    """What `verify` returns of `folder`; `probe` is gone afterwards."""
    write_probe(probe, expected.rows, expected.logits)
    try:
        return verify(
            folder,
            probe,
            prompt=PROMPT,
            max_new_tokens=NEW_TOKENS,
            tolerance=tolerance,
            threads=torch.get_num_threads(),
            trusted=trusted,
        )
    finally:
        probe.unlink(missing_ok=True)


def require_cache(folder: Path, cache: dict[str, Any], elements: float | None, subject: str) -> None:
    """Check that a cache holds what it should.

    Args:
        folder: the model, whose sliding window, if the cache has filled it, caches less.
        cache: as `bare_process.reload.verify` has it.
        elements: that it should hold a token, all layers together; None: unknown.
        subject: how the message begins.

    Raises:
        ProofError: it holds more, or less.
    """
    if elements is None or not _caches_latents():
        return
    held, window = cache["elements_per_token"], read_json(folder / "config.json").get("sliding_window")
    filled = isinstance(window, int) and window <= cache["tokens"]
    if held > elements or (held < elements and not filled):
        raise ProofError(f"{subject}: it caches {held:g} elements a token instead of {elements:g}")


def _caches_latents() -> bool:
    """Whether the installed transformers is 5.16.1 or later, whose own latent-attention classes cache latents."""
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version("5.16.1")
