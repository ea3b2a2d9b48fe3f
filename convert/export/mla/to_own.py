"""`mhconvert export CKPT --to own`: the form of latent attention that vLLM's Transformers backend caches as a latent.

The folder carries the code of its class, `convert.methods.mla.served`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mhconvert.errors import ExportError
from mhconvert.progress import Listener, Progress, ignore

from ... import open_model
from ...checkpoint import provenance
from ...checkpoint.provenance import recorded_donor
from ...donor.carried_files import carry_files
from ...storage.byte_size import DEFAULT_SHARD_SIZE, SLACK_BYTES, byte_size
from ...storage.dtype_cast import cast
from ...storage.output_folder import check_free
from ...storage.safetensors_reader import SafetensorsSource
from ...storage.shard_writer import ShardWriter
from ...storage.whole_folder import whole_folder
from .. import engine_support, same_outputs
from ..written_export import bytes_in, write_card, write_record, written_dtype
from . import padded_row
from .cached_elements import require_elements
from .own_layer import EPS, EPS_FLOAT16, ServedShape, model_class, norm_weight, served_config, served_tensors


def export_checkpoint(
    reference: str,
    output: str | None = None,
    *,
    dtype: str | None = None,
    s: float = 1.0,
    eps: float | None = None,
    pad_row: int | None = None,
    engine: engine_support.Named | None = None,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the portable MLA checkpoint `reference` in the served class to `output`, ./<checkpoint>-own if None.

    Args:
        output, dtype, pad_row, engine, verify, force, dry_run, device, trust_remote_code: as in `forms.Options`.
        s, eps: of the latent's norm, as for `served_tensors`; eps None: the default for the dtype.
        seed: of the text on which export and checkpoint are compared.
    Returns:
        What `_report` returns, with output_bytes, verified and seconds unless it is a dry run.
    Raises:
        ExportError: naming what the class cannot hold.
        OutputError: for a folder that may not be written.
    """
    begun, tell = time.perf_counter(), on_progress or ignore
    opened = _open(reference, device, trust_remote_code)
    folder, config, source = opened.folder, opened.config, SafetensorsSource(opened.folder)
    kind = written_dtype(dtype, source)
    served = _served(config, kind, s, eps, pad_row)
    place = Path(output) if output else Path(f"{folder.resolve().name}-own")
    check_free(place, force, folder)
    report = _report(reference, place, config, served, source, kind, s, engine)
    if dry_run:
        return report
    tell(Progress("donor", 0, 1, engine_support.warning(report["engines"]) or reference))
    expected = same_outputs.expect(opened.model(), opened.tokenizer(), seed, tell) if verify else None
    with whole_folder(place, _room(source, config, served, kind), force=force) as partial:
        report["output_bytes"] = _write(partial, source, config, served, kind, s, tell)
        _write_rest(partial, opened, served, kind, place.name, report)
        if expected is not None:
            report["verified"] = _prove(partial, expected, kind, report, trust_remote_code, tell)
        write_record(partial, report, recorded_donor(folder))
    tell(Progress("done", 1, 1, str(place)))
    return report | {"seconds": time.perf_counter() - begun}


def _open(reference: str, device: str | None, trust: bool) -> open_model.OpenModel:
    """The MLA checkpoint `reference`. Raises ExportError for anything else."""
    opened = open_model.open_model(reference, device=device, trust_remote_code=trust)
    require_elements(reference, opened.config)
    if opened.donor is not None or not hasattr(opened.config, "rope_in_latent"):
        raise ExportError(
            f"{reference} is no MLA checkpoint; own holds what --to mla --profile portable makes"
        )
    return opened


def _served(config: Any, dtype: torch.dtype, s: float, eps: float | None, pad_row: int | None) -> Any:
    """The export's configuration. Raises ExportError where `s` and `eps` are none of a norm, or a feature is lost."""
    eps = eps or (EPS_FLOAT16 if dtype == torch.float16 else EPS)
    norm_weight(s, eps)
    return served_config(config, eps, pad_row)


def _room(source: SafetensorsSource, config: Any, served: Any, dtype: torch.dtype) -> int:
    """Bytes that the export needs at most."""
    grown = max(served.v_head_dim / config.v_head_dim, served.kv_lora_rank / config.latent_rank(0))
    return int(bytes_in(source, dtype) * grown) + SLACK_BYTES


def _report(
    reference: str,
    place: Path,
    config: Any,
    served: Any,
    source: SafetensorsSource,
    dtype: torch.dtype,
    s: float,
    engine: engine_support.Named | None,
) -> dict[str, Any]:
    """What is known of the export before it is written to `place`.

    Args:
        reference, place: the checkpoint, and the folder to write.
        config, served: the checkpoint's and the export's.
        source: the checkpoint's tensors.
        dtype: of the export's weights.
        s: of the latent's norm.
        engine: that has to take it.
    Returns:
        checkpoint, method, to, architecture, output, dtype, exact (whether the dtype is the stored one),
        kv_elements_per_token (all layers), kv_bytes_per_token {checkpoint, export}, padded_row (its cost, as
        `padded_row.cost` has it; None: as it was), padded_v_head_dim (None: as it was), s, latent_norm_eps, engines as
        rows [engine, whether it serves it, how or why not], and source (the checkpoint's folder).
    """
    elements = config.num_hidden_layers * (served.kv_lora_rank + served.qk_rope_head_dim)
    stored, name = source.dtype("model.embed_tokens.weight"), str(dtype).removeprefix("torch.")
    row = config.latent_rank(0) + served.qk_rope_head_dim
    before = config.num_hidden_layers * row * stored.itemsize
    sizes = engine_support.Sizes(
        served.kv_lora_rank, served.qk_nope_head_dim, served.qk_rope_head_dim, served.v_head_dim
    )
    return {
        "checkpoint": reference,
        "method": "mla",
        "to": "own",
        "architecture": model_class(served).__name__,
        "output": str(place),
        "dtype": name,
        "exact": dtype == stored,
        "kv_elements_per_token": elements,
        "padded_row": padded_row.cost(config, served.kv_lora_rank, dtype.itemsize),
        "kv_bytes_per_token": {"checkpoint": before, "export": elements * dtype.itemsize},
        "padded_v_head_dim": served.v_head_dim if served.v_head_dim != config.v_head_dim else None,
        "s": s,
        "latent_norm_eps": served.latent_norm_eps,
        "engines": engine_support.engines("own", sizes, name, engine),
        "source": str(source.folder.resolve()),
    }


def _write(
    folder: Path,
    source: SafetensorsSource,
    config: Any,
    served: Any,
    dtype: torch.dtype,
    s: float,
    tell: Listener,
) -> int:
    """Write every tensor, with one layer's attention in memory at a time; returns their bytes."""
    shape = ServedShape(served.num_attention_heads, served.kv_lora_rank, config.v_head_dim, served.v_head_dim)
    names, layers = source.names(), served.num_hidden_layers
    writer = ShardWriter(folder, byte_size(DEFAULT_SHARD_SIZE), len(names) + layers)
    for name in names:
        if ".self_attn." not in name:
            writer.add(name, cast(name, source.read(name), dtype))
    for index in range(layers):
        prefix = f"model.layers.{index}.self_attn."
        own = {n.removeprefix(prefix): cast(n, source.read(n), dtype) for n in names if n.startswith(prefix)}
        own = padded_row.padded(own, config.latent_rank(index), served.kv_lora_rank)
        for name, tensor in served_tensors(own, shape, s=s, eps=served.latent_norm_eps).items():
            writer.add(prefix + name, tensor)
        tell(Progress("write", index + 1, layers))
    return writer.finish()


def _write_rest(
    partial: Path,
    opened: open_model.OpenModel,
    served: Any,
    dtype: torch.dtype,
    name: str,
    report: dict[str, Any],
) -> None:
    """Write configuration, code, tokenizer, licence and card.

    Args:
        partial: the folder to write into.
        opened: the checkpoint.
        served: the export's configuration.
        dtype: of its weights.
        name: the title of the card.
        report: of the export.
    """
    model = model_class(served)
    carry_files(opened.folder, partial, code=opened.trust_remote_code)
    provenance.write_model_config(partial, served, model, dtype)
    donor = recorded_donor(opened.folder)
    about = (
        f"{donor.get('hub_id') or 'A pretrained model'} with latent attention, converted by mhconvert and exported as "
        f"`{report['architecture']}`, whose code is in this folder: a cache of "
        f"{report['kv_elements_per_token']:,} elements a token. Load it with `trust_remote_code=True`; "
        "mhconvert need not be installed."
    )
    write_card(partial, name, about, report, donor, "small cache")


def _prove(
    partial: Path,
    expected: same_outputs.Expected,
    dtype: torch.dtype,
    report: dict[str, Any],
    trusted: bool,
    tell: Listener,
) -> dict[str, Any]:
    """What the reloaded export computes. Raises ProofError where that is not what the checkpoint computes."""
    tell(Progress("verify", 0, 1))
    return same_outputs.prove(
        partial,
        expected,
        partial / "probe.tmp",
        exact=report["exact"] or dtype == torch.float32,
        elements_per_token=report["kv_elements_per_token"],
        trusted=trusted,
    )
