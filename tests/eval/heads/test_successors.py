"""The successor probe on a model whose heads were made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhconvert.eval.heads.successors import ORDERS, successors, successors_of
from tests.donors import make_config, make_model, make_tokenizer

TOKENS, HEAD = 24, 32
FIRST, ORDER = 23, [3, 17, 8, 0, 12, None, 5, 9, 14, 2]
PAIRS = [(3, 17), (17, 8), (8, 0), (0, 12), (5, 9), (9, 14), (14, 2)]


def made() -> Any:
    """Layer 0: head 0 writes the next of ORDER, and the first token of a text loudly; head 1 writes what it looks at.
    Layer 1: head 0 writes the one before; head 1 nothing. All look at both tokens alike."""
    config = make_config(
        heads=2, kv_heads=2, hidden=2 * TOKENS, head_dim=HEAD, layers=2, vocab=TOKENS, tied=False
    )
    model = make_model(config)
    following = torch.zeros(TOKENS, TOKENS)
    for item, after in PAIRS:
        following[after, item] = 1
    following[2, FIRST] = 9
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :TOKENS] = torch.eye(TOKENS)
        model.lm_head.weight[:, TOKENS:] = torch.eye(TOKENS)
        for layer, heads in enumerate(
            ((following, torch.eye(TOKENS)), (following.T, torch.zeros(TOKENS, TOKENS)))
        ):
            attention = model.model.layers[layer].self_attn
            for head, written in enumerate(heads):
                rows = slice(head * HEAD, head * HEAD + TOKENS)
                attention.v_proj.weight[rows, :TOKENS] = torch.eye(TOKENS)
                attention.o_proj.weight[TOKENS:, rows] = written
    model.set_attn_implementation("eager")
    return model


def test_the_head_that_was_made_to_is_found() -> None:
    """Though it also sees the first token, of which it writes another item louder."""
    assert successors_of(made(), FIRST, [ORDER]).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_share_is_of_the_pairs() -> None:
    """A second row, of which it knows one pair of three: 8 of 10."""
    found = successors_of(made(), FIRST, [ORDER, [9, 14, 3, 8]])
    assert found[0, 0].item() == pytest.approx(8 / 10)


def test_random_weights_have_no_such_head() -> None:
    model = make_model(make_config(heads=4), std=0.02)
    model.set_attn_implementation("eager")
    scores = successors(model, make_tokenizer())
    assert scores is not None
    assert scores.shape == (2, 4)
    assert scores.max() < 0.25


def test_a_tokenizer_without_such_tokens_has_no_score() -> None:
    class Pairs:
        """ "one two", "Monday Tuesday" and so on are tokens: rows of two, in which nothing else could be meant."""

        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            known = [word for order in ORDERS for word in order.split()[:2]]
            word = text.strip()
            return {"input_ids": [known.index(word)] if word in known else [0, 0]}

    assert successors(None, Pairs()) is None

    class Letters:
        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [*map(ord, text), 0]}

    assert successors(None, Letters()) is None
    assert sum(len(order.split()) - 1 for order in ORDERS) == 71
