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
from ...checkpoint.provenance import read_record
from ...storage.byte_size import DEFAULT_SHARD_SIZE, SLACK_BYTES, byte_size
from ...storage.output_folder import check_free, whole_folder
from ...storage.safetensors_reader import SafetensorsSource
from ...storage.shard_writer import ShardWriter
from .. import engine_support, same_outputs
from ..written_export import carry_files, write_card, write_record
from . import deepseek_tensors


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
    seed: int = 0,
    device: str | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the portable MLA checkpoint `reference` in the class `to`; see `mhconvert.api.export`.

    Args:
        output: the folder; None: ./<checkpoint>-<to>.
        pad_values: whether values are padded to the width of the narrowest kernel that takes them.
    """
    begun, tell = time.perf_counter(), on_progress or ignore
    opened = open_model.open_model(reference, device=device)
    if opened.donor is not None or identity.converted_method(str(opened.folder)) != "mla":
        raise ExportError(
            f"{reference} has no latent attention; {to} holds what --to mla --profile portable makes"
        )
    folder, config = opened.folder, opened.config
    source = SafetensorsSource(folder)
    stored = source.dtype("model.embed_tokens.weight")
    plan = deepseek_tensors.plan(config, to, _dtype(dtype, stored), pad_values)
    place = Path(output) if output else Path(f"{folder.resolve().name}-{to}")
    shape = plan.shape
    sizes = engine_support.Sizes(
        shape.kv_lora_rank, shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.padded_v_head_dim
    )
    report = {
        "checkpoint": reference,
        "source": str(folder.resolve()),
        "method": "mla",
        "to": to,
        "architecture": deepseek_tensors.CLASSES[to],
        "output": str(place),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "kv_elements_per_token": plan.elements_per_token,
        "kv_bytes_per_token": plan.elements_per_token * plan.dtype.itemsize,
        "padded_v_head_dim": shape.padded_v_head_dim if shape.padded_v_head_dim != shape.v_head_dim else None,
        "engines": [list(row) for row in engine_support.engines(to, sizes)],
    }
    check_free(place, force, folder)
    if dry_run:
        return report
    tell(Progress("donor", 0, 1, reference))
    tokenizer, model = opened.tokenizer(), opened.model()
    expected = same_outputs.expect(model, tokenizer, seed, tell)
    del model
    donor = read_record(folder).get("donor") or {}
    needed = (
        sum(source.nbytes(name) // source.dtype(name).itemsize for name in source.names())
        * 2
        * plan.dtype.itemsize
    )
    with whole_folder(place, needed + SLACK_BYTES, force=force) as partial:
        report["output_bytes"] = _write(partial, plan, source, config, expected.latents, tell)
        deepseek_tensors.write_config(plan, partial)
        carry_files(folder, partial)
        about = (
            f"{donor.get('hub_id') or 'A pretrained model'} with latent attention, converted by mhconvert and exported "
            f"as `{report['architecture']}`: a cache of {report['kv_elements_per_token']:,} elements a token. It loads "
            "with plain transformers and needs no remote code."
        )
        write_card(partial, place.name, about, report, donor, "small cache")
        if verify:
            tell(Progress("verify", 0, 1))
            probe = partial / "probe.safetensors.tmp"
            exact = plan.dtype == torch.float32
            report["verified"] = same_outputs.prove(
                partial, expected, probe, exact=exact, elements_per_token=plan.elements_per_token
            )
        write_record(partial, report, donor)
    tell(Progress("done", 1, 1, str(place)))
    return report | {"seconds": time.perf_counter() - begun}


def _dtype(wanted: str | None, stored: torch.dtype) -> torch.dtype:
    if wanted is None:
        return stored
    found = getattr(torch, wanted, None)
    if not isinstance(found, torch.dtype):
        raise ExportError(f"'{wanted}' is no dtype; use {' or '.join(deepseek_tensors.DTYPES)}")
    return found


def _write(
    folder: Path,
    plan: deepseek_tensors.Plan,
    source: SafetensorsSource,
    config: Any,
    latents: list[float],
    tell: Listener,
) -> int:
    layers = plan.config.num_hidden_layers
    writer = ShardWriter(folder, byte_size(DEFAULT_SHARD_SIZE), len(source.names()) + layers + 1)
    done = -1
    for name, tensor in deepseek_tensors.tensors(plan, source, config, latents):
        writer.add(name, tensor)
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        if layer != done:
            done = layer
            tell(Progress("write", layer + 1, layers))
    return writer.finish()
