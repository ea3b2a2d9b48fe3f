"""The model that is converted: config, tokenizer, and one decoder layer at a time. It is only read."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from mhconvert.progress import Listener, ignore

from ..families.facts import Family, family_of
from ..storage.safetensors_reader import TensorSource
from . import hub_download
from . import reference as references
from .expert_tensors import by_transformers_names
from .tensor_layout import LM_HEAD, TensorLayout, attention_implementation, meta_model

HEAD_BLOCK = 1 << 14  # rows of the output embedding cast to float32 at a time


def open_donor(reference: str, *, trust_remote_code: bool = False, on_progress: Listener = ignore) -> Donor:
    """The donor that `reference` names; config and tokenizer are fetched now, weights by `Donor.source`.

    Args:
        reference: an alias, a Hub id, a folder or a GGUF file.
        trust_remote_code: lets a custom tokenizer run its own code; models are always transformers' own classes.

    Raises:
        CheckpointError: there is nothing that can be read.
        UnsupportedError: transformers does not know the model type.
    """
    resolved = references.resolve(reference, on_progress=on_progress)
    return Donor(resolved, trust_remote_code=trust_remote_code)


class Donor:
    """A pretrained model, read one decoder layer at a time.

    Attributes:
        reference: what the user wrote.
        name: short, for the default output folder `./<name>-<method>`.
        hub_id: where it is published, if known.
        notice: what the user should know about where it came from.
        licence: its id, if stated.
        config: its transformers config.
        folder: where its files are.
    """

    def __init__(self, resolved: references.ResolvedReference, *, trust_remote_code: bool = False) -> None:
        self._resolved = resolved
        self._trust = trust_remote_code
        self.reference, self.name, self.hub_id = resolved.reference, resolved.name, resolved.hub_id
        self.notice, self.folder, self.licence = resolved.notice, resolved.folder, resolved.licence
        self.config: Any = resolved.config
        self.config._attn_implementation = attention_implementation(self.config)
        self._outer_tensors: dict[str, Tensor] = {}

    @cached_property
    def family(self) -> Family:
        """The donor's row of `families.FAMILIES`. Raises UnsupportedError when it has none."""
        return family_of(self.config)

    @cached_property
    def layout(self) -> TensorLayout:
        """The modules and tensor names that the config asks for. Raises UnsupportedError as `family` does."""
        return TensorLayout(self.config, self.family)

    @cached_property
    def source(self) -> TensorSource:
        """The weights under transformers' names, downloaded if need be and checked against the config.

        Raises:
            CheckpointError: a tensor is missing, surplus or of another shape.
            UnsupportedError: the family is not supported, or a tensor is stored in another dtype than STORED_DTYPES.
        """
        layout = self.layout  # refuses an unsupported family before anything is downloaded
        source = by_transformers_names(self._resolved.open_source(), self.config.model_type)
        layout.check(source, self._resolved.weights_path)
        return source

    @cached_property
    def published(self) -> TensorSource:
        """The same weights under their published names, where mixtures of experts store each expert apart."""
        _ = self.source  # downloaded and checked
        return self._resolved.open_source()

    @property
    def location(self) -> str:
        """Its Hub id, or the absolute path of its folder or file: a reference that works in any folder."""
        return self.hub_id or str(self._resolved.weights_path.resolve())

    def model_files(self) -> Path:
        """The folder that holds config, tokenizer and weights, which are downloaded first, or the GGUF file."""
        return self._resolved.model_files()

    def skeleton(self) -> Any:
        """A new copy of the whole model on the meta device: every module and shape, no weights."""
        return meta_model(self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The weights' dtype as the config states it; otherwise as stored, or float32 for a model on the Hub."""
        stated = getattr(self.config, "dtype", None)
        if stated is not None:
            return getattr(torch, stated) if isinstance(stated, str) else stated
        if self._resolved.hub_reference is not None:
            return torch.float32  # the weights are not downloaded for this alone
        source = self._resolved.open_source()
        return source.dtype(source.names()[0])

    def tokenizer(self) -> Any:
        """The donor's tokenizer. Raises CheckpointError when it has none that transformers can load."""
        return self._resolved.tokenizer(self._trust)

    def generation_config(self) -> GenerationConfig:
        """The generation settings it ships, else those in its config. Raises CheckpointError if unreadable."""
        return self._resolved.generation_config()

    def copy_files(self, out: Path) -> None:
        """Tokenizer, chat template, generation settings and licence are in `out` afterwards, byte for byte."""
        if self._resolved.header is not None:
            self.tokenizer().save_pretrained(out)
            self.generation_config().save_pretrained(out)
            return
        patterns = (*hub_download.CARRIED_FILES, *(hub_download.TOKENIZER_CODE if self._trust else ()))
        for file in sorted({f for pattern in patterns for f in self.folder.glob(pattern) if f.is_file()}):
            shutil.copyfile(file, out / file.name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the config asks for; a tied lm_head is not among them."""
        return dict(self.layout.shapes)

    def layer_tensor_names(self, index: int) -> list[str]:
        """Names in `source` of the tensors of decoder layer `index`."""
        return [name for name in self.layout.shapes if name.startswith(f"{self.layout.layer_prefix}{index}.")]

    def outer_tensor_names(self) -> list[str]:
        """Names in `source` of every tensor outside the decoder layers; a tied lm_head is not among them."""
        return [name for name in self.layout.shapes if not name.startswith(self.layout.layer_prefix)]

    def decoder_layer(
        self, index: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """transformers' own decoder layer `index` in eval mode, without gradients; dropping it frees its memory."""
        prefix = f"{self.layout.layer_prefix}{index}."
        return self._loaded(
            self.layout.layers[index],
            lambda name: self.source.read(prefix + name).to(device=device, dtype=dtype),
        )

    def norm_behind(self, index: int, device: torch.device | str) -> nn.Module:
        """The norm that reads the output of decoder layer `index`, float32.

        It is the next layer's attention norm (the identity in families without one), or after the last layer the
        model's final norm.
        """
        if index + 1 == self.config.num_hidden_layers:
            return self._final_norm(self.dtype, device)
        name = self.family.attention_norm
        if name is None:
            return nn.Identity()
        prefix = f"{self.layout.layer_prefix}{index + 1}.{name}."
        return self._norm(getattr(self.layout.layers[index + 1], name), prefix, self.dtype, device)

    def rotary(self, device: torch.device | str) -> nn.Module:
        """The donor's rotary embedding: (hidden states, position_ids [B, T]) -> cos, sin [B, T, head_dim]."""
        stock = getattr(self.layout.base, self.family.rotary)
        return type(stock)(self.config).to(device)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, T, hidden_size] in float32 on the device of `input_ids` [B, T]."""
        rows = F.embedding(input_ids.cpu(), self._read_outer(self.layout.embedding))
        return rows.to(device=input_ids.device, dtype=torch.float32) * self.layout.embedding_scale

    def head(self, hidden: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
        """Final norm and lm_head: layer output [..., hidden_size] -> logits [..., vocab_size], float32.

        Args:
            rounded_to: compute as if the weights were stored in this dtype.
        """
        stored = rounded_to or self.dtype
        norm = self._final_norm(stored, hidden.device)
        output = self._read_outer(self.layout.output)
        with torch.no_grad():
            normed = norm(hidden.float())
            if output.dtype == stored == torch.float32 and output.device == hidden.device:
                return final_logits(self.config, F.linear(normed, output))
            blocks = (block.to(stored).to(hidden.device, torch.float32) for block in output.split(HEAD_BLOCK))
            return final_logits(self.config, torch.cat([F.linear(normed, block) for block in blocks], dim=-1))

    def release(self) -> None:
        """Frees the embedding and the head; they are read again when they are needed."""
        self._outer_tensors.clear()

    def model(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Any:
        """The whole donor in memory: only for sampling, evaluation and generation."""
        model, layout = self.skeleton(), self.layout
        weights = {name: self.source.read(name).to(device=device, dtype=dtype) for name in layout.shapes}
        weights.setdefault(LM_HEAD, weights[layout.output])
        model.load_state_dict(weights, strict=True, assign=True)
        setattr(getattr(model, self.family.base), self.family.rotary, self.rotary(device))
        for module in model.modules():  # buffers that follow from the config and are not in the weights
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        model.tie_weights()
        model.generation_config = self.generation_config()
        return model.eval().requires_grad_(False)

    def _final_norm(self, stored: torch.dtype, device: torch.device | str) -> nn.Module:
        name = self.family.final_norm
        return self._norm(
            getattr(self.layout.base, name), f"{self.layout.base_prefix}{name}.", stored, device
        )

    def _norm(
        self, stock: nn.Module, prefix: str, stored: torch.dtype, device: torch.device | str
    ) -> nn.Module:
        """The norm `stock` in float32 with weights rounded to dtype `stored`."""
        return self._loaded(
            stock, lambda name: self._read_outer(prefix + name).to(stored).to(device, torch.float32)
        )

    def _loaded(self, stock: nn.Module, read: Callable[[str], Tensor]) -> nn.Module:
        """A copy of the meta module `stock` with the weights that `read` returns, which are not trainable."""
        module = copy.deepcopy(stock, {id(self.config): self.config})
        weights = {name: read(name) for name in module.state_dict()}
        module.load_state_dict(weights, strict=True, assign=True)
        return module.eval().requires_grad_(False)

    def _read_outer(self, name: str) -> Tensor:
        if name not in self._outer_tensors:
            self._outer_tensors[name] = self.source.read(name)
        return self._outer_tensors[name]


def final_logits(config: Any, logits: Tensor) -> Tensor:
    """Logits after Granite's scaling and Gemma 2's softcap, where the config has them."""
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
