"""Writes the result of a healing run: weights, report and record."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from mhconvert.library_versions import versions

from ..convert.bare_process import reload
from ..convert.bare_process.reload import verify
from ..convert.checkpoint import provenance
from ..convert.donor.carried_files import carry_files
from ..convert.donor.hub_download import NAMED_TEMPLATES
from ..convert.recipe.heal_settings import HealSettings
from ..convert.storage.atomic_files import write_json
from ..convert.storage.byte_size import DEFAULT_SHARD_SIZE, byte_size
from ..convert.storage.dtype_cast import cast
from ..convert.storage.linked_files import own_files
from ..convert.storage.ownership import MARK
from ..convert.storage.safetensors_reader import INDEX, SafetensorsSource, read_json
from ..convert.storage.shard_writer import ShardWriter
from ..convert.storage.step_folder import lasting_name
from . import fusion
from .packed_rows import Rows
from .resumable_run import METRICS, HealSpace

REPORT = "report.json"
PICTURES = (METRICS, "healing.svg")
REWRITTEN = (REPORT, "README.md", provenance.PROVENANCE, provenance.EVALUATION, INDEX, *PICTURES)
PROBE_ROWS, PROBE_TOKENS = 2, 512  # part of the held-out rows on which the reloaded model is compared
MEASURED = ("perplexity", "kl", "top1_agreement")
# Entries of a checkpoint's report that are not of the healed model.
OF_THE_UNHEALED = (
    *("tolerance", "on_policy", "verified", "seconds", "steps"),
    *("sample", "by_source", "warnings"),
)


def merge_adapter(model: Any) -> Any:
    """The model with an adapter that was trained on it merged into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@torch.no_grad()
def round_weights(model: Any, source: SafetensorsSource) -> None:
    """Round the weights in place to the dtypes of `source`, so that the measured model is the written one."""
    state = model.state_dict()
    for name in source.names():
        state[name].copy_(cast(name, state[name], source.dtype(name)))


def report(checkpoint: str, output: Path, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's report with the results on the held-out rows before and after healing."""
    old = _json(Path(checkpoint) / REPORT)
    kept = {name: value for name, value in old.items() if name not in OF_THE_UNHEALED}
    return (
        copy.deepcopy(kept)
        | {"output": str(output), "before": {name: before[name] for name in MEASURED}}
        | {name: after[name] for name in MEASURED}
    )


def record_heads(report: dict[str, Any], model: Any, source: SafetensorsSource) -> None:
    """Update the cache size and the number of parameters in the report, in place, after a fusion of heads."""
    width = source.dtype(next(name for name in source.names() if name.endswith("k_proj.weight"))).itemsize
    elements = fusion.cache_elements(model, report.get("cache_context"))
    report["kv_bytes_per_token"]["converted"] = elements * width
    report["parameters"]["converted"] = sum(parameter.numel() for parameter in model.parameters())


def write_checkpoint(
    space: HealSpace, model: Any, source: SafetensorsSource | None, checkpoint: str, *, code: bool
) -> None:
    """Write the model's weights and copy the checkpoint's other files, except report, card and record.

    Args:
        source: the checkpoint's tensors; None for an adapter.
        code: copy the Python files of the checkpoint too; else the package's own are written, which it was opened by.
    """
    folder, state = space.partial, model.state_dict()
    not_copied = (
        REWRITTEN if source is not None else (REPORT, provenance.PROVENANCE, provenance.EVALUATION, *PICTURES)
    )
    kinds = (".safetensors",) if code else (".safetensors", ".py")
    for file in own_files(Path(checkpoint)):
        if file.name not in (*not_copied, MARK) and file.suffix not in kinds:
            shutil.copyfile(file, folder / file.name)
    carry_files(Path(checkpoint), folder, NAMED_TEMPLATES)
    if source is not None:
        values = read_json(folder / "config.json") | fusion.config_fields(model.config)
        if not code:
            values.pop("auto_map", None)
            auto_map = provenance.write_code(folder, type(model.config), type(model))
            values |= {"auto_map": auto_map} if auto_map else {}
        write_json(folder / "config.json", values)
    for stale in folder.glob("*.safetensors"):  # of an interrupted run
        stale.unlink()
    if source is None:
        from ..convert.adapters.create import save_matrices

        save_matrices(model, folder)
        return
    recipe = provenance.read_record(Path(checkpoint), strict=True).get("recipe") or {}
    writer = ShardWriter(
        folder, byte_size(str(recipe.get("max_shard_size", DEFAULT_SHARD_SIZE))), len(source.names())
    )
    for name in source.names():
        writer.add(name, cast(name, state[name], source.dtype(name)))
    writer.finish()


def verify_reload(
    space: HealSpace, model: Any, held_out: Rows, trusted: bool, report: dict[str, Any]
) -> dict[str, Any]:
    """Reload the folder in a bare process and compare its logits with the model's.

    trusted: whether its own code may run; report: so far.

    Returns the entries "verified" and "sample" of the report.
    """
    ids = held_out.ids[:PROBE_ROWS, :PROBE_TOKENS].long()
    probe = space.work / "probe.safetensors"
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    reload.write_probe(probe, ids, logits)
    verified = verify(
        space.partial,
        probe,
        prompt=reload.PROMPT,
        threads=torch.get_num_threads(),
        trusted=trusted,
        context=report.get("cache_context"),
    )
    sample = {"prompt": verified["sample"]["prompt"], "converted": verified["sample"]["text"]}
    return {"verified": verified, "sample": sample}


def write_record(folder: Path, checkpoint: str, output: Path, settings: HealSettings) -> None:
    """Write mhconvert.json: the checkpoint's record, extended by how it was healed into `output`."""
    record = provenance.read_record(Path(checkpoint), strict=True)
    healed = {
        "checkpoint": lasting_name(checkpoint, output),
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
    }
    record["healed"] = [*record.get("healed", []), healed]
    record["sha256"] = provenance.hashes(folder)
    write_json(folder / provenance.PROVENANCE, record)


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
