"""The tensors that a donor's config requires, and the check that its checkpoint has exactly these."""

from __future__ import annotations

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
STALE_BUFFER = "rotary_emb.inv_freq"  # stored in old checkpoints; derived from the config


def attention_implementation(config: Any) -> str:
    """The attention implementation of transformers for this model: sdpa, or eager for what sdpa does not compute."""
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap or config.model_type == "gpt_oss" else "sdpa"  # gpt-oss has sinks


def meta_model(config: Any) -> Any:
    """The causal language model of `config` on the meta device, without weights, in eval mode."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=attention_implementation(config)
        ).eval()


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

    def check(self, source: TensorSource, path: Path) -> None:
        """Check names, shapes and dtypes of the tensors in `source`.

        Args:
            path: folder or file for error messages.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape.
            UnsupportedError: a tensor has a dtype that is not in STORED_DTYPES.
        """
        stored = set(source.names())
        for name, shape in self.shapes.items():
            if name not in stored:
                raise CheckpointError(f"tensor {name} is missing from {path}; download the checkpoint again")
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
        surplus = sorted(name for name in stored - set(self.shapes) if not name.endswith(STALE_BUFFER))
        if surplus == [LM_HEAD] and _equal(source, LM_HEAD, self.embedding):
            return
        if surplus:
            raise CheckpointError(
                f"tensor {surplus[0]} in {path} has no place in {type(self.model).__name__} "
                "as its config describes it"
            )


def _equal(source: TensorSource, left: str, right: str) -> bool:
    return source.shape(left) == source.shape(right) and torch.equal(source.read(left), source.read(right))
