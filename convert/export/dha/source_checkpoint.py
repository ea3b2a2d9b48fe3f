"""A DHA checkpoint, only read, and what its donor's own class says of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from mhconvert.errors import ExportError

from ... import open_model
from ...checkpoint import identity, provenance
from ...families.facts import attention_facts, class_free_values
from ...methods.dha.configuration_dha import DecoupledHeadFields
from ...storage.safetensors_reader import SafetensorsSource
from .head_groups import HeadMaps

OUTPUT_BIAS = "self_attn.o_proj.bias"


@dataclass(frozen=True)
class DHACheckpoint:
    """reference: what the user wrote. config: of the checkpoint. donor_config: the donor's, as its own class has it;
    stock: whether the checkpoint is of that class already. record: its mhconvert.json."""

    reference: str
    folder: Path
    config: Any
    donor_config: Any
    stock: bool
    record: dict[str, Any]

    @cached_property
    def source(self) -> SafetensorsSource:
        """The weights. Raises CheckpointError where they are incomplete."""
        return SafetensorsSource(self.folder)

    @cached_property
    def maps(self) -> list[HeadMaps]:
        """Of each layer the K head and the V head that each query head reads."""
        layers = range(self.config.num_hidden_layers)
        if not self.stock:
            return [self.config.head_maps(index) for index in layers]
        facts = attention_facts(self.config)
        own = [head * facts.kv_heads // facts.heads for head in range(facts.heads)]
        return [(own, own) for _ in layers]

    @cached_property
    def output_bias(self) -> str | None:
        """The first bias of an o_proj that is not zero."""
        names = (name for name in self.source.names() if name.endswith(OUTPUT_BIAS))
        return next((name for name in names if self.source.read(name).any()), None)

    @property
    def head_dim(self) -> int:
        return attention_facts(self.donor_config).head_dim

    @property
    def head_bytes(self) -> int:
        """Of one cached head, one token."""
        return self.head_dim * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of a cache."""
        return self.source.dtype(self.source.names()[0])

    @property
    def donor(self) -> dict[str, Any]:
        """What mhconvert.json says of the donor: reference, hub_id, licence."""
        return dict(self.record.get("donor") or {})


def open_dha(reference: str, to: str) -> DHACheckpoint:
    """The checkpoint `reference`: a folder, or org/name[@revision] on the Hub. Weights wait for `source`.

    Raises ExportError where it is none that DHA made, CheckpointError where it cannot be read.
    """
    folder = open_model.checkpoint_folder(reference) or Path(reference).expanduser()
    method = identity.made_by(str(folder))
    if method != "dha":
        found = f"was made by {method}" if method else "is no checkpoint that mhconvert converted"
        raise ExportError(f"{reference} {found}; {to} takes what 'mhconvert DONOR --to dha' makes")
    stock = identity.converted_method(str(folder)) is None
    record = _record(folder)
    if "exported" in record:
        raise ExportError(f"{reference} is an export itself; export the checkpoint that it was made of")
    config = open_model.read_config(str(folder), "dha")
    donor_config = config if stock else _donor_config(config)
    checkpoint = DHACheckpoint(reference, folder, config, donor_config, stock, record)
    _require_plain_scores(checkpoint)
    return checkpoint


def _record(folder: Path) -> dict[str, Any]:
    """mhconvert.json; a checkpoint that has lost it can be exported all the same."""
    try:
        found = json.loads((folder / provenance.PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _donor_config(config: Any) -> Any:
    kind = getattr(transformers, type(config).__name__.removeprefix("DHA"))
    added = {field.name for field in dataclasses.fields(DecoupledHeadFields)}
    return kind(**{name: value for name, value in class_free_values(config).items() if name not in added})


def _require_plain_scores(checkpoint: DHACheckpoint) -> None:
    """What multiplies and caps scores has to follow from the donor's own configuration."""
    if checkpoint.stock:
        return
    config, facts = checkpoint.config, attention_facts(checkpoint.donor_config)
    scale = config.softmax_scale or facts.head_dim**-0.5
    if scale != facts.scale or config.attention_softcap != facts.softcap:
        raise ExportError(
            f"{checkpoint.reference} scales scores by {scale:g} and caps them at {config.attention_softcap}, and the "
            f"configuration of a {checkpoint.donor_config.model_type} model says {facts.scale:g} and {facts.softcap}"
        )
