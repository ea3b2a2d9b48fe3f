"""Models with coded latents: near the donor, one function with every cache, and a cache of the planned bytes."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import DynamicCache, StaticCache

import mhconvert
from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.checkpoint.provenance import write_config
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.methods.mla import modeling_coded_mla
from mhconvert.convert.methods.mla.coded_method import CodedMLA
from mhconvert.convert.methods.mla.latent_code import row_bytes
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.errors import BudgetError, ExportError
from tests.convert.conversions import (
    LLAMA3,
    YARN,
    assembled,
    converted_layers,
    donor_model,
    logits,
    relative,
    token_ids,
)
from tests.convert.methods.mla.coded_models import coded, whole_model_sensitivities
from tests.donors import make_config, make_donor, stored_weights

SAME = 2e-5  # fp32 rounding through two layers, relative to the logits


@pytest.fixture(scope="module")
def model() -> Any:
    return coded(donor_model(), 0.25)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope": LLAMA3},
        {"rope": YARN, "kv_heads": 4},
        {"family": "qwen2"},
        {"family": "phi3", "pad_token_id": 1},
        {"family": "gemma2", "sliding_window": 8},
        {"family": "stablelm", "use_qkv_bias": True},
        {"family": "mistral", "sliding_window": 8},
        {"family": "qwen3"},
        {"family": "gemma3_text", "sliding_window": 8},
        {"family": "olmo2"},
    ],
    ids=lambda config: "-".join(map(str, config)) or "llama",
)
def test_eight_bits_of_everything_are_the_donor(config: dict[str, Any]) -> None:
    donor = donor_model(**config)
    exact, coarse = (
        relative(logits(coded(donor, share), token_ids(2, 30)), logits(donor, token_ids(2, 30)))
        for share in (0.6, 0.1)
    )
    assert exact < 0.03  # 8 bits: an error of 0.6 % of each component's deviation, through two layers
    assert exact < coarse / 4


def test_every_way_to_read_the_cache_is_one_function(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(2, 40)
    whole = logits(model, ids)
    with torch.no_grad():
        prefill = model(input_ids=ids, past_key_values=DynamicCache()).logits
        steps, chunks, blocks = DynamicCache(), DynamicCache(), DynamicCache()
        stepwise = torch.cat(
            [model(input_ids=token, past_key_values=steps).logits for token in ids.split(1, 1)], 1
        )
        chunked = torch.cat(
            [model(input_ids=part, past_key_values=chunks).logits for part in ids.split(13, 1)], 1
        )
        monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 7)
        in_blocks = torch.cat(
            [model(input_ids=part, past_key_values=blocks).logits for part in ids.split(3, 1)], 1
        )
    for other in (prefill, stepwise, chunked, in_blocks):
        assert relative(other, whole) < SAME


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "stablelm"])  # stablelm turns a quarter of each head
def test_threads_read_their_parts_of_the_cache(
    family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = coded(donor_model(family=family), 0.25), token_ids(rows, 40)
    whole, calls = logits(model, ids), []
    threads, part_of = torch.get_num_threads(), modeling_coded_mla.CodedLatentAttention._part_of

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        return part_of(self, *arguments)

    monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 5)
    monkeypatch.setattr(modeling_coded_mla.CodedLatentAttention, "_part_of", counted)
    torch.set_num_threads(2)
    try:
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                part = DynamicCache()
                model(input_ids=ids[:, :38], past_key_values=part)
                read = [
                    model(input_ids=token, past_key_values=part).logits for token in ids[:, 38:].split(1, 1)
                ]
            assert relative(torch.cat(read, 1), whole[:, 38:]) < SAME
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert {(count, graded) for _, count, graded in calls} == {(1, False)}
    assert threading.get_ident() not in {thread for thread, _, _ in calls}
    assert len(calls) == 2 * 2 * 2 * 2  # contexts, tokens, layers, and two parts or two sequences


@pytest.mark.parametrize("threads", [1, 2])
def test_whole_sequences_in_groups(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three padded sequences fit a block: they are read at once, and so is the third."""
    model, ids, pad = coded(donor_model(), 0.25), token_ids(3, 40), [0, 5, 11]
    mask = torch.tensor([[0] * n + [1] * (40 - n) for n in pad])
    monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 85)
    monkeypatch.setattr(modeling_coded_mla.CodedLatentAttention, "_part_of", None)
    before, cache = torch.get_num_threads(), DynamicCache()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            model(input_ids=ids[:, :38], attention_mask=mask[:, :38], past_key_values=cache)
            read = [
                model(
                    input_ids=ids[:, n : n + 1], attention_mask=mask[:, : n + 1], past_key_values=cache
                ).logits
                for n in (38, 39)
            ]
    finally:
        torch.set_num_threads(before)
    for row, n in enumerate(pad):
        alone = logits(model, ids[row : row + 1, n:])[0, -2:]
        assert relative(torch.cat(read, 1)[row], alone) < SAME


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_and_softcaps_in_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = coded(donor_model(family=family, sliding_window=9), 0.25), token_ids(2, 30)
    whole = logits(model, ids)
    monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 5)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        stepwise = torch.cat(
            [model(input_ids=token, past_key_values=cache).logits for token in ids.split(1, 1)], 1
        )
    assert relative(stepwise, whole) < SAME


def test_a_cache_has_the_planned_bytes(model: Any) -> None:
    cache, planned = DynamicCache(), sum(map(row_bytes, model.config.kv_code_counts))
    with torch.no_grad():
        model(input_ids=token_ids(3, 20), past_key_values=cache)
    assert cache_storage(cache)[0] == 3 * 20 * planned
    donor_bytes = 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, head_dim, bf16
    assert 0.85 * 0.25 < planned / donor_bytes <= 0.25


@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_left_padding_is_not_seen(model: Any, blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if blocks:
        monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 5)
    ids = token_ids(1, 20)
    padded = torch.cat((torch.ones(1, 6, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 20, dtype=torch.long)), 1)
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, 20:]
    both = model.generate(
        input_ids=torch.cat((padded, torch.cat((ids, ids[:, :6]), 1))),
        attention_mask=torch.cat((mask, torch.ones_like(mask))),
        **options,
    )
    assert both[0, 26:].tolist() == alone.tolist()


def test_beams_crop_and_static_caches(model: Any) -> None:
    ids = token_ids(2, 16)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    plain = model.generate(input_ids=ids, do_sample=False, **options)
    static = model.generate(input_ids=ids, do_sample=False, cache_implementation="static", **options)
    assert static.tolist() == plain.tolist()
    beams = [
        model.generate(input_ids=ids, num_beams=3, do_sample=False, use_cache=cached, **options)
        for cached in (True, False)
    ]
    assert beams[0].tolist() == beams[1].tolist()
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        cache.crop(-6)
        again = model(input_ids=ids[:, 10:], past_key_values=cache).logits
    assert relative(again, logits(model, ids)[:, 10:]) < SAME
    preallocated = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        first = model(input_ids=ids[:, :10], past_key_values=preallocated).logits
        rest = model(input_ids=ids[:, 10:], past_key_values=preallocated).logits
    assert relative(torch.cat((first, rest), 1), logits(model, ids)) < SAME


def test_assisted_decoding_is_greedy_decoding(model: Any) -> None:
    ids = token_ids(1, 16)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    assert (
        model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **options).tolist()
        == model.generate(input_ids=ids, **options).tolist()
    )


def test_adapters_are_read_in_blocks_too(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 7)
    config = LoraConfig(target_modules=["kv_b_proj"], r=4, init_lora_weights=False)
    adapted, ids = get_peft_model(copy.deepcopy(model), config).eval(), token_ids(2, 20)
    whole = logits(adapted, ids)
    assert relative(whole, logits(model, ids)) > 0.1
    cache = DynamicCache()
    with torch.no_grad():
        steps = [adapted(input_ids=token, past_key_values=cache).logits for token in ids.split(1, 1)]
    assert relative(torch.cat(steps, 1), whole) < SAME


def test_attention_weights_and_infinite_masks_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, cache = coded(donor_model(), 0.25), token_ids(1, 20), DynamicCache()
    model.set_attn_implementation("eager")
    monkeypatch.setattr(modeling_coded_mla, "BLOCK_ROWS", 6)
    mask = torch.zeros(1, 1, 1, 20)
    mask[..., :8] = -torch.inf
    with torch.no_grad():
        model(input_ids=ids[:, :19], past_key_values=cache)
        seen = model(input_ids=ids[:, 19:], past_key_values=copy.deepcopy(cache), output_attentions=True)
        hidden = model(input_ids=ids[:, 19:], past_key_values=cache, attention_mask=mask).logits
    assert [tuple(weights.shape) for weights in seen.attentions] == [(1, 4, 1, 20)] * 2
    assert hidden.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(model: Any, dtype: torch.dtype) -> None:
    half = coded(donor_model(), 0.25).to(dtype)
    found = logits(half, token_ids(1, 20)).float()
    # Codes are made from rounded latents, so some of them are a level apart.
    assert relative(found, logits(model, token_ids(1, 20))) < 0.2


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(
        BudgetError,
        match="kv_budget=0.01 gives 2 bytes a token, .* least 4 in 2 layers; the least is kv_budget=0.0157",
    ):
        CodedMLA(make_config(), MLASettings(kv_bits="auto", kv_budget=0.01), "quick")
    with pytest.raises(BudgetError, match="kv_bits 8 does not go with profile portable"):
        MLASettings(kv_bits="8", profile="portable")
    with pytest.raises(BudgetError, match="kv_bits 2 does not go with kv_lora_rank and qk_rope_head_dim"):
        MLASettings(kv_bits=2, kv_lora_rank=8, qk_rope_head_dim=4)
    plan = [{"components_by_bits": {"4": 8}}]
    for bits in ("auto", "4"):
        with pytest.raises(
            BudgetError, match="does not go with profile portable, which has elements of 16 bits"
        ):
            MLASettings(kv_bits=bits, profile="portable", plan=plan)  # type: ignore[arg-type]


def test_a_cache_that_holds_something_else_is_refused(model: Any) -> None:
    """Rows of another checkpoint, or a cache that keeps numbers where codes belong."""
    other, ids = coded(donor_model(), 0.125), token_ids(1, 8)
    cache = DynamicCache()
    with torch.no_grad():
        other(input_ids=ids, past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"layer 0 caches rows of \d+ bytes.*holds \d+ elements of torch.uint8"
        ):
            model(input_ids=ids, past_key_values=cache)
        numbers = DynamicCache()
        for layer in range(2):
            numbers.update(
                torch.zeros(1, 1, 4, model.model.layers[layer].self_attn.code.bytes),
                torch.zeros(1, 1, 4, 0),
                layer,
            )
        with pytest.raises(ValueError, match=r"layer 0 caches rows of \d+ bytes \(uint8\).*float32"):
            model(input_ids=ids, past_key_values=numbers)


def test_gradients_pass_through_the_code(model: Any) -> None:
    """Straight-through: every parameter is trained; the code is none of them."""
    trained, ids = coded(donor_model(), 0.25).train().requires_grad_(True), token_ids(2, 16)
    trained(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in trained.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached, name
        assert ".code." not in name
    assert relative(logits(trained.eval(), ids), logits(model, ids)) < SAME


def test_a_short_padded_batch_has_the_same_gradient_with_a_cache(model: Any) -> None:
    trained, ids = coded(donor_model(), 0.25).requires_grad_(True), token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    gradients = []
    for use_cache in (True, False):
        trained.zero_grad()
        trained(input_ids=ids, attention_mask=mask, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append(trained.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad.clone())
    assert relative(*gradients) < 1e-4


def test_an_export_refuses_codes_by_name(tmp_path: Path) -> None:
    donor = open_donor(str(make_donor(tmp_path / "donor")))
    method = CodedMLA(donor.config, MLASettings(kv_bits="auto"), "quick")
    stock, ids = donor.model("cpu"), token_ids(8, 32)
    stock.get_input_embeddings().weight.requires_grad_(True)
    method.share_out(whole_model_sensitivities(stock, ids))
    saved = assembled(stock, method, converted_layers(stock, method, ids))
    folder = tmp_path / "coded"
    folder.mkdir()
    save_file(stored_weights(saved), folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, method, donor, torch.float32)
    for form in ("own", "deepseek_v3", "youtu", "gguf"):
        with pytest.raises(ExportError, match=r"caches coded latents .*--kv-bits 16 --profile portable"):
            mhconvert.export(str(folder), to=form, output=str(tmp_path / f"{form}.gguf"))
