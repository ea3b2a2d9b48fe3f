"""What a model computes and costs: evaluation, sizes, text, speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhconvert.progress import Listener, ignore

if TYPE_CHECKING:
    from mhconvert.eval.settings import EvalSettings, LongContextKind


def evaluate(
    checkpoints: str | Sequence[str],
    settings: EvalSettings,
    *,
    against: str | None = None,
    record: bool = False,
    fresh: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """A donor and checkpoints side by side, on texts, on lm-eval's tasks, on a needle in a long text, and as writers.

    What earlier runs measured on the same files is read from the user's cache.

    Args:
        checkpoints: folders, or repositories of the Hub.
        settings: what is measured.
        against: the donor; None: the one named in the first checkpoint's `mhconvert.json`.
        record: keep the result as `evaluation.json` in each folder, for its card; figures of other settings beside it.
        fresh: measure everything anew.
        device: a torch device; None: CUDA if present.
        trust_remote_code: let a model run its own code.
        on_progress: called with the progress.

    Returns:
        With the donor first wherever there are models: models (name, role, method, fingerprint, dtype), texts
        (perplexity, kl(donor ‖ model) in nats a token, top1_agreement), over_texts (their mean and the worst), cache
        (kv_elements_per_token, measured), tasks (metrics and their paired differences from the donor, with standard
        errors), average, apart (MMLU, languages), retrieval, generation (of own texts), refusals, left_out, settings,
        versions, seconds, with `record` kept_aside (files). Under `accelerate launch` all processes but one return {}.

    Raises:
        MhconvertError: What a user can correct.
    """
    from mhconvert.eval import comparison
    from mhconvert.eval.report.recorded_evaluation import record_evaluation

    result = comparison.evaluate(
        [checkpoints] if isinstance(checkpoints, str) else list(checkpoints),
        settings,
        against=against,
        fresh=fresh,
        device=device,
        trust_remote_code=trust_remote_code,
        on_progress=on_progress or ignore,
    )
    if record and result:
        result |= record_evaluation(result)
    return result


def inspect(
    reference: str,
    *,
    heads: bool = False,
    prompts: Path | None = None,
    text: Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Attention geometry, KV bytes, and which methods apply, of a donor or a converted checkpoint. Reads no weights.

    Args:
        reference: a folder, a GGUF file, or a repository of the Hub.
        heads: read the donor's weights too and score every head: see `mhconvert.eval.heads.survey.survey`.
        prompts: with `heads`, a file of requests to be refused, one a line; None: our own.
        text: with `heads`, a text to predict; None: sampled from the donor.
        device: with `heads`, a torch device; None: CUDA if present.
        trust_remote_code: let the model run its own code.
        on_progress: called with the progress.

    Returns:
        What `mhconvert inspect --json` prints.

    Raises:
        MhconvertError: What a user can correct.
    """
    from mhconvert.eval import inspection

    facts = inspection.inspect(reference, trust_remote_code=trust_remote_code)
    if not heads:
        return facts
    from mhconvert.eval.heads.survey import Asked, survey

    asked, tell = Asked(prompts=prompts, text=text), on_progress or ignore
    return facts | {"heads": survey(reference, asked, device, trust_remote_code, tell)}


def generate(
    checkpoint: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    kv_cache_dtype: str = "auto",
    long_context: LongContextKind | None = None,
    chunk_size: int | None = None,
    chunks: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A continuation of `prompt` by a converted checkpoint or a donor.

    Args:
        checkpoint: a folder, or a repository of the Hub.
        prompt: the text; with `chat` a user's message.
        max_new_tokens: the most tokens to add.
        chat: put the prompt into the model's chat template.
        temperature: 0: greedy; above: sampled.
        seed: of sampling.
        kv_cache_dtype: of the cache, as in `EvalSettings`.
        long_context, chunk_size, chunks: how text beyond the trained length is read, as in `EvalSettings`.
        device: a torch device; None: CUDA if present.
        trust_remote_code: let the model run its own code.
        on_text: called with the prompt (not with `chat`) and then with the text as it appears.

    Returns:
        checkpoint, prompt, text, prompt_tokens, new_tokens, dtype, kv_cache_dtype, long_context, kv_bytes_per_token
        (measured on the cache), seconds.

    Raises:
        MhconvertError: What a user can correct.
    """
    from mhconvert.convert import open_model
    from mhconvert.eval import generation

    opened = open_model.open_model(checkpoint, device=device, trust_remote_code=trust_remote_code)
    how = (kv_cache_dtype, long_context, chunk_size, chunks)
    options = generation.Options(max_new_tokens, chat, temperature, seed, *how)
    return {"checkpoint": checkpoint} | generation.generate(opened, prompt, options, on_text)


def bench(
    checkpoint: str,
    *,
    against: str | None = None,
    contexts: Sequence[int] = (512, 2048, 8192),
    batch: int = 8,
    new_tokens: int = 16,
    reexpand: bool = False,
    static_cache: bool = False,
    compile: bool = False,
    random: str | None = None,
    kv_budget: float | None = None,
    kv_bits: str | int | None = None,
    kv_cache_dtype: str = "auto",
    step_tokens: int = 1,
    chunk_tokens: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Prefill and decode speed of a converted checkpoint and its donor, measured in turns, and their cache bytes.

    Args:
        checkpoint, against: a converted one, or a donor with `random`; its donor, None: as in `mhconvert.json`.
        contexts: cached tokens a row when the last timed step is done.
        batch, new_tokens: rows, copies of one, whose prefill is what is timed; timed steps.
        reexpand: time the checkpoint without absorption too.
        static_cache, compile: decode with a cache of fixed size; and torch.compile of the step.
        random, kv_budget, kv_bits: a method; random weights of the donor's shape and of such a conversion's are timed.
        kv_cache_dtype: of the checkpoint's cache, not the donor's; the checkpoint may then be the donor itself.
        step_tokens, chunk_tokens: that a row reads in a step, more than 1 as drafted ones; and of a prompt at once.
        dtype, device: None: bfloat16 on CUDA if present, else float32 on the CPU.
        on_progress: called with the progress.

    Returns:
        The inputs, and rows, one a context: donor and converted {prefill_tokens_per_s, decode_tokens_per_s,
        step_seconds, step_spread, steps, step_memory_bytes (its peak beside weights and cache, or None),
        step_memory_planned_bytes, cache_bytes, cache_tokens}, ratio (of decode speeds, converted ÷ donor),
        prefill_ratio, cache_ratio; with reexpand also reexpanded and ratio_to_reexpanded.

    Raises:
        MhconvertError: Before weights are read: not converted, another shape, shorter than a context, too large.
    """
    from mhconvert.eval.speed import bench as timing

    how = (static_cache, compile, reexpand, kv_cache_dtype, step_tokens, chunk_tokens)
    options, tell = timing.Options(tuple(contexts), batch, new_tokens, dtype, *how), on_progress or ignore
    if random is not None:
        return timing.bench_random(checkpoint, random, kv_budget, options, device, tell, kv_bits)
    return timing.bench(checkpoint, against, options, device, tell)
