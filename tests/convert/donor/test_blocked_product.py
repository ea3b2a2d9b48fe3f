"""The head's product by blocks of the vocabulary, and its gradient without the blocks in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhconvert.convert.donor import blocked_product as module
from mhconvert.convert.donor.blocked_product import blocked_product


@pytest.mark.parametrize("rows", [5, 8, 19])
def test_product_and_gradient_are_those_of_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_BLOCK", 8)
    weight = torch.randn(rows, 6).to(torch.bfloat16)
    x, behind = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, rows)
    whole = F.linear(x, weight.float())
    [expected] = torch.autograd.grad(whole, x, behind)
    product = blocked_product(x, weight, torch.bfloat16)
    [found] = torch.autograd.grad(product, x, behind)
    torch.testing.assert_close(product, whole)
    torch.testing.assert_close(found, expected)


def test_no_block_is_kept_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_BLOCK", 8)
    with torch.inference_mode():  # as the weights may have been read
        weight = torch.randn(32, 6).to(torch.bfloat16)
    x = torch.randn(4, 6, requires_grad=True)

    def kept(product: Callable[[], Tensor]) -> tuple[Tensor, list[torch.Size]]:
        shapes: list[torch.Size] = []

        def pack(tensor: Tensor) -> Tensor:
            shapes.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return product(), shapes

    block = weight[:8].clone().float()
    assert kept(lambda: F.linear(x, block))[1] == [(6, 8)]  # which is what must not be
    product, shapes = kept(lambda: blocked_product(x, weight, torch.bfloat16))
    assert shapes == []
    product.sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(4, -1).clone())
