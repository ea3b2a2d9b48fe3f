"""A model reference made into config, tokenizer, and one decoder layer at a time."""

from __future__ import annotations

import copy
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from mhconvert.errors import CheckpointError, UnsupportedError
from mhconvert.progress import Listener, ignore

from ..families.facts import Family, family_of
from ..storage.safetensors_reader import TensorSource, read_json
from . import hub_download
from . import reference as references
from .expert_tensors import by_transformers_names
from .gguf_config import gguf_generation_config, gguf_tokenizer

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD_BLOCK = 1 << 14  # rows of the output embedding cast to fp32 at a time
STALE = "rotary_emb.inv_freq"  # old checkpoints store this buffer; it follows from the config


def open_donor(reference: str, *, trust_remote_code: bool = False, on_progress: Listener = ignore) -> Donor:
    """The donor that `reference` names. Config and tokenizer are fetched; weights wait for `Donor.source`.

    trust_remote_code: lets a custom tokenizer run its own code; models are always transformers' own classes.
    Raises CheckpointError when there is nothing readable, UnsupportedError for an unknown model type.
    """
    return Donor(references.resolve(reference, on_progress=on_progress), trust_remote_code=trust_remote_code)


class Donor:
    """A pretrained model, only read, one decoder layer at a time.

    reference: what the user wrote. name: short, for `./<name>-<method>`. hub_id: where it is published, if
    known. notice: what the user should know about where it came from. licence: its id, if stated.
    config: transformers' config. dtype: of the stored weights (GGUF: float32). folder: where its files are.
    """

    def __init__(self, place: references.Place, *, trust_remote_code: bool = False) -> None:
        self._place = place
        self._trust = trust_remote_code
        self.reference, self.name, self.hub_id = place.reference, place.name, place.hub_id
        self.notice, self.folder, self.licence = place.notice, place.folder, place.licence
        self.config: Any = place.config
        self.config._attn_implementation = implementation(self.config)
        self._outer: dict[str, Tensor] = {}

    @cached_property
    def source(self) -> TensorSource:
        """The weights, downloaded if need be and checked against the config: every name and shape.

        Raises CheckpointError for a tensor that is missing, surplus or misshapen, UnsupportedError for one
        stored in another dtype than STORED_DTYPES.
        """
        _ = self.family  # refuses an unsupported model before anything is downloaded or read
        source = by_transformers_names(self._place.open_source(), self.config.model_type)
        self._check(source)
        return source

    @cached_property
    def published(self) -> TensorSource:
        """The same weights by the names they are published under; mixtures keep each expert apart there."""
        _ = self.source  # downloaded and checked
        return self._place.open_source()

    @property
    def location(self) -> str:
        """Where to find it again from any folder: its Hub id, or the path of its folder or file."""
        return self.hub_id or str(self._place.weights_place.resolve())

    def model_files(self) -> Path:
        """The folder that holds config, tokenizer and weights, which are downloaded first, or the GGUF file."""
        return self._place.model_files()

    def skeleton(self) -> Any:
        """The whole model on the meta device: every module and shape, and no weight."""
        return _skeleton(self.config)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The weights' dtype as the config states it; unstated, as they are stored (on the Hub: float32)."""
        stated = getattr(self.config, "dtype", None)
        if stated is not None:
            return getattr(torch, stated) if isinstance(stated, str) else stated
        if self._place.hub_reference is not None:
            return torch.float32  # nothing is downloaded just to find out
        source = self._place.open_source()
        return source.dtype(source.names()[0])

    def tokenizer(self) -> Any:
        """The donor's tokenizer. Raises CheckpointError when it has none that transformers can load."""
        if self._place.header is not None:
            return self._gguf_tokenizer
        return references.load_tokenizer(self.folder, self._trust)

    def decoder_layer(
        self, index: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """transformers' own decoder layer `index`: eval mode, no gradients; dropping it frees its memory."""
        stock = self._layers[index]
        layer = copy.deepcopy(stock, {id(self.config): self.config})
        prefix = f"{self._layer_prefix}{index}."
        weights = {
            name: self.source.read(prefix + name).to(device=device, dtype=dtype)
            for name in layer.state_dict()
        }
        layer.load_state_dict(weights, strict=True, assign=True)
        return layer.eval().requires_grad_(False)

    def norm_behind(self, index: int, device: torch.device | str) -> nn.Module:
        """What reads the output of decoder layer `index`, float32: the next attention's norm, if it has one, and behind
        the last layer the model's."""
        if index + 1 == self.config.num_hidden_layers:
            return self._norm(self._base, f"{self.family.base}.", self.family.final_norm, self.dtype, device)
        name = self.family.attention_norm
        if name is None:
            return nn.Identity()
        prefix = f"{self._layer_prefix}{index + 1}."
        return self._norm(self._layers[index + 1], prefix, name, self.dtype, device)

    def rotary(self, device: torch.device | str) -> nn.Module:
        """The donor's rotary embedding: (hidden states, position_ids [B, T]) -> cos, sin [B, T, head_dim]."""
        stock = getattr(self._base, self.family.rotary)
        return type(stock)(self.config).to(device)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, T, hidden_size] in fp32 on the device of `input_ids` [B, T]."""
        rows = F.embedding(input_ids.cpu(), self._read_outer(self._embedding))
        return rows.to(device=input_ids.device, dtype=torch.float32) * self._embedding_scale

    def head(self, hidden: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
        """Final norm and lm_head: layer output [..., hidden_size] -> logits [..., vocab_size], fp32.

        rounded_to: compute as if the weights were stored in that dtype.
        """
        stored = rounded_to or self.dtype
        norm = self._norm(self._base, f"{self.family.base}.", self.family.final_norm, stored, hidden.device)
        tied = self.config.tie_word_embeddings
        output = self._read_outer(self._embedding if tied else "lm_head.weight")
        with torch.no_grad():
            normed = norm(hidden.float())
            if output.dtype == stored == torch.float32 and output.device == hidden.device:
                return final_logits(self.config, F.linear(normed, output))
            blocks = (block.to(stored).to(hidden.device, torch.float32) for block in output.split(HEAD_BLOCK))
            return final_logits(self.config, torch.cat([F.linear(normed, block) for block in blocks], dim=-1))

    def release(self) -> None:
        """Let go of the embedding and the head; they are read again when they are needed."""
        self._outer.clear()

    def model(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Any:
        """The whole donor in memory: only for sampling, evaluation and generation."""
        model = _skeleton(self.config)
        weights = {name: self.source.read(name).to(device=device, dtype=dtype) for name in self._expected}
        if self.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights[self._embedding]
        model.load_state_dict(weights, strict=True, assign=True)
        setattr(getattr(model, self.family.base), self.family.rotary, self.rotary(device))
        for module in model.modules():  # buffers that follow from the config and are not in the weights
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        model.tie_weights()
        model.generation_config = self.generation_config()
        return model.eval().requires_grad_(False)

    def generation_config(self) -> GenerationConfig:
        """The donor's generation settings; from its config when it ships none. CheckpointError if unreadable."""
        if self._place.header is not None:
            return gguf_generation_config(self._place.header)
        if (self.folder / "generation_config.json").is_file():
            read_json(self.folder / "generation_config.json")
            return GenerationConfig.from_pretrained(self.folder)
        return GenerationConfig.from_model_config(self.config)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the config asks for, and its shape; a tied lm_head is not among them."""
        return dict(self._expected)

    def layer_tensor_names(self, index: int) -> list[str]:
        """Names in `source` of the tensors of decoder layer `index`."""
        return [name for name in self._expected if name.startswith(f"{self._layer_prefix}{index}.")]

    def outer_tensor_names(self) -> list[str]:
        """Names in `source` of every tensor outside the decoder layers; a tied lm_head is not among them."""
        return [name for name in self._expected if not name.startswith(self._layer_prefix)]

    def copy_files(self, out: Path) -> None:
        """Put tokenizer, chat template, generation settings and licence into `out`: files byte for byte."""
        if self._place.header is not None:
            self.tokenizer().save_pretrained(out)
            self.generation_config().save_pretrained(out)
            return
        patterns = (*hub_download.CARRIED_FILES, *(hub_download.TOKENIZER_CODE if self._trust else ()))
        for file in sorted({f for pattern in patterns for f in self.folder.glob(pattern) if f.is_file()}):
            shutil.copyfile(file, out / file.name)

    @cached_property
    def _gguf_tokenizer(self) -> Any:
        assert self._place.header is not None
        return gguf_tokenizer(self._place.header)  # a large vocabulary's merges take a minute to work out

    @cached_property
    def family(self) -> Family:
        """The donor's row of `families.FAMILIES`. Raises UnsupportedError when it has none."""
        return family_of(self.config)

    def _norm(
        self, owner: Any, prefix: str, name: str, stored: torch.dtype, device: torch.device | str
    ) -> nn.Module:
        """A norm as if its weights were stored in that dtype, float32."""
        norm = copy.deepcopy(getattr(owner, name))
        weights = {
            key: self._read_outer(f"{prefix}{name}.{key}").to(stored).to(device, torch.float32)
            for key in norm.state_dict()
        }
        norm.load_state_dict(weights, strict=True, assign=True)
        return norm.requires_grad_(False)

    @property
    def _embedding_scale(self) -> float:
        """What Gemma and Granite multiply embeddings by."""
        scale = getattr(self.config, "embedding_multiplier", None)
        if scale is not None:
            return float(scale)
        embedding = getattr(self._base, self.family.embedding)
        return float(getattr(embedding, "scalar_embed_scale", 1.0))

    @cached_property
    def _stock(self) -> Any:
        return _skeleton(self.config)

    @property
    def _base(self) -> Any:
        return getattr(self._stock, self.family.base)

    @property
    def _layers(self) -> Any:
        return getattr(self._base, self.family.layers)

    @property
    def _layer_prefix(self) -> str:
        return f"{self.family.base}.{self.family.layers}."

    @property
    def _embedding(self) -> str:
        return f"{self.family.base}.{self.family.embedding}.weight"

    @cached_property
    def _expected(self) -> dict[str, tuple[int, ...]]:
        tied = self.config.tie_word_embeddings
        shapes = {name: tuple(weight.shape) for name, weight in self._stock.state_dict().items()}
        return {name: shape for name, shape in shapes.items() if not (tied and name == "lm_head.weight")}

    def _read_outer(self, name: str) -> Tensor:
        if name not in self._outer:
            self._outer[name] = self.source.read(name)
        return self._outer[name]

    def _check(self, source: TensorSource) -> None:
        names, where = set(source.names()), self._place.weights_place
        for name, shape in self._expected.items():
            if name not in names:
                raise CheckpointError(f"tensor {name} is missing from {where}; download the checkpoint again")
            if source.shape(name) != shape:
                raise CheckpointError(
                    f"tensor {name} in {where} has shape {list(source.shape(name))}, "
                    f"but its config asks for {list(shape)}"
                )
            if source.dtype(name) not in STORED_DTYPES:
                kind = str(source.dtype(name)).removeprefix("torch.")
                raise UnsupportedError(
                    f"tensor {name} in {where} is stored as {kind}; use the plain bf16 or fp16 donor"
                )
        surplus = sorted(n for n in names - set(self._expected) if not n.endswith(STALE))
        if surplus == ["lm_head.weight"] and _same(source, surplus[0], self._embedding):
            return
        if surplus:
            raise CheckpointError(
                f"tensor {surplus[0]} in {where} has no place in {type(self._stock).__name__} "
                "as its config describes it"
            )


def final_logits(config: Any, logits: Tensor) -> Tensor:
    """What Granite and Gemma 2 do to the product with the output embedding."""
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _same(source: TensorSource, left: str, right: str) -> bool:
    return source.shape(left) == source.shape(right) and torch.equal(source.read(left), source.read(right))


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation(config)).eval()


def implementation(config: Any) -> str:
    """transformers' attention that computes `config`'s: sdpa knows no soft-caps."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
