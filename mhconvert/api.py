"""The public functions, one for each command. They compose the pass with healing and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhconvert.convert.methods.registry import ADAPTERS
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.convert.storage.byte_size import DEFAULT_SHARD_SIZE
from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, ignore

if TYPE_CHECKING:
    from torch import Tensor

    from mhconvert.eval.settings import EvalSettings


def convert(
    recipe: Recipe, *, resume: bool = False, force: bool = False, on_progress: Listener | None = None
) -> dict[str, Any]:
    """Write the checkpoint that `recipe` describes and return its report (also `report.json` in the folder).

    resume: continue an interrupted run of the same recipe in `OUT.partial`. force: replace an existing output folder.
    The donor is only read. Raises MhconvertError; an output folder that exists afterwards is whole.
    For method hydra it is an adapter folder, untrained: the donor's shape is all that is needed for it, and the report
    has modules (their names) and parameters {base, trainable, share}. With `recipe.heal` the report is that of `heal`,
    and the folder holds the converted checkpoint until the healed one takes its place.
    """
    if recipe.method in ADAPTERS:
        from mhconvert.convert.adapters import create

        if resume:
            raise MhconvertError(f"{recipe.method} writes an adapter at once; there is nothing to resume")
        return create.create_adapter(recipe, force=force, on_progress=on_progress)
    from mhconvert.convert import open_model, pipeline
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.report.model_card import write_report
    from mhconvert.heal import layer_fit

    if recipe.heal is not None:
        plain = dataclasses.replace(recipe, heal=None)
        output = (
            open_model.written(plain) if resume else None
        )  # the conversion is done, its healing was cut short
        output = output or convert(plain, resume=resume, force=force, on_progress=on_progress)["output"]
        return heal(
            output,
            recipe.heal,
            output=output,
            resume=resume,
            force=True,
            verify=recipe.verify,
            trust_remote_code=recipe.trust_remote_code,
            on_progress=on_progress,
        )
    return pipeline.convert_checkpoint(
        recipe,
        fit=layer_fit.fit,
        measure=Fidelity,
        finish=write_report,
        resume=resume,
        force=force,
        on_progress=on_progress,
    )


def plan(recipe: Recipe, *, survey: bool = False, on_progress: Listener | None = None) -> dict[str, Any]:
    """What `convert` would do: sizes per layer, KV arithmetic, disk and memory needed. Writes nothing.

    survey: read the weights and divide the budget over the layers, as `convert` would. For method hydra: the modules
    and parameters of the adapter.
    """
    if recipe.method in ADAPTERS:
        from mhconvert.convert.adapters import create

        return create.plan(recipe)
    from mhconvert.convert import pipeline
    from mhconvert.eval.fidelity import Fidelity

    return pipeline.plan(recipe, surveyed=Fidelity if survey else None, on_progress=on_progress)


def curve(
    recipe: Recipe,
    budgets: Sequence[float] | None = None,
    *,
    text: Path | None = None,
    sequences: int = 16,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """What the conversion that `recipe` describes would give at each KV budget, from one pass; writes nothing.

    budgets: shares of the donor's KV elements, instead of the recipe's own (None: 75 % … 12.5 %). text: a UTF-8 file
    to measure on, its first `sequences` rows as long as the calibration's, instead of its held-out rows.
    Returns perplexity (the donor's), kv_elements_per_token, kv_bytes_per_token, calibration, measured_on,
    measured_tokens, and points from the largest budget down: kv_budget, kv_elements_per_token, kv_bytes_per_token, kl,
    perplexity, perplexity_ratio, top1_agreement, mean_relative_error, seconds. A point's figures are those of
    `convert` at that budget; they are not smoothed.
    """
    if recipe.method in ADAPTERS:
        raise MhconvertError(f"{recipe.method} leaves the KV cache as it is, so there is no curve of it")
    from mhconvert.convert.layer_pass import budget_curve
    from mhconvert.eval import fidelity
    from mhconvert.heal import layer_fit

    def own_rows(tokenizer: Any, length: int) -> Tensor:
        assert text is not None
        return fidelity.text_rows(tokenizer, text, length, sequences)

    result = budget_curve.measure_curve(
        recipe,
        budgets,
        fit=layer_fit.fit,
        measure=fidelity.Fidelity,
        held_out=own_rows if text else None,
        on_progress=on_progress,
    )
    return result | {"measured_on": str(text) if text else "held-out calibration text"}


def heal(
    checkpoint: str,
    settings: HealSettings,
    *,
    output: str | None = None,
    resume: bool = False,
    force: bool = False,
    verify: bool = True,
    tensorboard: Path | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Train a converted checkpoint to predict as its donor does; returns the report (also `report.json` in the folder).

    output: None: ./<checkpoint>-healed. resume: continue an interrupted run of the same settings in `OUT.partial`.
    verify: reload the result in a bare process. tensorboard: a folder for a TensorBoard log.
    The report has perplexity {donor, converted}, kl and top1_agreement on the held-out rows after healing, `before`
    with the same before it, and `healing`: settings, teacher, steps, trained_tokens, tokens_per_second, seconds and
    more. `metrics.jsonl` in the folder has every step. Raises MhconvertError; an output folder that exists is whole.
    """
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.report import curve_plot
    from mhconvert.eval.report.model_card import write_report
    from mhconvert.heal import run
    from mhconvert.heal.open_models import Run

    def finish(folder: Path, report: dict[str, Any]) -> None:
        if settings.tokens:
            report["healing"]["plot"] = curve_plot.write_healing(folder)
        write_report(folder, report)

    place = Path(output) if output else Path(f"{Path(checkpoint).resolve().name}-healed")
    asked = Run(checkpoint, settings, place, resume, force, verify, tensorboard, trust_remote_code)
    return run.run(asked, measure=Fidelity, finish=finish, on_progress=on_progress)


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

    adapter: a folder that peft or `convert` wrote. output: None: ./<adapter>-merged. base: the base model, instead of
    the one that the adapter names. dtype: of the written weights; None: each tensor's own.
    Returns base, output, dtype, modules (changed), replaced (base tensors that the adapter had whole), output_bytes,
    seconds. Raises MhconvertError; an output folder that exists afterwards is whole.
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
    duplicate: bool = False,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write a converted checkpoint, or a Hydra adapter, in a form that others load, and prove that it is the same.

    to: deepseek_v3, youtu, own, gguf (of mla --profile portable); llama, nemotron-nas (of dha); lora (of hydra); auto:
    the first of these that is exact. output: None: ./<checkpoint>-<to>. dtype: of the weights, kind: of a gguf's.
    duplicate: heads of dha may be cached twice where that makes groups equal. verify: reload in a bare process, compare
    logits and a greedy continuation, weigh the cache; a difference removes the export. dry_run: which engines load it,
    and write nothing.
    Returns to, why (of auto), output and the facts of that form. Raises ExportError for what would be lost.
    """
    from mhconvert.convert.export import forms

    options = forms.Options(
        output, base, dtype, kind, duplicate, verify, force, dry_run, device, trust_remote_code
    )
    return forms.export_checkpoint(checkpoint, to, options, on_progress)


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

    against: None: of an export its checkpoint; of a converted checkpoint itself, by mhconvert's own class. tolerance:
    of the largest logit difference, in standard deviations of the logits; None: by dtype, where `against` is None;
    otherwise nothing is refused. python: the interpreter of another environment, to try its transformers.
    Returns folder, against, relative_difference (in those deviations), relative_logit_error, greedy_equal, cache (of
    the float32 model), transformers, model_class. Raises ExportError where the two differ by more.
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
    """A donor and checkpoints side by side, on texts, on lm-eval's tasks, and on a needle in a long text.

    settings: `mhconvert.EvalSettings`. against: the donor; None: the one named in the first checkpoint's
    `mhconvert.json`. record: keep the result as `evaluation.json` in each checkpoint's folder, for its card on the Hub.
    Returns, with the donor first wherever there are models: models (name, role, method, fingerprint, dtype), texts
    (perplexity, kl(donor ‖ model) in nats a token, top1_agreement), cache (kv_elements_per_token, measured), tasks
    (metrics with lm-eval's standard errors, and the paired difference from the donor with its own), average,
    retrieval, settings, versions, seconds; of the processes of `accelerate launch` the first does, the others {}.
    What earlier runs measured on the same files is read from the user's cache. Raises MhconvertError.
    """
    from mhconvert.eval import comparison
    from mhconvert.eval.report.recorded_evaluation import record_evaluation

    names = [checkpoints] if isinstance(checkpoints, str) else list(checkpoints)
    result = comparison.evaluate(
        names,
        settings,
        against=against,
        fresh=fresh,
        device=device,
        trust_remote_code=trust_remote_code,
        on_progress=on_progress or ignore,
    )
    if record and result:
        record_evaluation(result)
    return result


def inspect(reference: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Attention geometry, KV bytes, and which methods apply, of a donor or a converted checkpoint. Reads no weights."""
    from mhconvert.eval import inspection

    return inspection.inspect(reference, trust_remote_code=trust_remote_code)


def generate(
    checkpoint: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A continuation of `prompt` by a converted checkpoint or a donor: greedy, or sampled at `temperature` > 0.

    chat: the prompt is a user's message in the model's chat template. on_text is given the prompt (not in chat)
    and then the text as it appears.
    Returns prompt, text, prompt_tokens, new_tokens, kv_bytes_per_token (measured on the cache, in
    `dtype`), seconds.
    """
    from mhconvert.convert import open_model
    from mhconvert.eval import generation

    opened = open_model.open_model(checkpoint, device=device, trust_remote_code=trust_remote_code)
    options = generation.Options(max_new_tokens, chat, temperature, seed)
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
    dtype: str | None = None,
    device: str | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Prefill and decode speed of a converted checkpoint and its donor, measured in turns, and their cache bytes.

    against: the donor; None: the one named in `mhconvert.json`. contexts: cached tokens a row when the last of the
    `new_tokens` timed steps is done; the rows are copies of one, whose prefill is what is timed. reexpand: time the
    checkpoint without absorption too. compile: torch.compile of the decode step, on a static cache.
    random: a method; `checkpoint` is then a donor, and random weights of its shape and of its conversion's
    (at kv_budget) are timed. dtype None: bfloat16 on CUDA, else float32.
    Returns rows, one a context: donor and converted {prefill_tokens_per_s, decode_tokens_per_s, step_seconds,
    step_spread, steps, cache_bytes, cache_tokens}, ratio (of decode speeds, converted ÷ donor), cache_ratio; with
    reexpand also reexpanded and ratio_to_reexpanded; and the inputs.
    Raises MhconvertError, before weights are read, for what is not converted, has another shape than its donor, is
    shorter than a context, or does not fit into memory.
    """
    from mhconvert.eval.speed import bench as timing

    options = timing.Options(tuple(contexts), batch, new_tokens, dtype, static_cache, compile, reexpand)
    tell = on_progress or ignore
    if random is not None:
        return timing.bench_random(checkpoint, random, kv_budget, options, device, tell)
    return timing.bench(checkpoint, against, options, device, tell)


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

    repo_id: USER/REPO; REPO alone is the token owner's. private: make the repository private. revision: a branch;
    None: main. dry_run: check, and send nothing.
    Returns repo, url, revision, commit, files [{path, bytes}], bytes, left_out, removed, private, dry_run, card.
    Raises PublishError, with the branch as it was. What is returned as done, the Hub lists in full.
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
