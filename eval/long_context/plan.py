"""How a model is to read texts longer than it was trained on, and which models can be read so. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from mhconvert.errors import MhconvertError, UnsupportedError

from ...convert.families.facts import FAMILIES, Family, layer_window, rope_settings
from ...convert.methods.refusals import FIXED_ROPE_TYPES
from ...convert.open_model import OpenModel
from ...convert.storage.safetensors_reader import read_json
from ..settings import OWN_CACHE, LongContextKind
from .chunks import ALWAYS

READERS = ("longheads", "window")  # what reads part of the keys; the others scale RoPE
KEYS_AND_VALUES = ("dha", "moh")  # methods whose checkpoints cache those
OTHER_CACHES = {  # methods whose checkpoints cache something else
    "swa": "its windowed layers keep the first tokens and a window alone",
    "hybrid": "its linear layers keep a state instead of keys, and the others cache codes",
}
LARGEST_CHUNK, CHUNKS = 256, 16  # the paper's size, and its number for a trained length of 4,096


class Asked(Protocol):
    """The fields of `EvalSettings` that say how longer texts are read."""

    @property
    def long_context(self) -> LongContextKind | None: ...
    @property
    def chunk_size(self) -> int | None: ...
    @property
    def chunks(self) -> int | None: ...
    @property
    def kv_cache_dtype(self) -> str: ...


@dataclass(frozen=True)
class LongContext:
    """How one model reads longer texts.

    Attributes:
        kind: longheads, yarn, dynamic or window.
        trained: tokens that the model was trained on.
        factor: how many times as long the longest text is, at least 1.
        chunk_size, chunks: of longheads.
        family: where the model's modules are.
    """

    kind: str
    trained: int
    factor: float
    chunk_size: int
    chunks: int
    family: Family

    def key(self) -> dict[str, Any]:
        """What results depend on."""
        sizes = {"longheads": (self.chunk_size, self.chunks), "yarn": (self.factor,)}
        return {"long_context": [self.kind, self.trained, *sizes.get(self.kind, ())]}


def plan(opened: OpenModel, asked: Asked, longest: int) -> LongContext | None:
    """How `opened` reads texts of `longest` tokens.

    None where no long_context is asked for. Raises MhconvertError where the model or the sizes do not allow it.
    """
    kind = asked.long_context
    if kind != "longheads" and (asked.chunk_size or asked.chunks):
        raise MhconvertError(
            "--chunk-size and --chunks are of --long-context longheads: give that too, or leave them out"
        )
    if kind is None:
        return None
    config = opened.config.get_text_config()
    trained = _trained_length(opened, config, kind)
    family = _family(opened, kind)
    _require_rope(opened.reference, config, kind)
    if kind in READERS:
        _require_readable(opened.reference, config, family, kind)
        if asked.kv_cache_dtype != OWN_CACHE:
            raise MhconvertError(
                f"--long-context {kind} reads the keys of the model's own cache, not those of --kv-cache-dtype "
                f"{asked.kv_cache_dtype}; leave one of them out"
            )
    size = asked.chunk_size or max(1, min(LARGEST_CHUNK, trained // CHUNKS))
    number = asked.chunks or trained // size
    if number < ALWAYS or number * size > trained:
        raise MhconvertError(
            f"{number} chunks of {size} tokens: {opened.reference} was trained on {trained} tokens, which is the most "
            f"that they may be together, and {ALWAYS} chunks (the first one and the last two) are always read; "
            f"choose --chunk-size ≤ {trained // ALWAYS}, and --chunks from {ALWAYS} to {max(ALWAYS, trained // size)}"
        )
    return LongContext(kind, trained, max(1.0, longest / trained), size, number, family)


def _trained_length(opened: OpenModel, config: Any, kind: str) -> int:
    """The config's max_position_embeddings. Raises MhconvertError where only the class's default would answer."""
    folder = opened.donor.folder if opened.donor is not None else opened.folder
    file = folder / "config.json" if folder is not None else None
    trained = getattr(config, "max_position_embeddings", None)
    if not trained or (
        file is not None and file.is_file() and "max_position_embeddings" not in read_json(file)
    ):
        raise MhconvertError(
            f"the config of {opened.reference} does not say how long the texts of its training were "
            f"(max_position_embeddings), which --long-context {kind} starts from; add it to config.json"
        )
    return int(trained)


def _family(opened: OpenModel, kind: str) -> Family:
    """The family whose modules the model has. Raises UnsupportedError for an adapter, or a class that has others."""
    model_type = str(opened.config.get_text_config().model_type)
    method, _, donor = model_type.partition("_")
    family = FAMILIES.get(donor if method in KEYS_AND_VALUES else model_type)
    if opened.adapter is not None:
        raise UnsupportedError(
            f"--long-context {kind} reads whole models, and {opened.reference} is an adapter; mhconvert merge makes one"
        )
    if family is None or family.refused is not None:
        other = OTHER_CACHES.get(method, "its cache or its RoPE is not that of a Llama")
        reason = family.refused if family else other
        raise UnsupportedError(
            f"--long-context {kind} cannot read {opened.reference} of model type '{model_type}': {reason}; it reads "
            f"unconverted models of the known families, and conversions by {' and '.join(KEYS_AND_VALUES)}"
        )
    return family


def _require_rope(reference: str, config: Any, kind: str) -> None:
    """Raises UnsupportedError where RoPE cannot be moved (longheads, window) or is scaled already (the others)."""
    ropes = rope_settings(config)
    allowed = FIXED_ROPE_TYPES if kind in READERS else ("default",)
    names = [str(rope.get("rope_type", "default")) for rope in ropes]
    if len(ropes) > 1 or names[0] not in allowed:
        found = f"RoPE of type '{names[0]}'" if len(ropes) == 1 else "a RoPE for each type of layer"
        raise UnsupportedError(
            f"--long-context {kind} takes one RoPE of type {' or '.join(allowed)}, and {reference} has {found}"
        )


def _require_readable(reference: str, config: Any, family: Family, kind: str) -> None:
    """Raises UnsupportedError for layers with windows of their own, and for a softcap of the scores."""
    for index in range(config.num_hidden_layers):
        if family.window and (window := layer_window(config, index)):
            raise UnsupportedError(
                f"--long-context {kind} needs layers that see all tokens, and layer {index} of {reference} sees a "
                f"window of {window}"
            )
    if family.softcap and getattr(config, family.softcap):
        raise UnsupportedError(
            f"--long-context {kind} computes no softcap, and {reference} has one ({family.softcap})"
        )
