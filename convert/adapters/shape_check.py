"""Checks that a saved adapter is complete by its configuration and fits the shapes of its base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

from mhconvert.errors import AdapterError

from ..donor.donor import Donor
from ..donor.tensor_layout import LM_HEAD, STORED_DTYPES
from ..storage.folder_kind import ADAPTER_CONFIG
from .lora_rules import lora_rank
from .pattern_time import require_quick
from .saved_adapter import LORA_BIAS, LORA_PAIR, PAIRS, PREFIX, AdapterFolder

Shapes = Mapping[str, tuple[int, ...]]


def require_fit(adapter: AdapterFolder, donor: Donor) -> None:
    """Raises AdapterError naming the tensor that is missing, misshapen, or without a place in `donor`.

    It is also raised for an expression that does not match in time; see `require_quick`.
    """
    require_vocabulary(adapter, donor)
    modules = [name for name, _ in donor.layout.model.named_modules()]
    require_quick(adapter.config, adapter.folder, [*modules, *adapter.modules, *adapter.replaced])
    shapes = donor.shapes()
    for key, stored in adapter.stored.items():
        if stored.dtype not in STORED_DTYPES:
            kind = str(stored.dtype).removeprefix("torch.")
            raise AdapterError(f"tensor {key} in {adapter.file} is stored as {kind}; save it as float32")
    for name, key in adapter.replaced.items():
        _require_place(adapter, key, name, shapes)
        _require_shape(adapter, key, name, shapes[name], shapes)
    for module in adapter.modules:
        if len(shapes.get(f"{module}.weight", ())) != 2:
            tied = " (its head is tied to the embedding)" if module == "lm_head" else ""
            raise AdapterError(
                f"{adapter.file} adapts {module}, which {donor.reference} does not have as a linear layer{tied}"
            )
    for module in dict.fromkeys((*adapter.modules, *_targeted(adapter.config, shapes))):
        _require_matrices(adapter, module, shapes)


def require_vocabulary(adapter: AdapterFolder, donor: Donor) -> None:
    """Raises AdapterError for an embedding or a head of more tokens than `donor` has."""
    for name in (donor.layout.embedding, LM_HEAD):
        rows = adapter.stored[adapter.replaced[name]].shape[0] if name in adapter.replaced else 0
        if rows > donor.config.vocab_size:
            raise AdapterError(
                f"{adapter.file} holds {name} with {rows} tokens, and {adapter.base} has {donor.config.vocab_size}: "
                "tokens were added for the adapter. Name a base that has them with --base, or merge in Python: "
                f"base.resize_token_embeddings({rows}), then PeftModel.from_pretrained and merge_and_unload"
            )


def _targeted(config: Any, shapes: Shapes) -> list[str]:
    """The modules that an adapter's target_modules match."""
    if config.target_modules is None:
        return []
    matrices = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    return [module for module in matrices if check_target_module_exists(config, module)]


def _require_matrices(adapter: AdapterFolder, module: str, shapes: Shapes) -> None:
    """Raises AdapterError where a matrix of `module` is missing, of another rank than configured, or does not fit."""
    weight, parts = f"{module}.weight", adapter.modules.get(module, {})
    out, into = shapes[weight]
    for (down, up), rank, wide in _branches(adapter, module, out, into):
        for part, expected, along in ((down, (rank, wide), 0), (up, (out, rank), 1)):
            if part not in parts:
                if rank:
                    raise AdapterError(
                        f"tensor {PREFIX}{module}.{part} is missing from {adapter.file}, and the {ADAPTER_CONFIG} "
                        "beside it asks for it; save the adapter again"
                    )
                continue
            stored_shape = adapter.stored[parts[part]].shape
            if (
                len(stored_shape) == 2
                and stored_shape[1 - along] == expected[1 - along]
                and stored_shape[along] != rank
            ):
                raise AdapterError(
                    f"tensor {parts[part]} in {adapter.file} is of rank {stored_shape[along]}, and the "
                    f"{ADAPTER_CONFIG} beside it says {rank}; save the adapter again"
                )
            _require_shape(adapter, parts[part], weight, expected, shapes)
    if LORA_BIAS in parts:
        _require_place(adapter, parts[LORA_BIAS], f"{module}.bias", shapes)
        _require_shape(adapter, parts[LORA_BIAS], f"{module}.bias", (out,), shapes)


def _branches(
    adapter: AdapterFolder, module: str, out: int, into: int
) -> list[tuple[tuple[str, str], int, int]]:
    """For each pair of matrices that `module` may have: the names of both, the configured rank, and the input width."""
    if adapter.method == "lora":
        return [(LORA_PAIR, lora_rank(adapter.config, module), into)]
    r_par, r_seq = adapter.config.ranks(module)
    return [(PAIRS["par"], r_par, into), (PAIRS["seq"], r_seq, out)]


def _require_place(adapter: AdapterFolder, key: str, name: str, shapes: Shapes) -> None:
    """Raises AdapterError where the base model has no tensor `name`."""
    if name not in shapes:
        raise AdapterError(
            f"tensor {key} in {adapter.file} has no place in {adapter.base}, which has no {name}"
        )


def _require_shape(
    adapter: AdapterFolder, key: str, name: str, expected: tuple[int, ...], shapes: Shapes
) -> None:
    """Raises AdapterError where the stored tensor `key` is not of shape `expected`."""
    stored_shape = adapter.stored[key].shape
    if stored_shape != expected:
        raise AdapterError(
            f"tensor {key} in {adapter.file} has shape {list(stored_shape)}, and {name} of {adapter.base} is "
            f"{list(shapes[name])}: the adapter was trained on a model of another shape; name that one with --base"
        )
