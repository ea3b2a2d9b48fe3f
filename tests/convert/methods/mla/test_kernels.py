"""The model under torch.compile, autocast and the fused attention kernels: the same tokens, within the dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig, DynamicCache, StaticCache

from tests.convert.conversions import converted, donor_model, logits, relative, token_ids
from tests.convert.methods.mla.coded_models import coded


@pytest.fixture(scope="module")
def model() -> Any:
    return converted(donor_model())


@pytest.fixture(scope="module", params=["elements", "codes"])
def either(model: Any, request: pytest.FixtureRequest) -> Any:
    """A model of each kind of cache."""
    return model if request.param == "elements" else coded(donor_model(), 0.25)


@pytest.mark.parametrize("drafted", [1, 3])
def test_a_compiled_decode_step_is_one_graph_and_writes_the_same_tokens(either: Any, drafted: int) -> None:
    """backend="eager" traces as every backend does, graph breaks included, and skips only the code generation."""
    torch.compiler.reset()
    ids = token_ids(2, 9)
    cache = StaticCache(config=either.config, max_cache_len=9 + 5 * drafted)
    step = torch.compile(either, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = [either(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1).repeat(1, drafted)]
        for _ in range(4):
            found.append(step(input_ids=found[-1], past_key_values=cache).logits.argmax(-1))
        read = torch.cat((ids, *found[:-1]), dim=1)
        expected = logits(either, read)[:, ids.shape[1] :].argmax(-1)
    assert torch.equal(torch.cat(found[1:], dim=1), expected)
    assert len(expected[0]) == 4 * drafted


def test_generation_compiles_on_a_static_cache(either: Any) -> None:
    """What `generate` does by itself on CUDA."""
    torch.compiler.reset()
    settings = {"input_ids": token_ids(2, 9), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    settings |= {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9]), "pad_token_id": 1}
    compiling = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    compiled = either.generate(**settings, cache_implementation="static", compile_config=compiling)
    assert either._compiled_call is not None
    assert torch.equal(compiled, either.generate(**settings))


@pytest.mark.parametrize("sizes", [[12], [8, 1, 1, 2]], ids=["prefill", "cached"])
def test_autocast_is_the_model_within_bfloat16(model: Any, sizes: list[int]) -> None:
    ids, cache, parts = token_ids(2, 12), DynamicCache(), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for chunk in ids.split(sizes, dim=1):
            parts.append(model(input_ids=chunk, past_key_values=cache).logits)
    # bfloat16 keeps 8 bits; a few roundings in each of two layers.
    assert relative(torch.cat(parts, dim=1).float(), logits(model, ids)) < 0.05


def test_long_prompts_and_training_use_the_fused_kernel(model: Any) -> None:
    """That kernel alone is allowed: torch raises where it cannot be used, as with values narrower than keys."""
    ids = token_ids(2, 40)
    with sdpa_kernel(SDPBackend.MATH):
        expected = logits(model, ids)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert relative(logits(model, ids), expected) < 1e-5
        model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.layers[0].self_attn.kv_b_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    model.zero_grad()
