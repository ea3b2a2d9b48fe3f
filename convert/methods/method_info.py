"""What the rest of the package knows of a method without importing it: one declaration in the method's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

# Names of checks in methods/refusals.py that a donor's configuration has to pass.
MODEL_CHECKS = ("multimodal", "not_causal", "unknown_family", "quantised")
ATTENTION_CHECKS = (*MODEL_CHECKS, "attention_kind", "head_counts", "qk_norm_kind", "window", "rope")


@dataclass(frozen=True)
class Form:
    """A format that `mhconvert export` writes.

    name: as in `--to llama`. writer: the module whose `export_checkpoint(reference, output, …)` writes it; of the
    fields of `export.forms.Options` it gets those that are among its arguments. automatic: whether `--to auto` tries
    it. engine: the one that reads nothing else: `--to auto --for ENGINE` writes this form and no other.
    """

    name: str
    writer: str
    automatic: bool = True
    engine: str | None = None


@dataclass(frozen=True)
class MethodInfo:
    """What a method is called, what it does to a model, and what it refuses.

    name: as in `--to mla`. A converted model whose class is the method's own has a model_type of `<name>_<donor's>`.
    package: import name of the method's folder, in which are `settings.SETTINGS` and, of kind "layers",
        `method.METHOD`.
    label: as reports and cards write it.
    help: one line for the command line.
    kind: "layers": it rewrites a donor's layers; "adapter": it puts an adapter beside the donor, which peft loads.
    tag: of the model card on the Hub.
    checks: names of the checks in `methods.refusals` that a donor's configuration has to pass.
    exact: whether a setting of it computes what the donor computes.
    shrinks_cache: whether a conversion at `kv_budget` < 1 leaves a smaller KV cache.
    caches_key_scales: whether the cache also holds the numbers 1 / RMS of a donor's normed keys.
    layer_kind: what a layer may become beside one that keeps the whole text, "windowed" or "linear"; "" where there is
        no such choice. Of the methods of one kind the last stands for it in surveys of others.
    row_tokens: of a calibration row that the user asks no other length for.
    telling_row: (donor's config, settings) -> tokens of a row that shows well what the method changes, where that may
        be more than `row_tokens`.
    sizes: (label, key) of the sizes of a layer that plans show; keys are those of `Method.layer_sizes`.
    totals: keys of `Method.totals` that a report keeps.
    forms: the formats that `mhconvert export` writes of its results, in the order in which `--to auto` tries them.
    exported_from: what those formats are made from, as it ends "llama holds …".
    no_forms: why there are none, as it ends "CHECKPOINT …".
    """

    name: str
    package: str
    label: str
    help: str
    kind: Literal["layers", "adapter"]
    tag: str
    checks: tuple[str, ...] = ATTENTION_CHECKS
    exact: bool = True
    shrinks_cache: bool = False
    caches_key_scales: bool = False
    layer_kind: str = ""
    row_tokens: int = 512
    telling_row: Callable[[Any, Any], int] | None = None
    sizes: tuple[tuple[str, str], ...] = ()
    totals: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ()
    exported_from: str = ""
    no_forms: str = "has no other form: its folder is what engines load"
