"""The donor, the model that is converted: its config, its tokenizer, and its decoder layers one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from mhconvert.progress import Listener, Progress, ignore

from ..families.facts import Family, family_of
from . import reference as references
from .blocked_product import blocked_product
from .carried_files import carried, carry_files
from .checked_weights import open_checked
from .tensor_layout import TensorLayout, attention_implementation, meta_model
from .tensor_names import TransformersNames
from .tokenizer_files import require_tokenizer
from .whole_model import final_logits, whole_model


def open_donor(reference: str, *, trust_remote_code: bool = False, on_progress: Listener = ignore) -> Donor:
    """The donor with this reference; config and tokenizer are downloaded now, weights by `Donor.source`.

    Args:
        reference: an alias, a Hub id, a folder or a GGUF file.
        trust_remote_code: allow a custom tokenizer to run its code; model classes are always those of transformers.

    Raises:
        CheckpointError: the model is missing or cannot be read.
        UnsupportedError: transformers does not know the model type.
    """
    resolved = references.resolve(reference, on_progress=on_progress)
    return Donor(resolved, trust_remote_code=trust_remote_code)


class Donor:
    """A pretrained model, read one decoder layer at a time.

    Attributes:
        reference: as given by the user.
        name: used in the default output folder `./<name>-<method>`.
        hub_id: None if unknown.
        licence: its id; None if unknown.
        config: of transformers.
        folder, place: of its files; the same, or of a GGUF donor the file.
        generation_file: its generation_config.json, which is carried as it is; None where there is none.
    """

    def __init__(self, resolved: references.ResolvedReference, *, trust_remote_code: bool = False) -> None:
        self._resolved = resolved
        self._trust = trust_remote_code
        self.reference, self.name, self.hub_id = resolved.reference, resolved.name, resolved.hub_id
        self.folder, self.generation_file = resolved.folder, resolved.generation_file
        self.licence, self.place, self._last_layer = resolved.licence, resolved.weights_path, -1
        self._notices = list(resolved.notices)
        self.config: Any = resolved.config
        self.config._attn_implementation = attention_implementation(self.config)
        self._outer_tensors: dict[str, Tensor] = {}

    @cached_property
    def family(self) -> Family:
        """The donor's entry in `families.FAMILIES`; raises UnsupportedError if there is none."""
        return family_of(self.config)

    @cached_property
    def layout(self) -> TensorLayout:
        """The modules and tensor names that the config requires; raises UnsupportedError as `family` does."""
        return TensorLayout(self.config, self.family)

    @property
    def notice(self) -> str | None:
        """Sentences for the user about the weights, if there is anything to say; more of them once `source` is read."""
        return "; ".join(self._notices) or None

    @cached_property
    def source(self) -> TransformersNames:
        """The weights under transformers' names, downloaded if necessary and checked against the config.

        Raises:
            CheckpointError: a tensor is missing or of another shape, or would change what the config describes.
            UnsupportedError: the family is not supported, or a tensor has a dtype that is not in STORED_DTYPES.
        """
        source, self.layout, notices = open_checked(self._resolved, self.config, self.family)
        self._notices += notices
        return source

    def open_weights(self, tell: Listener) -> None:
        """Download and check the weights, and tell what there is to say of them. Raises as `source` does."""
        if self.source and self.notice:
            tell(Progress("donor", 1, 1, self.notice))

    def published_names(self) -> dict[str, str]:
        """Name in `source.stored` -> the tensor of `source` that it is, or is a part of; without what is left aside."""
        return {stored: name for stored, name in self.source.places.items() if name in self.layout.shapes}

    @property
    def location(self) -> str:
        """The Hub id, or the absolute path of the folder or file: a reference that is valid in any directory."""
        return self.hub_id or str(self.place.resolve())

    def model_files(self) -> Path:
        """The GGUF file, or the folder of config, tokenizer and weights, which are downloaded if necessary."""
        return self._resolved.model_files()

    def skeleton(self) -> Any:
        """A new copy of the model on the meta device, without weights."""
        return meta_model(self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: as in the config, else as stored, or float32 for a model on the Hub."""
        stated = getattr(self.config, "dtype", None)
        if stated is not None:
            return getattr(torch, stated) if isinstance(stated, str) else stated
        if self._resolved.hub_reference is not None:
            return torch.float32  # downloading the weights only for this is too expensive
        source = self._resolved.open_source()
        return source.dtype(source.names()[0])

    def tokenizer(self) -> Any:
        """The donor's tokenizer; raises CheckpointError if transformers cannot load one."""
        return self._resolved.tokenizer(self._trust)

    def generation_config(self) -> GenerationConfig:
        """The token ids of the generation settings; raises CheckpointError for a file that cannot be read."""
        return self._resolved.generation_config()

    def copy_files(self, out: Path) -> None:
        """Copy tokenizer, chat templates, processor, generation settings and licence to `out`; see `carry_files`."""
        if self._resolved.header is not None:
            self.tokenizer().save_pretrained(out)
            self.generation_config().save_pretrained(out)
            return
        carry_files(self.folder, out, code=self._trust)

    def check_files(self, *, tokenizer: bool = False) -> None:
        """Raises CheckpointError for what `copy_files` would refuse; `tokenizer`: and for one that does not load."""
        if self._resolved.header is None:
            carried(self.folder, code=self._trust)
            if tokenizer:
                require_tokenizer(self.folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every tensor that the config requires, without a tied lm_head."""
        return dict(self.layout.shapes)

    def layer_tensor_names(self, index: int) -> list[str]:
        """The names in `source` of the tensors of decoder layer `index`."""
        return [name for name in self.layout.shapes if name.startswith(f"{self.layout.layer_prefix}{index}.")]

    def outer_tensor_names(self) -> list[str]:
        """The names in `source` of the tensors outside the decoder layers, without a tied lm_head."""
        return [name for name in self.layout.shapes if not name.startswith(self.layout.layer_prefix)]

    def decoder_layer(
        self, index: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """Decoder layer `index`, a module of transformers in eval mode without gradients, not kept here.

        Layers are read in order, forwards or backwards: the file is read ahead for the next one.
        """
        prefix = f"{self.layout.layer_prefix}{index}."
        layer = self._loaded(
            self.layout.layers[index],
            lambda name: self.source.read(prefix + name).to(device=device, dtype=dtype),
        )
        following, self._last_layer = 2 * index - self._last_layer, index
        for name in self.layer_tensor_names(following):
            self.source.read_ahead(name)
        return layer

    def norm_behind(self, index: int, device: torch.device | str) -> nn.Module:
        """The norm that reads the output of decoder layer `index`, in float32: the next layer's attention norm, the
        identity in families without one, or after the last layer the final norm."""
        if index + 1 == self.config.num_hidden_layers:
            return self._final_norm(self.dtype, device)
        name = self.family.attention_norm
        if name is None:
            return nn.Identity()
        prefix = f"{self.layout.layer_prefix}{index + 1}.{name}."
        return self._norm(getattr(self.layout.layers[index + 1], name), prefix, self.dtype, device)

    def rotary(self, device: torch.device | str) -> nn.Module:
        """The rotary embedding: (hidden states, position_ids (B, T)) -> cos, sin, each (B, T, head_dim)."""
        stock = getattr(self.layout.base, self.family.rotary)
        return type(stock)(self.config).to(device)

    def embed(self, input_ids: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
        """The embeddings (B, T, hidden_size) of `input_ids` (B, T), in float32 on the same device; `rounded_to` as of
        `head`."""
        rows = F.embedding(input_ids.cpu(), self._read_outer(self.layout.embedding))
        rows = rows if rounded_to is None else rows.to(rounded_to)
        return rows.to(device=input_ids.device, dtype=torch.float32) * self.layout.embedding_scale

    def head(self, hidden: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
        """The logits (..., vocab_size), in float32, for outputs (..., hidden_size) of the last layer.

        Gradients reach `hidden` where it requires them.

        Args:
            rounded_to: the dtype to which the weights of norm and lm_head are rounded; None for the donor's.
        """
        stored = rounded_to or self.dtype
        norm = self._final_norm(stored, hidden.device)
        output = self._read_outer(self.layout.output)
        normed = norm(hidden.float())
        if output.dtype == stored == torch.float32 and output.device == hidden.device:
            return final_logits(self.config, F.linear(normed, output))
        return final_logits(self.config, blocked_product(normed, output, stored))

    def release(self) -> None:
        """Free the embedding and the head; they are read again when they are needed."""
        self._outer_tensors.clear()

    def model(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Any:
        """The whole model in memory, for sampling, evaluation and generation."""
        weights = self.source, self.layout  # in this order: the source settles what is tied
        return whole_model(*weights, self.rotary(device), self.generation_config(), device, dtype)

    def _final_norm(self, stored: torch.dtype, device: torch.device | str) -> nn.Module:
        norm = getattr(self.layout.base, name := self.family.final_norm)
        return self._norm(norm, f"{self.layout.base_prefix}{name}.", stored, device)

    def _norm(
        self, stock: nn.Module, prefix: str, stored: torch.dtype, device: torch.device | str
    ) -> nn.Module:
        """A copy of the norm `stock` in float32, with weights rounded to dtype `stored`."""
        return self._loaded(
            stock, lambda name: self._read_outer(prefix + name).to(stored).to(device, torch.float32)
        )

    def _loaded(self, stock: nn.Module, read: Callable[[str], Tensor]) -> nn.Module:
        """A copy of the meta module `stock` in eval mode, with the weights that `read` returns and no gradients."""
        module = copy.deepcopy(stock, {id(self.config): self.config})
        weights = {name: read(name) for name in module.state_dict()}
        module.load_state_dict(weights, strict=True, assign=True)
        return module.eval().requires_grad_(False)

    def _read_outer(self, name: str) -> Tensor:
        if name not in self._outer_tensors:
            self._outer_tensors[name] = self.source.read(name)
        return self._outer_tensors[name]
