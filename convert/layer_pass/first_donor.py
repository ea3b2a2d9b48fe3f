"""The donor that a chain of conversions began with, behind its last adapter: what the result is measured against."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import MhconvertError, UnsupportedError

from ..attention.rotary import layer_rotary
from ..checkpoint import chain, identity
from ..donor.donor import Donor, open_donor
from ..families.facts import layer_window
from ..methods.registry import Method
from . import cost_estimate, layer_steps
from .context import ConversionContext
from .decoder_layer import Layer

KEPT = ("vocab_size", "num_hidden_layers", "hidden_size")  # of a config by every conversion


def first_donor(donor: Donor, *, trust_remote_code: bool) -> tuple[Donor, set[Path]]:
    """The donor that the chain of `donor` began with, `donor` itself where it has none or that is not at hand, as it is
    not where another model has its place; and the folders of both, which no output may replace."""
    reference, first = chain.measured_model(donor.folder), donor
    with suppress(MhconvertError):
        found = donor if reference is None else open_donor(reference, trust_remote_code=trust_remote_code)
        if all(getattr(found.config, name) == getattr(donor.config, name) for name in KEPT):
            first = found
    return first, {donor.folder, first.folder}


def with_weights(donor: Donor, first: Donor) -> Donor:
    """`first` with its weights open; `donor` where they are not at hand, which would be found behind the last layer."""
    with suppress(MhconvertError):
        if first.source:
            return first
    return donor


def with_same_heads(donor: Donor, word: str, *, trust_remote_code: bool) -> Donor:
    """The plain model on which `protect` measures the heads that `word` means: `donor` itself, or what its chain began
    with where it has a class of ours, which keeps the query heads and their numbers.

    Raises UnsupportedError where that is not at hand, or had an adapter merged into it since.
    """
    if identity.converted_method(str(donor.folder)) is None:
        return donor
    first, _ = first_donor(donor, trust_remote_code=trust_remote_code)
    if first is donor:
        missing = chain.measured_model(donor.folder) or "that, with the adapter merged into it,"
        raise UnsupportedError(
            f"protect {word}: heads are measured on the plain model that {donor.reference} was made from, and "
            f"{missing} is not at hand; take heads.protect.{word} of mhconvert inspect DONOR --heads --json as a FILE "
            "for protect"
        )
    return first


def notice(donor: Donor, first: Donor) -> str | None:
    """A sentence for the user where a chain cannot be compared with what it began with."""
    reference = chain.measured_model(donor.folder)
    if first is not donor or reference is None:
        return None
    return f"the chain began with {reference}, which is not at hand: all is compared with {donor.reference}"


def hidden_states(context: ConversionContext, first: Donor, ids: Tensor) -> Tensor:
    """The states behind the last layer of `first`, (N, L, D), for rows of ids (N, L); one layer is in memory."""
    hidden, rotary = first.embed(ids), first.rotary(context.device)
    for index in range(first.config.num_hidden_layers):
        turned = layer_rotary(rotary, first.config, index, ids.shape[1])
        module = first.decoder_layer(index, context.device)
        window = layer_window(first.config, index)
        layer = Layer(module, first.family.attention_norm, turned, index, window)
        with torch.inference_mode():
            layer.complete(hidden, layer.attend(layer.attention, layer.attention_inputs(hidden)))
    return hidden


def named(report: dict[str, Any], context: ConversionContext, method: Method) -> dict[str, Any]:
    """The report with the steps before this one, and with the first donor in place of the last step's."""
    donor, first, width = context.donor, context.first, context.dtype.itemsize
    earlier = chain.steps(donor.folder)
    if not earlier:
        return report
    texts = (report["notice"], notice(donor, first))
    report = report | {"chain": earlier, "notice": "; ".join(filter(None, texts)) or None}
    if first is donor:
        return report
    elements = cost_estimate.donor_elements(first.config, layer_steps.stated_context(method, donor))
    return report | {
        "donor": first.reference,
        "donor_name": first.name,
        "hub_id": first.hub_id,
        "licence": first.licence,
        "kv_bytes_per_token": report["kv_bytes_per_token"] | {"donor": elements * width},
        "parameters": report["parameters"] | {"donor": cost_estimate.parameters(first)},
    }


def teacher(context: ConversionContext, own: Tensor) -> Tensor:
    """States behind the last layer on the held-out rows: `own`, those of the step's donor, where that is the first."""
    first = context.first
    return own if first is context.donor else hidden_states(context, first, context.rows.held_out)
