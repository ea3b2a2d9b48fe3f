"""That an export computes what its checkpoint computes: rows, logits, a greedy continuation, and the cache."""

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

ROWS, LENGTH = 4, 128  # that the checkpoint writes itself, and on which both are compared
NEW_TOKENS = 24
# The largest logit difference allowed, in standard deviations of the logits: of the same weights, and of weights that
# were multiplied and rounded to bfloat16 once more (0.07 on SmolLM2-135M).
TOLERANCE, ROUNDED = 5e-3, 0.25
ROUNDED_ERROR = 0.03  # and there the largest relative error of all logits together (0.0055 on SmolLM2-135M)


@dataclass(frozen=True)
class Expected:
    """What a checkpoint gives: rows (ROWS, LENGTH) ids, logits (ROWS, LENGTH, V) float32, the continuation of PROMPT;
    latents: of each layer the largest mean square of a token's latent, where it has one."""

    rows: Tensor
    logits: Tensor
    text: str
    latents: list[float]


def expect(model: Any, tokenizer: Any, seed: int, tell: Listener) -> Expected:
    """Run the checkpoint on text of its own. The model is float32 and in eval mode."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    rows = sampled_rows(model, tokenizer, ROWS, min(LENGTH, limit), seed, lambda _: None)
    seen: dict[int, float] = {}
    hooks = [
        layer.self_attn.kv_a_proj_with_mqa.register_forward_hook(_watch(seen, index, layer.self_attn))
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer.self_attn, "kv_a_proj_with_mqa")
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
        rows, torch.stack(logits), continuation(model, tokenizer), [seen[index] for index in sorted(seen)]
    )


def _watch(seen: dict[int, float], index: int, attention: Any) -> Any:
    def keep(_: Any, __: Any, output: Tensor) -> None:
        latent = output[..., : attention.kv_lora_rank].float()
        seen[index] = max(seen.get(index, 0.0), latent.square().mean(-1).max().item())

    return keep


def continuation(model: Any, tokenizer: Any) -> str:
    """What the model writes behind PROMPT, greedily."""
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
    folder: Path, expected: Expected, probe: Path, *, exact: bool, elements_per_token: float
) -> dict[str, Any]:
    """Reload `folder` in a bare process and compare. probe: a file to use meanwhile. exact: whether its weights are the
    checkpoint's, or were changed in float32 only.

    Returns what `verify` does, with greedy_equal. Raises ProofError where logits, or of an exact export the
    continuation, differ, or the cache holds more elements than elements_per_token.
    """
    write_probe(probe, expected.rows, expected.logits)
    removed = "the export is not what its checkpoint is, and was removed"
    try:
        found = verify(
            folder,
            probe,
            prompt=PROMPT,
            max_new_tokens=NEW_TOKENS,
            tolerance=TOLERANCE if exact else ROUNDED,
            threads=torch.get_num_threads(),
        )
    except CheckpointError as error:
        raise ProofError(f"{removed}: {error}") from error
    finally:
        probe.unlink(missing_ok=True)
    found["greedy_equal"] = found["sample"]["text"] == expected.text
    if exact and not found["greedy_equal"]:
        raise ProofError(
            f"{removed}: it continues '{PROMPT}' with '{found['sample']['text']}' instead of '{expected.text}'"
        )
    if not exact and found["relative_logit_error"] > ROUNDED_ERROR:
        raise ProofError(f"{removed}: its logits err by {found['relative_logit_error']:.3g} of their size")
    # Fewer is a window, which forgets tokens.
    if found["cache"]["elements_per_token"] > elements_per_token and _caches_latents():
        raise ProofError(
            f"{removed}: it caches {found['cache']['elements_per_token']:g} elements a token instead of "
            f"{elements_per_token:g}"
        )
    return found


def _caches_latents() -> bool:
    """Whether the installed transformers caches latents in its own classes: from 5.16.1 on."""
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version("5.16.1")
