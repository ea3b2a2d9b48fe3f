"""Attention beyond the trained length: plain within it, and beyond as a slow reading of the paper has it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mhconvert.errors import MhconvertError
from mhconvert.eval.long_context import chunks
from mhconvert.eval.long_context.attention import IMPLEMENTATION, Reach
from mhconvert.eval.long_context.chunks import Chunks
from mhconvert.eval.long_context.window import Window
from tests.donors import make_config, make_model

TRAINED, SIZE, NUMBER, LENGTH = 40, 8, 5, 90
HEADS, KV_HEADS = 4, 2
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32, 2 layers, sums in another order
IDS = torch.randint(2, 320, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def model_of(**config: Any) -> Any:
    return make_model(make_config(heads=HEADS, kv_heads=KV_HEADS, hidden=32, **config))


def reaching(model: Any, rule: Any, *sizes: int) -> Any:
    """`model` with the rule, a class, for every layer."""
    reach = Reach(rule(*sizes, model.model.rotary_emb.inv_freq))
    for layer in model.model.layers:
        reach.attach(layer.self_attn)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(ids, **inputs).logits
    return found


RULES: dict[str, tuple[Any, ...]] = {
    "longheads": (Chunks, TRAINED, SIZE, NUMBER),
    "window": (Window, TRAINED),
}


@pytest.fixture(scope="module", params=RULES)
def reacher(request: pytest.FixtureRequest) -> Any:
    return reaching(model_of(), *RULES[request.param])


@pytest.mark.parametrize(
    "rule", [(Chunks, LENGTH, SIZE, NUMBER), (Window, LENGTH), (Chunks, TRAINED, SIZE, 1 + LENGTH // SIZE)]
)
def test_within_the_trained_length_and_with_every_chunk_it_is_plain_attention(rule: tuple[Any, ...]) -> None:
    torch.testing.assert_close(logits(reaching(model_of(), *rule)), logits(model_of()), **CLOSE)


def test_beyond_it_only_later_tokens_change(reacher: Any) -> None:
    changed = (logits(reacher) - logits(model_of())).abs().amax((0, 2)) > 1e-3
    assert not changed[:TRAINED].any()
    assert changed[TRAINED + SIZE :].all()


@pytest.mark.parametrize("early", [False, True], ids=["layers as they come", "layers by the config"])
def test_steps_and_blocks_are_one_forward_pass(reacher: Any, early: bool) -> None:
    cache = DynamicCache(config=reacher.config) if early else DynamicCache()
    cuts = [0, 30, 55, *range(56, 66), 80, LENGTH]
    parts = [IDS[:, a:b] for a, b in itertools.pairwise(cuts)]
    read = torch.cat([logits(reacher, part, past_key_values=cache) for part in parts], dim=1)
    torch.testing.assert_close(read, logits(reacher), **CLOSE)


def test_padding_on_the_left_changes_nothing(reacher: Any) -> None:
    padding = 23
    ids = IDS.clone()
    ids[0] = torch.cat((ids[0, :1].expand(padding), ids[0, :-padding]))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    read = logits(reacher, ids, attention_mask=mask)
    alone = logits(reacher, IDS[:1, :-padding])
    torch.testing.assert_close(read[:1, padding:], alone, **CLOSE)
    torch.testing.assert_close(read[1:], logits(reacher)[1:], **CLOSE)
    written = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    together = reacher.generate(ids, attention_mask=mask, **written)[0, LENGTH:]
    assert torch.equal(together, reacher.generate(IDS[:1, :-padding], **written)[0, LENGTH - padding :])


@pytest.mark.parametrize("hidden", [slice(-3, None), slice(4, 6)], ids=["right", "middle"])
def test_padding_elsewhere_is_refused(reacher: Any, hidden: slice) -> None:
    mask = torch.ones_like(IDS)
    mask[1, hidden] = 0
    with pytest.raises(MhconvertError, match="padded on the left alone"):
        logits(reacher, attention_mask=mask)


def test_rows_that_a_cache_reorders_are_read_as_they_are(reacher: Any) -> None:
    """What is known of chunks belongs to the very keys that it was made of."""
    cache = DynamicCache()
    logits(reacher, IDS[:, :80], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-20)  # in the middle of a chunk
    read = logits(reacher, IDS.flip(0)[:, 60:], past_key_values=cache)
    torch.testing.assert_close(read, logits(reacher, IDS.flip(0))[:, 60:], **CLOSE)


def test_a_cache_that_does_not_keep_all_keys_is_refused(reacher: Any) -> None:
    cache = StaticCache(config=reacher.config, max_cache_len=128)
    with pytest.raises(MhconvertError, match="this cache has a StaticLayer"):
        logits(reacher, past_key_values=cache)
    with pytest.raises(MhconvertError, match="this cache has a StaticLayer"):
        reacher.generate(IDS, max_new_tokens=4, cache_implementation="static")


def states(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (H, T, d), keys and values (G, T, d) of layer 0 before RoPE, for the first row."""
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(IDS[:1]))
    maps = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    query, key, value = (
        m(hidden)[0].unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1) for m in maps
    )
    return query, key, value


def at(model: Any, state: Tensor, position: int) -> Tensor:
    """A state (d,) with RoPE at `position`."""
    cos, sin = model.model.rotary_emb(state[None], torch.tensor([[position]]))
    found: Tensor = apply_rotary_pos_emb(state[None, None, None], state[None, None, None], cos, sin)[0]
    return found[0, 0, 0]


def slow_longheads(
    model: Any, head: int, position: int, representation: list[Tensor]
) -> tuple[Tensor, set[int]]:
    """The output (d,) of one query of layer 0 and the chunks it reads: the chosen tokens stand one behind the other."""
    query, key, value = (
        state[index] for state, index in zip(states(model), (head, head // 2, head // 2), strict=True)
    )
    own = position // SIZE
    scores = {chunk: float(query[position] @ representation[chunk]) for chunk in range(1, own - 1)}
    best = sorted(scores, key=lambda chunk: -scores[chunk])[: NUMBER - 3]
    read = {0, own - 1, own, *best}
    tokens = [t for chunk in sorted(read) for t in range(chunk * SIZE, (chunk + 1) * SIZE) if t <= position]
    assert len(tokens) <= TRAINED
    asked = at(model, query[position], len(tokens) - 1)
    products = torch.stack([asked @ at(model, key[t], place) for place, t in enumerate(tokens)])
    weights = (products / math.sqrt(len(asked))).softmax(0)
    return weights @ value[tokens], read


def test_chunks_and_positions_are_those_of_a_slow_reading() -> None:
    with torch.no_grad():
        plain, model = model_of(), reaching(model_of(), *RULES["longheads"])
        heard: list[Tensor] = []
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs: heard.append(inputs[0])
        )
        logits(model, IDS[:1])
        _, key, _ = states(plain)
        seen = set()
        for head in range(HEADS):
            mean = [key[head // 2, a : a + SIZE].mean(0) for a in range(0, LENGTH - SIZE, SIZE)]
            for position in (40, 47, 48, 63, 71, 72, 89):
                expected, read = slow_longheads(plain, head, position, mean)
                seen.add((position, tuple(read)))
                torch.testing.assert_close(
                    heard[0][0, position].unflatten(0, (HEADS, -1))[head], expected, **CLOSE
                )
    assert len(seen) > 7  # heads of one position read different chunks


def test_a_window_is_the_first_tokens_and_the_recent_ones_side_by_side() -> None:
    with torch.no_grad():
        plain, model = model_of(), reaching(model_of(), *RULES["window"])
        heard: list[Tensor] = []
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs: heard.append(inputs[0])
        )
        logits(model, IDS[:1])
        query, key, value = states(plain)
        for position in (40, 41, 77, 89):
            tokens = [0, 1, 2, 3, *range(position - TRAINED + 5, position + 1)]
            for head in range(HEADS):
                asked = at(plain, query[head, position], TRAINED - 1)
                products = torch.stack(
                    [asked @ at(plain, key[head // 2, t], n) for n, t in enumerate(tokens)]
                )
                expected = (products / math.sqrt(len(asked))).softmax(0) @ value[head // 2, tokens]
                torch.testing.assert_close(
                    heard[0][0, position].unflatten(0, (HEADS, -1))[head], expected, **CLOSE
                )


def test_a_query_reads_no_more_keys_in_a_longer_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per query at most `number` chunks of keys, and one representation a chunk: the cost is linear."""
    reads: list[int] = []
    scored = chunks.scored

    def counted(asked: Tensor, keys: Tensor) -> Tensor:
        reads.append(len(asked) * len(keys))
        return scored(asked, keys)

    monkeypatch.setattr(chunks, "scored", counted)
    model = reaching(model_of(layers=1), *RULES["longheads"])
    totals = []
    for length in (80, 160, 320):
        reads.clear()
        logits(model, IDS[:1, :80].repeat(1, length // 80))
        totals.append(sum(reads) / (length - TRAINED))
    most = HEADS * SIZE * NUMBER
    assert totals == [most] * 3  # whole chunks are scored, keys behind the query among them
