"""The tensors that a donor's config requires, and the check that its checkpoint has them."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mhconvert.errors import CheckpointError, UnsupportedError

from ..families.facts import Family
from ..storage.safetensors_reader import TensorSource

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LM_HEAD = "lm_head.weight"
# Stored tensors that no output depends on: what follows from the config (rotary tables, position ids, causal masks),
# scales of a quantised KV cache, and modules that draft tokens.
UNUSED = re.compile(
    r"rotary_emb\.\w+$|(^|\.)position_ids$|\.(self_)?attn\.(masked_)?bias$"
    r"|\.(q|k|v|kv|prob)_(scale|zero_point)$|\.[kv]_proj\.output_scale$"
    r"|(^|\.)(mtp|nextn|medusa|eagle)\w*\."
)


WITH_SINKS = ("gpt_oss", "granite_swa")


def attention_implementation(config: Any) -> str:
    """The attention implementation of transformers for this model: sdpa, or eager for what sdpa does not compute."""
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap or config.model_type in WITH_SINKS else "sdpa"


def meta_model(config: Any) -> Any:
    """The causal language model of `config` on the meta device, without weights, in eval mode.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=attention_implementation(config)
            ).eval()
    except (TypeError, ArithmeticError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        raise CheckpointError(
            f"no {config.model_type} model can be built of the config of {config.name_or_path or 'the donor'}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


class TensorLayout:
    """The modules and tensor names of a donor, derived from its config.

    Attributes:
        model: the causal language model on the meta device.
        base: its submodule with embedding, decoder layers, final norm and rotary embedding.
        layers: its decoder layers.
        base_prefix, layer_prefix: prefixes of the names of the tensors in `base` and in `layers`.
        embedding: name of the weight of the input embedding.
        output: name of the weight of the output embedding, the same as `embedding` if they are tied.
    """

    def __init__(self, config: Any, family: Family) -> None:
        self.config, self.family = config, family
        self.model = meta_model(config)
        self.base: Any = getattr(self.model, family.base)
        self.layers: Any = getattr(self.base, family.layers)
        self.base_prefix = f"{family.base}."
        self.layer_prefix = f"{family.base}.{family.layers}."
        self.embedding = f"{family.base}.{family.embedding}.weight"
        self.output = self.embedding if config.tie_word_embeddings else LM_HEAD

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor that the config requires, without a tied lm_head."""
        shapes = {name: tuple(weight.shape) for name, weight in self.model.state_dict().items()}
        if self.config.tie_word_embeddings:
            shapes.pop(LM_HEAD, None)
        return shapes

    @property
    def embedding_scale(self) -> float:
        """The factor by which Gemma and Granite scale embeddings; 1 in other families."""
        scale = getattr(self.config, "embedding_multiplier", None)
        if scale is not None:
            return float(scale)
        embedding = getattr(self.base, self.family.embedding)
        return float(getattr(embedding, "scalar_embed_scale", 1.0))

    def stores_two_embeddings(self, source: TensorSource) -> bool:
        """Whether the config ties head and embedding, and `source` has two different tensors for them."""
        both = {self.embedding, LM_HEAD} <= set(source.names())
        if not (both and self.config.tie_word_embeddings):
            return False
        head, embedding = source.read(LM_HEAD), source.read(self.embedding)
        return head.shape != embedding.shape or not torch.equal(head, embedding)

    def check(self, source: TensorSource, path: Path, *, surplus: bool = True) -> list[str]:
        """Check names, shapes and dtypes of the tensors in `source`; returns the names that are left aside.

        Args:
            path: folder or file for error messages.
            surplus: whether tensors may be left aside; otherwise each has to have a place.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or has no place and would change what is computed.
            UnsupportedError: a tensor has a dtype that is not in STORED_DTYPES.
        """
        stored = source.names()
        missing = self.shapes.keys() - set(stored)
        for name, shape in self.shapes.items():
            if name in missing:
                raise CheckpointError(f"tensor {name} is missing from {path}; {self._way_out(name, stored)}")
            if source.shape(name) != shape:
                raise CheckpointError(
                    f"tensor {name} in {path} has shape {list(source.shape(name))}, "
                    f"but its config asks for {list(shape)}"
                )
            if source.dtype(name) not in STORED_DTYPES:
                dtype = str(source.dtype(name)).removeprefix("torch.")
                raise UnsupportedError(
                    f"tensor {name} in {path} is stored as {dtype}; use the plain bf16 or fp16 donor"
                )
        aside = []
        for name in stored:
            if name in self.shapes or (name == LM_HEAD and self.config.tie_word_embeddings):
                continue
            if not (surplus and self._is_unused(name)):
                raise CheckpointError(
                    f"tensor {name} in {path} has no place in {type(self.model).__name__} as its config describes "
                    "it, and would change what the model computes: correct config.json, or remove the tensor"
                )
            aside.append(name)
        return aside

    def _is_unused(self, name: str) -> bool:
        """Whether what the model computes does not depend on a stored tensor that its class has no place for."""
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if UNUSED.search(name) or any(re.search(pattern, name) for pattern in ignored):
            return True
        parts = name.split(".")
        if not hasattr(self.model, parts[0]) and hasattr(self.base, parts[0]):  # named without the prefix
            parts.insert(0, self.family.base)
        if parts[:2] == [self.family.base, self.family.layers] and parts[2].isdigit():
            return int(parts[2]) >= len(self.layers)
        return not hasattr(self.model, parts[0])

    def _way_out(self, name: str, stored: list[str]) -> str:
        """What to do about the missing tensor `name`, given the names of the stored ones."""
        if name == LM_HEAD:
            return 'if its head is the embedding, set "tie_word_embeddings": true in config.json'
        longer = next((other for other in stored if other.endswith(f".{name}")), None)
        if longer is not None:
            prefix = longer.removesuffix(name)
            return (
                f"it is there as {longer}, which transformers does not find: remove '{prefix}' from the names"
            )
        return "download the checkpoint again"
