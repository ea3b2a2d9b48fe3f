"""The served class is what vLLM's Transformers backend takes for latent attention; the ordinary class is not.

That vLLM finds it is run in tests/engines, in a real vLLM.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mhconvert.convert.methods.mla.served.modeling_served import LatentRMSNorm, ServedLatentAttention
from tests.convert.conversions import LLAMA3
from tests.convert.export.mla_contract import broken, is_rms_norm
from tests.convert.export.served_models import portable, served

DONORS = {"llama": {"rope": LLAMA3}, "qwen2": {"family": "qwen2"}, "biased": {"attention_bias": True}}


@pytest.mark.parametrize("donor", DONORS.values(), ids=DONORS)
def test_every_layer_keeps_the_contract(donor: dict[str, Any]) -> None:
    model = served(portable(**donor))
    assert [broken(layer.self_attn) for layer in model.model.layers] == [set(), set()]


def test_the_ordinary_class_breaks_it() -> None:
    """No norm in the latent, and an expansion of three parts."""
    for layer in portable().model.layers:
        assert broken(layer.self_attn) >= {2, 3, 6}


class KeywordExpansion(ServedLatentAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], -1
        )
        key, value = self.expand_kv(self.kv_a_layernorm(latent).unsqueeze(1), k_rot=k_rot.unsqueeze(1))
        query = self.q_proj(hidden_states)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, weights = attention(self, query, key, value, None, scaling=self.scaling)
        return self.o_proj(output), weights


class TwoInterfaces(ServedLatentAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], -1
        )
        key, value = self.expand_kv(self.kv_a_layernorm(latent).unsqueeze(1), k_rot.unsqueeze(1))
        query = self.q_proj(hidden_states)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        first, weights = attention(self, query, key, value, None, scaling=self.scaling)
        second, weights = attention(self, query, key, value, None, scaling=self.scaling)
        return self.o_proj(first + second), weights


class UnreadableScaling(ServedLatentAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], -1
        )
        key, value = self.expand_kv(self.kv_a_layernorm(latent).unsqueeze(1), k_rot.unsqueeze(1))
        query = self.q_proj(hidden_states)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, weights = attention(self, query, key, value, None, scaling=self.qk_nope_head_dim**-0.5)
        return self.o_proj(output), weights


class Gated(ServedLatentAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], -1
        )
        key, value = self.expand_kv(self.kv_a_layernorm(latent).unsqueeze(1), k_rot.unsqueeze(1))
        query = self.q_proj(hidden_states) * self.gate(hidden_states)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, weights = attention(self, query, key, value, None, scaling=self.scaling)
        return self.o_proj(output), weights


class Returned(ServedLatentAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        latent, k_rot = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], -1
        )
        key, value = self.expand_kv(self.kv_a_layernorm(latent).unsqueeze(1), k_rot.unsqueeze(1))
        query = self.q_proj(hidden_states)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, weights = attention(self, query, key, value, None, scaling=self.scaling)
        return self.o_proj(output) * 2, weights


class MeanNorm(LatentRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x - x.mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _of(kind: type) -> Callable[[Any], None]:
    def change(attention: Any) -> None:
        attention.__class__ = kind
        attention.gate = nn.Linear(96, 1)

    return change


def _with(name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda attention: setattr(attention, name, value(attention))


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        (_with("layer_idx", lambda _: None), {1}),
        (_with("kv_a_layernorm", lambda a: LatentRMSNorm(a.kv_lora_rank + 64, 1.0)), {2, 3, 4, 5, 6}),
        (_with("kv_a_layernorm", lambda _: nn.Identity()), {3}),
        (_with("kv_a_layernorm", lambda a: nn.LayerNorm(a.kv_lora_rank)), {3}),
        (_with("kv_a_layernorm", lambda a: MeanNorm(a.kv_lora_rank, 1.0)), {3}),
        (_of(Gated), {4}),
        (_of(Returned), {5}),
        (_of(KeywordExpansion), {6}),
        (_of(TwoInterfaces), {7}),
        (_of(UnreadableScaling), {7}),
    ],
)
def test_every_rule_can_be_broken(change: Callable[[Any], None], rules: set[int]) -> None:
    attention = copy.deepcopy(served(portable()).model.layers[0].self_attn)
    change(attention)
    assert broken(attention) == rules


def test_a_list_of_ranks_breaks_it() -> None:
    attention = served(portable()).model.layers[0].self_attn
    attention.config = SimpleNamespace(kv_lora_rank=[48, 48], _attn_implementation="sdpa")
    assert broken(attention) == {1}


def test_the_norm_is_a_norm() -> None:
    assert is_rms_norm(LatentRMSNorm(8, 1e-6))
    assert is_rms_norm(LatentRMSNorm(8, 2.0**30))
    assert not is_rms_norm(nn.Identity())
