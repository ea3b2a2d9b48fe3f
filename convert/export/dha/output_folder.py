"""Writes an export of a DHA checkpoint, with one layer in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.progress import Listener, Progress

from ... import open_model
from ...donor.carried_files import carry_files
from ...storage.atomic_files import write_json
from ...storage.byte_size import DEFAULT_SHARD_SIZE, SLACK_BYTES, byte_size
from ...storage.output_folder import check_free
from ...storage.shard_writer import ShardWriter
from ...storage.whole_folder import whole_folder
from .. import same_outputs
from ..written_export import write_card, write_record
from .head_groups import GroupPlan, cached_heads, regrouped
from .source_checkpoint import DHACheckpoint

LAYERS = "model.layers."
ATTENTION = "self_attn."
INPUTS = ("q_proj", "k_proj", "v_proj")
OUTPUT_BIAS = "o_proj.bias"

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Target:
    """What an export will be.

    Attributes:
        to: the form.
        architecture: the class's name in config.json.
        values: the content of config.json.
        plans: for each layer, its heads as grouped queries.
        biased: which of q_proj, k_proj, v_proj and o_proj have biases.
        width: intermediate_size to which the MLP is padded with zeros; None: as it is.
        code: Python files that are copied into the folder.
        facts: further entries of the report.
        note: how to load it, for the card.
    """

    to: str
    architecture: str
    values: dict[str, Any]
    plans: list[GroupPlan]
    biased: tuple[str, ...]
    width: int | None = None
    code: tuple[Path, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def tensors(checkpoint: DHACheckpoint, target: Target, read: Read) -> Iterator[dict[str, Tensor]]:
    """The tensors of the export by name: first those outside the layers, then layer by layer."""
    names = checkpoint.source.names()
    yield {name: read(name) for name in names if not name.startswith(LAYERS)}
    for index, plan in enumerate(target.plans):
        prefix = f"{LAYERS}{index}."
        layer = {name.removeprefix(prefix): read(name) for name in names if name.startswith(prefix)}
        attention = {n.removeprefix(ATTENTION): layer.pop(n) for n in list(layer) if n.startswith(ATTENTION)}
        attention = _with_biases(regrouped(attention, plan, checkpoint.head_dim), target.biased)
        if target.width is not None:
            layer = {name: _padded(name, tensor, target.width) for name, tensor in layer.items()}
        layer |= {ATTENTION + name: tensor for name, tensor in attention.items()}
        yield {prefix + name: tensor for name, tensor in layer.items()}


def _with_biases(attention: dict[str, Tensor], biased: tuple[str, ...]) -> dict[str, Tensor]:
    """`attention` with the biases that `biased` asks for, new ones zero, and without an unused o_proj bias."""
    for projection in (*INPUTS, "o_proj"):
        weight, name = attention[f"{projection}.weight"], f"{projection}.bias"
        if projection in biased:
            attention.setdefault(name, weight.new_zeros(len(weight)))
        elif name == OUTPUT_BIAS:
            attention.pop(name, None)
    return attention


def _padded(name: str, tensor: Tensor, width: int) -> Tensor:
    """An MLP tensor padded with zeros to `width` hidden units, which compute silu(0) · 0 = 0."""
    if name in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.bias"):
        return torch.cat([tensor, tensor.new_zeros(width - len(tensor), *tensor.shape[1:])])
    if name == "mlp.down_proj.weight":
        return torch.cat([tensor, tensor.new_zeros(len(tensor), width - tensor.shape[1])], dim=1)
    return tensor


def shapes(checkpoint: DHACheckpoint, target: Target) -> dict[str, Tensor]:
    """The tensors of the export by name, on the meta device: no weight is read."""
    source = checkpoint.source

    def on_meta(name: str) -> Tensor:
        return torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")

    return {name: t for part in tensors(checkpoint, target, on_meta) for name, t in part.items()}


def _planned(
    checkpoint: DHACheckpoint, target: Target, output: str | None, force: bool
) -> tuple[Path, dict[str, Any], int]:
    """Where the export goes, its report, and the number of its tensors; OutputError where it may not go there."""
    place = Path(output) if output else Path(f"{checkpoint.folder.resolve().name}-{target.to}")
    check_free(place, force, checkpoint.folder)
    coming = shapes(checkpoint, target)
    report = _report(checkpoint, target, place) | target.facts
    report["output_bytes"] = sum(t.numel() * t.element_size() for t in coming.values())
    return place, report, len(coming)


def write(
    checkpoint: DHACheckpoint,
    target: Target,
    output: str | None,
    force: bool,
    verify: bool,
    tell: Listener,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the export, which appears when it is complete and, with `verify`, compared; returns its report.

    A dry run returns the report alone. Raises OutputError where the folder exists or the disk is too small.
    """
    place, report, count = _planned(checkpoint, target, output, force)
    if dry_run:
        return report
    expected = _expected(checkpoint, tell) if verify else None
    with whole_folder(place, report["output_bytes"] + SLACK_BYTES, force=force) as folder:
        writer = ShardWriter(folder, byte_size(DEFAULT_SHARD_SIZE), count)
        for done, part in enumerate(tensors(checkpoint, target, checkpoint.source.read)):
            for name, tensor in part.items():
                writer.add(name, tensor)
            tell(Progress("export", done, len(target.plans)))
        writer.finish()
        write_json(folder / "config.json", target.values)
        for file in target.code:
            shutil.copyfile(file, folder / file.name)
        carry_files(checkpoint.folder, folder, code=checkpoint.trusted)
        about = _about(checkpoint, report, target.note)
        write_card(folder, place.name, about, report, checkpoint.donor, "loads it")
        if expected is not None:
            tell(Progress("verify", 0, 1))
            elements = report["kv_bytes_per_token"]["export"] / checkpoint.dtype.itemsize
            report["verified"] = same_outputs.prove(
                folder,
                expected,
                folder / "probe.tmp",
                exact=True,
                elements_per_token=elements,
                trusted=checkpoint.trusted,
            )
        kept = {
            name: checkpoint.record[name]
            for name in ("recipe", "layers", "healed")
            if name in checkpoint.record
        }
        write_record(folder, report, checkpoint.donor, **kept)
    tell(Progress("done", 1, 1, str(place)))
    return report


def _expected(checkpoint: DHACheckpoint, tell: Listener) -> same_outputs.Expected:
    """What the checkpoint computes."""
    opened = open_model.open_model(str(checkpoint.folder), trust_remote_code=checkpoint.trusted)
    return same_outputs.expect(opened.model(), opened.tokenizer(), 0, tell)


def _report(checkpoint: DHACheckpoint, target: Target, place: Path) -> dict[str, Any]:
    """What is known of the export before it is written to `place`."""
    heads = [plan.groups for plan in target.plans]
    return {
        "checkpoint": checkpoint.reference,
        "source": str(checkpoint.folder.resolve()),
        "method": "dha",
        "to": target.to,
        "output": str(place),
        "architecture": target.architecture,
        "heads_by_layer": heads,
        "duplicated_heads": sum(plan.duplicated for plan in target.plans),
        "kv_bytes_per_token": {
            "checkpoint": cached_heads(checkpoint.maps) * checkpoint.head_bytes,
            "export": 2 * sum(heads) * checkpoint.head_bytes,
        },
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "biases": list(target.biased),
        "exact": True,
    }


def _about(checkpoint: DHACheckpoint, report: dict[str, Any], note: str) -> str:
    """The text of the export's card."""
    copies = report["duplicated_heads"]
    text = (
        f"{checkpoint.donor.get('hub_id') or 'A pretrained model'} with fewer KV heads, converted by mhconvert (DHA) "
        f"and exported as `{report['architecture']}`: it computes what its checkpoint computes. KV heads by layer: "
        f"{', '.join(map(str, report['heads_by_layer']))}; {report['kv_bytes_per_token']['export']:,} bytes of cache a "
        f"token ({report['dtype']})"
    )
    text += f", of which {copies} heads are copies that the architecture asks for.\n" if copies else ".\n"
    return text + note
