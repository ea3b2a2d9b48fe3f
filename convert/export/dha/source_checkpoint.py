"""Reads a DHA checkpoint, with the configuration of its donor's own class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from mhconvert.errors import CheckpointError, ExportError

from ... import open_model
from ...checkpoint import identity
from ...checkpoint.provenance import read_record, recorded_donor
from ...families.facts import attention_facts, class_free_values
from ...methods.dha.configuration_dha import DecoupledHeadFields
from ...storage.safetensors_reader import SafetensorsSource
from .head_groups import HeadMaps

OUTPUT_BIAS = "self_attn.o_proj.bias"


@dataclass(frozen=True)
class DHACheckpoint:
    """A checkpoint that DHA made.

    Attributes:
        reference: what the user wrote.
        folder: of the checkpoint.
        config: of the checkpoint.
        donor_config: of the donor's own class.
        stock: whether the checkpoint is of that class already.
        record: its mhconvert.json.
        trusted: whether code in the folder may run, and comes along.
    """

    reference: str
    folder: Path
    config: Any
    donor_config: Any
    stock: bool
    record: dict[str, Any]
    trusted: bool = False

    @cached_property
    def source(self) -> SafetensorsSource:
        """The stored weights. Raises CheckpointError where they are incomplete."""
        return SafetensorsSource(self.folder)

    @cached_property
    def maps(self) -> list[HeadMaps]:
        """For each layer, the K head and the V head that each query head reads.

        Raises CheckpointError where the configuration does not say it."""
        layers = range(self.config.num_hidden_layers)
        if not self.stock:
            try:
                return [self.config.head_maps(index) for index in layers]
            except ValueError as error:
                raise CheckpointError(
                    f"{self.folder / 'config.json'} has no whole plan of heads: {error}"
                ) from None
        own = attention_facts(self.config).head_map
        return [(own, own) for _ in layers]

    @cached_property
    def output_bias(self) -> str | None:
        """The name of the first o_proj bias that is not all zeros; None where there is none."""
        names = (name for name in self.source.names() if name.endswith(OUTPUT_BIAS))
        return next((name for name in names if self.source.read(name).any()), None)

    @property
    def head_dim(self) -> int:
        return attention_facts(self.donor_config).head_dim

    @property
    def head_bytes(self) -> int:
        """Bytes of one cached head, per token."""
        return self.head_dim * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which a cache has too."""
        return self.source.dtype(self.source.names()[0])

    @property
    def donor(self) -> dict[str, Any]:
        """The donor's reference, hub_id and licence, from mhconvert.json."""
        return recorded_donor(self.folder)


def open_dha(reference: str, to: str, trusted: bool = False) -> DHACheckpoint:
    """The checkpoint `reference`: a folder, or org/name[@revision] on the Hub. Reads no weights yet.

    Raises:
        ExportError: for a checkpoint that DHA did not make, or an export.
        CheckpointError: for one that cannot be read.
    """
    folder = open_model.checkpoint_folder(reference) or Path(reference).expanduser()
    method = identity.made_by(str(folder))
    if method != "dha":
        origin = f"was made by {method}" if method else "is no checkpoint that mhconvert converted"
        raise ExportError(f"{reference} {origin}; {to} takes what 'mhconvert DONOR --to dha' makes")
    stock = identity.converted_method(str(folder)) is None
    record = read_record(folder)
    if "exported" in record:
        raise ExportError(f"{reference} is an export itself; export the checkpoint that it was made of")
    config = open_model.read_config(str(folder), "dha")
    donor_config = config if stock else _donor_config(config)
    recorded_donor(folder)  # whose errors come before the work
    checkpoint = DHACheckpoint(reference, folder, config, donor_config, stock, record, trusted)
    _require_plain_scores(checkpoint)
    return checkpoint


def _donor_config(config: Any) -> Any:
    """The donor's configuration: the checkpoint's without the fields of decoupled heads."""
    kind = getattr(transformers, type(config).__name__.removeprefix("DHA"))
    added = {field.name for field in dataclasses.fields(DecoupledHeadFields)}
    return kind(**{name: value for name, value in class_free_values(config).items() if name not in added})


def _require_plain_scores(checkpoint: DHACheckpoint) -> None:
    """Raises ExportError where scale or softcap of the scores is not what the donor's configuration implies."""
    if checkpoint.stock:
        return
    config, facts = checkpoint.config, attention_facts(checkpoint.donor_config)
    scale = config.softmax_scale or facts.head_dim**-0.5
    if scale != facts.scale or config.attention_softcap != facts.softcap:
        raise ExportError(
            f"{checkpoint.reference} scales scores by {scale:g} and caps them at {config.attention_softcap}, and the "
            f"configuration of a {checkpoint.donor_config.model_type} model says {facts.scale:g} and {facts.softcap}"
        )
