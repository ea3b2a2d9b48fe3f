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
from ...checkpoint.provenance import read_record
from ...storage.byte_size import DEFAULT_SHARD_SIZE, SLACK_BYTES, byte_size
from ...storage.dtype_cast import cast, torch_dtype
from ...storage.output_folder import check_free, whole_folder
from ...storage.safetensors_reader import SafetensorsSource
from ...storage.shard_writer import ShardWriter
from .. import engine_support, same_outputs
from ..written_export import carry_files, write_card, write_record
from .own_layer import EPS, EPS_FLOAT16, ServedShape, model_class, norm_weight, served_config, served_tensors


def export_checkpoint(
    reference: str,
    output: str | None = None,
    *,
    dtype: str | None = None,
    s: float = 1.0,
    eps: float | None = None,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    seed: int = 0,
    device: str | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the portable MLA checkpoint `reference` in the served class to `output`, ./<checkpoint>-own if None.

    Args:
        dtype: of the weights; None: as they are stored.
        s, eps: of the latent's norm, as for `served_tensors`; eps None: the default for the dtype.
        verify: whether the export is reloaded in a bare process and compared.
        dry_run: whether to refuse or report and write nothing.
    Returns:
        The report: checkpoint, method, to, architecture, output, dtype, exact, kv_elements_per_token,
        kv_bytes_per_token (checkpoint, export), padded_v_head_dim (None: as it was), s, latent_norm_eps, engines,
        output_bytes, verified, seconds.
    Raises:
        ExportError: naming what the class cannot hold.
        OutputError: for a folder that may not be written.
    """
    begun, tell = time.perf_counter(), on_progress or ignore
    opened = _open(reference, device)
    folder, config = opened.folder, opened.config
    source = SafetensorsSource(folder)
    kind = _dtype(dtype, source)
    eps = eps or (EPS_FLOAT16 if kind == torch.float16 else EPS)
    norm_weight(s, eps)
    served = served_config(config, eps)
    place = Path(output) if output else Path(f"{folder.resolve().name}-own")
    check_free(place, force, folder)
    report = _report(reference, place, config, served, source, kind, s) | {"source": str(folder.resolve())}
    if dry_run:
        return report
    tell(Progress("donor", 0, 1, reference))
    expected = same_outputs.expect(opened.model(), opened.tokenizer(), seed, tell) if verify else None
    needed = _most_bytes(source, kind, served.v_head_dim / config.v_head_dim) + SLACK_BYTES
    with whole_folder(place, needed, force=force) as partial:
        report["output_bytes"] = _write(partial, source, config, served, kind, s, tell)
        _write_rest(partial, folder, served, kind, place.name, report)
        if expected is not None:
            tell(Progress("verify", 0, 1))
            elements = report["kv_elements_per_token"]
            exact = report["exact"] or kind == torch.float32
            report["verified"] = same_outputs.prove(
                partial, expected, partial / "probe.tmp", exact=exact, elements_per_token=elements
            )
        write_record(partial, report, read_record(folder).get("donor") or {})
    tell(Progress("done", 1, 1, str(place)))
    return report | {"seconds": time.perf_counter() - begun}


def _open(reference: str, device: str | None) -> open_model.OpenModel:
    """The MLA checkpoint `reference`. Raises ExportError for anything else."""
    opened = open_model.open_model(reference, device=device)
    if opened.donor is not None or not hasattr(opened.config, "rope_in_latent"):
        raise ExportError(
            f"{reference} is no MLA checkpoint; own holds what --to mla --profile portable makes"
        )
    return opened


def _most_bytes(source: SafetensorsSource, dtype: torch.dtype, growth: float) -> int:
    """The bytes of all tensors in `dtype` if each were `growth` times as large."""
    elements = sum(source.nbytes(name) // source.dtype(name).itemsize for name in source.names())
    return int(elements * dtype.itemsize * growth)


def _dtype(wanted: str | None, source: SafetensorsSource) -> torch.dtype:
    """The dtype to write. Raises ExportError for an unknown name."""
    if wanted is None:
        return source.dtype("model.embed_tokens.weight")
    return torch_dtype(wanted, ExportError)


def _report(
    reference: str,
    place: Path,
    config: Any,
    served: Any,
    source: SafetensorsSource,
    dtype: torch.dtype,
    s: float,
) -> dict[str, Any]:
    elements = config.num_hidden_layers * (served.kv_lora_rank + served.qk_rope_head_dim)
    stored = source.dtype("model.embed_tokens.weight")
    sizes = engine_support.Sizes(
        served.kv_lora_rank, served.qk_nope_head_dim, served.qk_rope_head_dim, served.v_head_dim
    )
    return {
        "checkpoint": reference,
        "method": "mla",
        "to": "own",
        "architecture": model_class(served).__name__,
        "output": str(place),
        "dtype": str(dtype).removeprefix("torch."),
        "exact": dtype == stored,
        "kv_elements_per_token": elements,
        "kv_bytes_per_token": {"checkpoint": elements * stored.itemsize, "export": elements * dtype.itemsize},
        "padded_v_head_dim": served.v_head_dim if served.v_head_dim != config.v_head_dim else None,
        "s": s,
        "latent_norm_eps": served.latent_norm_eps,
        "engines": [list(row) for row in engine_support.engines("own", sizes)],
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
        for name, tensor in served_tensors(own, shape, s=s, eps=served.latent_norm_eps).items():
            writer.add(prefix + name, tensor)
        tell(Progress("write", index + 1, layers))
    return writer.finish()


def _write_rest(
    partial: Path, folder: Path, served: Any, dtype: torch.dtype, name: str, report: dict[str, Any]
) -> None:
    """Write configuration, code, tokenizer, licence and card.

    Args:
        partial: the folder to write into.
        folder: of the checkpoint.
    """
    model = model_class(served)
    carry_files(folder, partial)
    provenance.write_model_config(partial, served, model, dtype)
    donor = read_record(folder).get("donor") or {}
    about = (
        f"{donor.get('hub_id') or 'A pretrained model'} with latent attention, converted by mhconvert and exported as "
        f"`{report['architecture']}`, whose code is in this folder: a cache of "
        f"{report['kv_elements_per_token']:,} elements a token. Load it with `trust_remote_code=True`; "
        "mhconvert need not be installed."
    )
    write_card(partial, name, about, report, donor, "small cache")
