"""Causal language models some of whose layers are linear: a state of fixed size instead of a cache; the others are
those of coded latents.

The linear layers are transformers' own Gated DeltaNet (arXiv 2412.06464) and Mamba2 (arXiv 2405.21060), which use
their fast kernels where these are installed. This file is shipped inside converted checkpoints: it imports torch,
transformers and its siblings only.

Shapes: B batch, T tokens of a call, D hidden_size, H query heads, d head_dim.
"""

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer, StaticLayer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from . import configuration_hybrid
from .configuration_hybrid import HybridFields
from .first_tokens import visible_slots
from .modeling_coded_mla import (
    CodedLatentAttention,
    CodedLatentAttentionForCausalLM,
    CodedLatentAttentionModel,
)
from .modeling_mla import LatentAttentionModel
from .slot_embeddings import SlotEmbeddings

STATE_CHUNK = 64  # tokens that Mamba2's scan reads at once


class MixerStates(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[override]
    """The cache of one linear layer: transformers' states, and how many tokens they are of.

    What a state has read cannot be taken out of it again.
    """

    def __init__(self, slots: int | None = None) -> None:
        """slots: of the other layers of a static cache."""
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.slots, self.seen = slots, 0

    def update(self, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        raise ValueError("a linear layer has no keys and values to cache: this cache is another model's")

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of the other layers: masks are made by the first one."""
        return self.slots or self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """Transformers asks for it before it drafts tokens that it may take back. Raises ValueError."""
        self._cannot("drafting tokens (assisted decoding)")

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError but for no tokens."""
        if tokens_to_remove:
            self._cannot(f"cropping {abs(tokens_to_remove)} tokens from the cache")

    def _cannot(self, what: str) -> None:
        raise ValueError(
            f"{what} needs states to go back, and a linear layer keeps one state of all {self.seen} tokens; read the "
            "text anew"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda state: state[indices])

    def _each(self, change: Any) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({key: change(state) for key, state in states.items() if state is not None})

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.seen = 0


def state_layer(cache: Any, index: int) -> MixerStates:
    """The layer `index` of a transformers cache: a MixerStates where it would be an empty layer of keys and values.

    Raises ValueError for a layer that holds something else.
    """
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[index]
    if isinstance(held, DynamicLayer | StaticLayer) and not held.is_initialized:
        held = cache.layers[index] = MixerStates(getattr(held, "max_cache_len", None))
    if not isinstance(held, MixerStates):
        raise ValueError(
            f"layer {index} keeps a state, and this cache holds keys and values in a {type(held).__name__} for it: it "
            "is another model's, or of another kind"
        )
    return held


def place_states(cache: Any, layers: list[int]) -> None:
    """Make the layers of a cache that hold states before the model is called."""
    for index in layers:
        state_layer(cache, index)


def own_tokens(mask: Any, length: int, seen: int) -> Tensor | None:
    """Which of the last `length` tokens, `seen` before them, see themselves: (B or 1, T), 0 for padding; None: all do.

    mask: as the model makes it for its attention.
    """
    visible = visible_slots(mask)
    if visible is None:
        return None
    rows = visible[:, 0]
    if rows.shape[1] == 1:
        return rows[:, 0, seen : seen + length]
    return rows.diagonal(offset=seen, dim1=1, dim2=2)


def require_no_gap(mask: Any, tokens: int) -> None:
    """Raise ValueError where the last token sees a sequence of `tokens` with padding in it, which a state has read.

    mask: as of `own_tokens`.
    """
    visible = visible_slots(mask)
    if visible is None or torch.compiler.is_compiling():
        return
    seen = visible[:, 0, -1, :tokens].int()
    if bool((seen[:, 0] + (seen.diff(dim=1) > 0).sum(1) > 1).any()):
        raise ValueError(
            "attention_mask has padding between the tokens of a sequence, which a linear layer's state would keep; pad "
            "on the left: tokenizer.padding_side = 'left'"
        )


class LinearAttention(nn.Module):
    """A linear mixer in the place of an attention. It reads no positions: it has no RoPE."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.mixer = (gated_deltanet if config.linear_mixer == "gated-deltanet" else mamba2)(
            config, layer_idx
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, D] -> output [B, T, D], no weights."""
        length, held = hidden_states.shape[1], None
        if past_key_values is not None:
            held = state_layer(past_key_values, self.layer_idx)
        before = held.seen if held else 0
        if self.layer_idx == min(self.config.linear_layers or [self.layer_idx]):  # one look for all layers
            require_no_gap(attention_mask, before + length)
        mask = own_tokens(attention_mask, length, before)
        output = self.mixer(hidden_states, cache_params=past_key_values, attention_mask=mask)
        if held is not None:
            held.seen += length
            held.is_initialized = True
        return output, None


def shape(config: Any) -> dict[str, Any]:
    """What both kinds of mixers have."""
    heads = config.num_attention_heads
    return {
        "heads": heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "eps": getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None) or 1e-6,
    }


def gated_deltanet(config: Any, layer_idx: int) -> nn.Module:
    """transformers' Gated DeltaNet with as many heads for queries, keys and values as the donor has query heads."""
    of = shape(config)
    made: Any = SimpleNamespace(
        hidden_size=config.hidden_size,
        linear_num_value_heads=of["heads"],
        linear_num_key_heads=of["heads"],
        linear_key_head_dim=of["head_dim"],
        linear_value_head_dim=of["head_dim"],
        linear_conv_kernel_dim=config.linear_conv_kernel,
        hidden_act="silu",
        rms_norm_eps=of["eps"],
        layer_types=["linear_attention"] * (layer_idx + 1),
        dtype=config.dtype,
    )
    return _with_output_bias(Qwen3NextGatedDeltaNet(made, layer_idx), config)


def mamba2(config: Any, layer_idx: int) -> nn.Module:
    """transformers' Mamba2 mixer: x, B and C of each head are as wide as the donor's heads; each has a group."""
    of = shape(config)
    width = of["heads"] * of["head_dim"]
    made: Any = SimpleNamespace(
        hidden_size=config.hidden_size,
        num_heads=of["heads"],
        head_dim=of["head_dim"],
        n_groups=of["heads"],
        state_size=of["head_dim"],
        expand=(width + 0.5) / config.hidden_size,  # which the mixer multiplies again, and rounds down
        conv_kernel=config.linear_conv_kernel,
        use_conv_bias=False,
        use_bias=False,
        hidden_act="silu",
        layer_norm_epsilon=of["eps"],
        chunk_size=STATE_CHUNK,
        time_step_rank=1,
        time_step_limit=(0.0, float("inf")),
        time_step_min=1e-3,
        time_step_max=0.1,
        time_step_floor=1e-4,
        layer_types=["mamba"] * (layer_idx + 1),
    )
    return _with_output_bias(Mamba2Mixer(made, layer_idx), config)


def _with_output_bias(mixer: Any, config: Any) -> nn.Module:
    if config.attention_output_bias:
        mixer.out_proj = nn.Linear(mixer.out_proj.in_features, config.hidden_size, bias=True)
    return mixer


class HybridModel(CodedLatentAttentionModel):
    """Mixed into the donor's decoder stack: replaces every `self_attn`, by a linear one in some layers."""

    def __init__(self, config: HybridFields):
        super(LatentAttentionModel, self).__init__(config)  # type: ignore[call-arg]
        layers: Any = self.layers  # type: ignore[attr-defined]
        slots = SlotEmbeddings(self.rotary_emb, None)  # type: ignore[attr-defined]
        for layer_idx, layer in enumerate(layers):
            if config.is_linear(layer_idx):
                layer.self_attn = LinearAttention(config, layer_idx)
            else:
                layer.self_attn = CodedLatentAttention(config, layer_idx)
                layer.self_attn.slot_embeddings = slots
        self.post_init()  # type: ignore[attr-defined]


class HybridForCausalLM(CodedLatentAttentionForCausalLM):
    """Mixed into the donor's causal language model: its decoder stack is `decoder_class`."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> bool:
        made: bool = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if (cache := model_kwargs.get("past_key_values")) is not None:
            place_states(cache, self.config.linear_layers or [])  # type: ignore[attr-defined]
        return made


def __getattr__(name: str) -> Any:
    """`Hybrid<Donor>Model` and `…ForCausalLM`, made from transformers' classes when they are asked for."""
    donor = getattr(transformers, name.removeprefix("Hybrid"), None)
    if not (name.startswith("Hybrid") and name.endswith(("Model", "ForCausalLM")) and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config_class = getattr(configuration_hybrid, f"Hybrid{donor.config_class.__name__}")
    # Transformers refuses drafted (assisted) decoding of stateful models by name.
    body: dict[str, Any] = {"__module__": __name__, "config_class": config_class, "_is_stateful": True}
    if name.endswith("Model"):
        body["_can_record_outputs"] = donor._can_record_outputs | {"attentions": CodedLatentAttention}
        return globals().setdefault(name, type(name, (HybridModel, donor), body))
    stack: Any = MODEL_MAPPING[donor.config_class]
    body["decoder_class"] = __getattr__(f"Hybrid{stack.__name__}")
    return globals().setdefault(name, type(name, (HybridForCausalLM, donor), body))
