"""Merges an adapter into its base model: a plain checkpoint, written one tensor at a time."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import AdapterError
from mhconvert.progress import Listener, Progress, ignore

from ..checkpoint import chain, provenance
from ..donor.carried_files import carry_files
from ..donor.donor import Donor
from ..donor.hub_download import TEXT_FILES
from ..donor.tokenizer_files import require_tokenizer
from ..methods.hydra.branches import merged_bias, merged_weight
from ..storage import shard_writer
from ..storage.byte_size import DEFAULT_SHARD_SIZE, SLACK_BYTES, byte_size
from ..storage.dtype_cast import cast, torch_dtype
from ..storage.whole_folder import whole_folder
from . import card
from .saved_adapter import AdapterFolder, open_adapter, open_base, output_folder
from .shape_check import require_fit, require_vocabulary


def merge_adapter(
    reference: str,
    output: str | None = None,
    *,
    base: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    force: bool = False,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the base model with an adapter in its weights; arguments, result and errors as of `api.merge`."""
    begun, tell = time.perf_counter(), on_progress or ignore
    adapter = open_adapter(reference, base)
    limit = byte_size(max_shard_size)
    donor = open_base(adapter, tell, trust_remote_code=trust_remote_code)
    asked = _dtype(dtype)
    place = output_folder(output, "merged", adapter, donor, force)
    require_vocabulary(adapter, donor)
    _require_untied(adapter, donor)
    require_fit(adapter, donor)
    donor.check_files(tokenizer=True)
    require_tokenizer(adapter.folder)
    donor.open_weights(tell)
    source, names = donor.source.stored, donor.published_names()
    _require_published(adapter, donor, names)
    dtypes = {stored: asked or source.dtype(stored) for stored in names}
    report: dict[str, Any] = {
        "adapter": reference,
        "base": adapter.base,
        "method": adapter.method,
        "output": str(place),
        "dtype": str(asked or donor.dtype).removeprefix("torch."),
        "modules": sorted(adapter.modules),
        "replaced": sorted(adapter.replaced),
        "output_bytes": sum(
            source.nbytes(stored) // source.dtype(stored).itemsize * dtype.itemsize
            for stored, dtype in dtypes.items()
        ),
    }
    with whole_folder(place, report["output_bytes"] + SLACK_BYTES, force=force) as folder:
        writer = shard_writer.ShardWriter(folder, limit, len(names))
        for done, (name, tensor) in enumerate(_tensors(adapter, donor, names, dtypes), 1):
            writer.add(name, cast(name, tensor, dtypes[name]))
            tell(Progress("merge", done, len(names)))
        writer.finish()
        _write_rest(folder, adapter, donor, asked or donor.dtype, report, trust_remote_code)
    tell(Progress("done", 1, 1, str(place)))
    return report | {"seconds": time.perf_counter() - begun}


def _tensors(
    adapter: AdapterFolder, donor: Donor, names: dict[str, str], dtypes: dict[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the base model as it is published, those that the adapter changes with their change.

    A changed tensor is rounded to its stored dtype, or to the one that it is written in where that is wider.

    names: published name -> transformers'.
    """
    for stored, name in names.items():
        tensor = (
            adapter.read(adapter.replaced[name])
            if name in adapter.replaced
            else donor.source.stored.read(stored)
        )
        module, _, kind = name.rpartition(".")
        if module in adapter.modules and kind in ("weight", "bias"):
            own = tensor.to(torch.promote_types(tensor.dtype, dtypes[stored]))
            change = merged_weight if kind == "weight" else merged_bias
            tensor = change(own, [adapter.branches(module)])
            added = adapter.added_bias(module) if kind == "bias" else None
            tensor = tensor if added is None else (tensor + added).to(own.dtype)
            if not torch.isfinite(tensor).all():
                narrow = ", or float16 is too narrow: --dtype bfloat16" if own.dtype == torch.float16 else ""
                raise AdapterError(
                    f"{adapter.file}: merging it makes {name} infinite; the adapter has diverged{narrow}"
                )
        yield stored, tensor


def _require_untied(adapter: AdapterFolder, donor: Donor) -> None:
    """Raises AdapterError where the adapter holds one of head and embedding, and the base model ties them."""
    embedding = f"{donor.family.base}.{donor.family.embedding}.weight"
    for name in ("lm_head.weight", embedding):
        if donor.config.tie_word_embeddings and name in adapter.replaced:
            raise AdapterError(
                f"{adapter.file} holds {name} of its own, and in {donor.reference} head and embedding are one tensor; "
                "merge it in Python, where peft unties them: PeftModel.merge_and_unload"
            )


def _require_published(adapter: AdapterFolder, donor: Donor, names: dict[str, str]) -> None:
    """Raises AdapterError for a changed tensor that the base model stores in several, as `names` has them."""
    parts = Counter(names.values())
    for name in sorted({f"{module}.weight" for module in adapter.modules} | set(adapter.replaced)):
        if parts[name] != 1:
            raise AdapterError(
                f"{adapter.file} changes {name}, which {donor.reference} stores in {parts[name]} tensors, as mixtures "
                "of experts do; merge it in Python: PeftModel.merge_and_unload"
            )


def _dtype(wanted: str | None) -> torch.dtype | None:
    """The dtype to write, by its name; None: each tensor's own."""
    return None if wanted is None else torch_dtype(wanted)


def _write_rest(
    folder: Path,
    adapter: AdapterFolder,
    donor: Donor,
    dtype: torch.dtype,
    report: dict[str, Any],
    code: bool,
) -> None:
    """Write configuration, tokenizer (the adapter's, where it has one; `code`: with its code), card and provenance."""
    donor.copy_files(folder)
    carry_files(adapter.folder, folder, *TEXT_FILES, code=code)
    provenance.write_model_config(folder, copy.deepcopy(donor.config), type(donor.skeleton()), dtype)
    card.write(folder, Path(report["output"]).name, donor, card.about_merged(report), library="transformers")
    kept = {"chain": chain.steps(donor.folder), "cache_context": provenance.recorded_context(donor.folder)}
    provenance.record(folder, donor, merged=report, **{name: value for name, value in kept.items() if value})
