"""The model in OUT.partial: a layer's tensors, the files with which it loads, the texts that it writes, its reload."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mhconvert.errors import OutputError
from mhconvert.progress import Progress

from ..checkpoint import provenance
from ..methods.registry import Method
from ..storage.dtype_cast import cast
from . import conversion_report
from .context import ConversionContext, Writing
from .resumable_run import Workspace


def layer_tensors(
    context: ConversionContext, method: Method, index: int, attention: Any
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a converted layer: the donor's tensors that are kept, then the new attention."""
    donor, dtype = context.donor, context.dtype
    names = donor.layer_tensor_names(index)
    prefix = names[0][: names[0].index(f".{index}.") + len(f".{index}.")]
    for name in names:
        if not name.removeprefix(prefix).startswith(method.replaced):
            yield name, cast(name, donor.source.read(name), dtype)
    for name, tensor in method.stored(attention).items():
        yield f"{prefix}self_attn.{name}", tensor.to(dtype)


def write(context: ConversionContext, method: Method, space: Workspace) -> None:
    """Complete the shards with their index, and write config, code and tokenizer; the streams' memory is freed."""
    space.release_streams()
    context.donor.release()
    space.finish_tensors()
    provenance.write_config(space.partial, method, context.donor, context.dtype)


def measure_texts(context: ConversionContext, space: Workspace, writing: Writing) -> dict[str, Any]:
    """What `writing` says of the texts of the model in OUT.partial; an interrupted run goes on in them."""
    donor, tell = context.first.reference, context.on_progress
    try:
        return writing(space.partial, donor, context.recipe, kept=space.texts, on_progress=tell)
    except OutputError as error:  # no text can be kept: a full disk leaves the run for --resume
        raise error.__cause__ or error from None


def verify(context: ConversionContext, space: Workspace, report: dict[str, Any]) -> None:
    """Reload the model in a bare process if the recipe asks for it."""
    if context.recipe.verify:
        context.on_progress(Progress("verify", 0, 1))
        conversion_report.add_reload(report, space.partial, space.probe, context.recipe.trust_remote_code)
