"""That an export computes what its checkpoint computes: rows, logits, a greedy continuation, and the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.convert.errors import CheckpointError, ExportError
from mhconvert.convert.progress import Listener, Progress
from mhconvert.convert.provenance import PROMPT, write_probe
from mhconvert.convert.text import sampled_rows
from mhconvert.convert.verify import verify

ROWS, LENGTH = 4, 128  # that the checkpoint writes itself, and on which both are compared
NEW_TOKENS = 24
# The largest logit difference allowed, in standard deviations of the logits. bfloat16 keeps 8 bits of each weight, and
# weights that are multiplied are rounded once more; a wrong tensor, frequency or mask makes more than 1.
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 0.5}


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
    folder: Path, expected: Expected, probe: Path, dtype: torch.dtype, elements_per_token: int
) -> dict[str, Any]:
    """Reload `folder` in a bare process and compare. probe: a file to use meanwhile.

    Returns what `verify` does, with greedy_equal. Raises ExportError where logits, or in float32 the continuation,
    differ, or the cache holds another number of elements than elements_per_token.
    """
    write_probe(probe, expected.rows, expected.logits)
    try:
        found = verify(
            folder,
            probe,
            prompt=PROMPT,
            max_new_tokens=NEW_TOKENS,
            tolerance=TOLERANCES[dtype],
            threads=torch.get_num_threads(),
        )
    except CheckpointError as error:
        raise ExportError(f"the export is not what its checkpoint is, and was removed: {error}") from error
    finally:
        probe.unlink(missing_ok=True)
    found["greedy_equal"] = found["sample"]["text"] == expected.text
    if dtype == torch.float32 and not found["greedy_equal"]:
        raise ExportError(
            f"the export is not what its checkpoint is, and was removed: it continues '{PROMPT}' with "
            f"'{found['sample']['text']}' instead of '{expected.text}'"
        )
    if found["cache"]["elements_per_token"] != elements_per_token and _caches_latents():
        raise ExportError(
            f"the export caches {found['cache']['elements_per_token']:g} elements a token instead of "
            f"{elements_per_token}, and was removed"
        )
    return found


def _caches_latents() -> bool:
    """Whether the installed transformers caches latents in its own classes: from 5.16.1 on."""
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) >= Version("5.16.1")
