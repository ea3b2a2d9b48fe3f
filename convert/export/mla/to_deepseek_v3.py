"""`mhconvert export CKPT --to deepseek_v3|youtu`: a portable MLA checkpoint in a stock latent-attention class."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mhconvert.errors import ExportError
from mhconvert.progress import Listener, Progress, ignore

from ... import open_model
from ...checkpoint import identity
from ...checkpoint.provenance import recorded_donor
from ...donor.carried_files import carry_files
from ...storage.byte_size import DEFAULT_SHARD_SIZE, SLACK_BYTES, byte_size
from ...storage.output_folder import check_free
from ...storage.safetensors_reader import SafetensorsSource
from ...storage.shard_writer import ShardWriter
from ...storage.whole_folder import whole_folder
from .. import engine_support, same_outputs
from ..written_export import bytes_in, write_card, write_record, written_dtype
from . import deepseek_tensors, padded_row
from .cached_elements import require_elements

GROWTH = 2  # room for an export of so many times the checkpoint's elements: padded values, an untied head


def export_checkpoint(
    reference: str,
    to: str,
    output: str | None = None,
    *,
    dtype: str | None = None,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    pad_values: bool = True,
    pad_row: int | None = None,
    engine: engine_support.Named | None = None,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the portable MLA checkpoint `reference` in the stock class `to`.

    Args:
        to: a key of `deepseek_tensors.CLASSES`.
        output, dtype, pad_row, engine, verify, force, dry_run, device, trust_remote_code: as in `forms.Options`.
        pad_values: whether values are padded to the width of the narrowest kernel that takes them.
        seed: of the text on which export and checkpoint are compared.
    Returns:
        What `_report` returns, with output_bytes, verified and seconds unless it is a dry run.

    Raises:
        ExportError: naming what the class cannot hold.
        OutputError: for a folder that may not be written.
    """
    begun, tell = time.perf_counter(), on_progress or ignore
    opened = _open(reference, to, device, trust_remote_code)
    source = SafetensorsSource(opened.folder)
    plan = deepseek_tensors.plan(opened.config, to, written_dtype(dtype, source), pad_values, pad_row)
    place = Path(output) if output else Path(f"{opened.folder.resolve().name}-{to}")
    report = _report(reference, opened, place, plan, engine)
    check_free(place, force, opened.folder)
    if dry_run:
        return report
    tell(Progress("donor", 0, 1, engine_support.warning(report["engines"]) or reference))
    expected = same_outputs.expect(opened.model(), opened.tokenizer(), seed, tell)
    with whole_folder(place, _room(plan, source, opened.config), force=force) as partial:
        report["output_bytes"] = _write(partial, plan, source, opened.config, expected.latents, tell)
        _write_rest(partial, opened, plan, place.name, report)
        if verify:
            report["verified"] = _prove(partial, expected, plan, trust_remote_code, tell)
        write_record(partial, report, recorded_donor(opened.folder))
    tell(Progress("done", 1, 1, str(place)))
    return report | {"seconds": time.perf_counter() - begun}


def _open(reference: str, to: str, device: str | None, trust: bool) -> open_model.OpenModel:
    """The MLA checkpoint `reference`. Raises ExportError for anything else."""
    opened = open_model.open_model(reference, device=device, trust_remote_code=trust)
    recorded_donor(opened.folder)  # whose errors come before the work
    require_elements(reference, opened.config)
    if opened.donor is not None or identity.converted_method(str(opened.folder)) != "mla":
        raise ExportError(
            f"{reference} has no latent attention; {to} holds what --to mla --profile portable makes"
        )
    return opened


def _room(plan: deepseek_tensors.Plan, source: SafetensorsSource, config: Any) -> int:
    """Bytes that the export needs at most."""
    growth = GROWTH * plan.shape.kv_lora_rank / config.kv_lora_rank
    return int(growth * bytes_in(source, plan.dtype)) + SLACK_BYTES


def _report(
    reference: str,
    opened: open_model.OpenModel,
    place: Path,
    plan: deepseek_tensors.Plan,
    engine: engine_support.Named | None,
) -> dict[str, Any]:
    """What is known of the export before it is written.

    Args:
        reference, opened: the checkpoint.
        place: the folder to write.
        plan: of the export.
        engine: that has to take it.

    Returns:
        checkpoint, source (its folder), method, to, architecture, output, dtype, kv_lora_rank, kv_elements_per_token
        and kv_bytes_per_token (all layers), padded_row (its cost, as `padded_row.cost` has it; None: as it was),
        padded_v_head_dim (None: as it was), and engines as rows [engine, whether it serves it, how or why not].
    """
    shape, dtype = plan.shape, str(plan.dtype).removeprefix("torch.")
    sizes = engine_support.Sizes(
        shape.kv_lora_rank,
        shape.qk_nope_head_dim,
        shape.qk_rope_head_dim,
        shape.padded_v_head_dim,
        plan.config.num_hidden_layers,
    )
    return {
        "checkpoint": reference,
        "source": str(opened.folder.resolve()),
        "method": "mla",
        "to": plan.to,
        "architecture": deepseek_tensors.CLASSES[plan.to],
        "output": str(place),
        "dtype": dtype,
        "kv_lora_rank": shape.kv_lora_rank,
        "kv_elements_per_token": plan.elements_per_token,
        "kv_bytes_per_token": plan.elements_per_token * plan.dtype.itemsize,
        "padded_row": padded_row.cost(opened.config, shape.kv_lora_rank, plan.dtype.itemsize),
        "padded_v_head_dim": shape.padded_v_head_dim if shape.padded_v_head_dim != shape.v_head_dim else None,
        "engines": engine_support.engines(plan.to, sizes, dtype, engine),
    }


def _write_rest(
    partial: Path,
    opened: open_model.OpenModel,
    plan: deepseek_tensors.Plan,
    name: str,
    report: dict[str, Any],
) -> None:
    """Write configuration, tokenizer, licence and card.

    Args:
        partial: the folder to write into.
        opened: the checkpoint.
        plan: of the export.
        name: the title of the card.
        report: of the export.
    """
    deepseek_tensors.write_config(plan, partial)
    carry_files(opened.folder, partial, code=opened.trust_remote_code)
    donor = recorded_donor(opened.folder)
    about = (
        f"{donor.get('hub_id') or 'A pretrained model'} with latent attention, converted by mhconvert and exported "
        f"as `{report['architecture']}`: a cache of {report['kv_elements_per_token']:,} elements a token. It loads "
        "with plain transformers and needs no remote code."
    )
    write_card(partial, name, about, report, donor, "small cache")


def _prove(
    partial: Path,
    expected: same_outputs.Expected,
    plan: deepseek_tensors.Plan,
    trusted: bool,
    tell: Listener,
) -> dict[str, Any]:
    """What the reloaded export computes. Raises ProofError where that is not what the checkpoint computes."""
    tell(Progress("verify", 0, 1))
    return same_outputs.prove(
        partial,
        expected,
        partial / "probe.safetensors.tmp",
        exact=plan.dtype == torch.float32,
        elements_per_token=plan.elements_per_token,
        trusted=trusted,
    )


def _write(
    folder: Path,
    plan: deepseek_tensors.Plan,
    source: SafetensorsSource,
    config: Any,
    latents: list[float],
    tell: Listener,
) -> int:
    """Write every tensor, with one layer in memory at a time; returns their bytes.

    Args:
        folder: to write into.
        plan: of the export.
        source: the checkpoint's tensors.
        config: the checkpoint's.
        latents: per layer, the largest mean square of a token's latent.
        tell: called with the layers written.
    """
    layers = plan.config.num_hidden_layers
    writer = ShardWriter(folder, byte_size(DEFAULT_SHARD_SIZE), len(source.names()) + layers + 1)
    last = -1  # the layer whose tensors are being written
    for name, tensor in deepseek_tensors.tensors(plan, source, config, latents):
        writer.add(name, tensor)
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        if layer != last:
            last = layer
            tell(Progress("write", layer + 1, layers))
    return writer.finish()
