"""Whole tiny models converted in memory, layer by layer as the pass does it, and how results are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhconvert.convert.attention.rotary import layer_rotary
from mhconvert.convert.families.facts import layer_window
from mhconvert.convert.layer_pass.decoder_layer import Layer
from mhconvert.convert.methods.dha.method import DHA
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.mla.method import MLA
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.method import MoH
from mhconvert.convert.methods.moh.settings import MoHSettings
from tests.donors import make_config, make_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}  # attention_scaling 1.139
LINEAR = {"rope_type": "linear", "factor": 2.0}


def donor_model(seed: int = 0, **config: Any) -> Any:
    """A random two-layer donor; `config` goes to `make_config`."""
    return make_model(make_config(**config), seed=seed)


def token_ids(rows: int, length: int, seed: int = 1) -> Tensor:
    """(rows, length) ids within the vocabulary of `make_config`, none of them special."""
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def rotary_of(model: Any, length: int, index: int = 0) -> tuple[Tensor, Tensor]:
    """cos, sin (1, length, rotary width) of the model's rotary embedding in layer `index`."""
    return layer_rotary(model.model.rotary_emb, model.config, index, length).embeddings


@torch.no_grad()
def attention_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """Per layer, what its attention reads when the model reads `ids` (N, L): (N, L, D)."""
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def converted_layers(donor: Any, method: Any, ids: Tensor) -> list[Any]:
    """The attention of every layer as `method` makes it, from closed forms on `ids` (N, L)."""
    layers, length = [], ids.shape[1]
    for index, (module, x) in enumerate(zip(donor.model.layers, attention_inputs(donor, ids), strict=True)):
        rotary = layer_rotary(donor.model.rotary_emb, donor.config, index, length)
        layer = Layer(module, None, rotary, index, layer_window(donor.config, index))
        targets = layer.attend(module.self_attn, x)
        seen = method.observe(module.self_attn, x, rotary)
        layers.append(method.convert(seen, index, x, targets, rotary.embeddings)[0])
    return layers


def converted(
    donor: Any, settings: MLASettings | DHASettings | MoHSettings | None = None, seed: int = 1
) -> Any:
    """`donor` converted by the method of `settings` (MLA), fp32 and in eval mode, calibrated on four random rows."""
    settings = settings or MLASettings(kv_bits="16")
    kind = {MLASettings: MLA, DHASettings: DHA, MoHSettings: MoH}[type(settings)]
    method = kind(donor.config, settings, "quick")
    return assembled(donor, method, converted_layers(donor, method, token_ids(4, 32, seed)))


def assembled(donor: Any, method: Any, layers: list[Any]) -> Any:
    """The method's model with `layers` for attention and the donor's other weights."""
    model = method.model_class(method.finish()).eval()
    state = {name: tensor for name, tensor in donor.state_dict().items() if ".self_attn." not in name}
    for index, layer in enumerate(layers):
        state |= {f"model.layers.{index}.self_attn.{name}": t for name, t in method.stored(layer).items()}
    model.load_state_dict(state, strict=True)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """The model's logits (N, L, V) for `ids` without a cache."""
    return model(input_ids=ids, use_cache=False, **inputs).logits
