"""Small models with random Hydra adapters, and Hydra's formula written out once more."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mhconvert.convert.methods.hydra import HydraConfig, HydraLayer
from tests.donors import make_config, make_model

TARGETS = ["o_proj", "down_proj"]


class Mlp(nn.Module):
    """10 -> 20 -> 20 -> 3 with biases (or none), as custom models come to peft: no config, no transformers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 20, bias=bias)
        self.head = nn.Linear(20, 3, bias=bias)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(X)))))


def mlp(*, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(bias).to(dtype).eval()


def llama(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return make_model(make_config(**config)).to(dtype)


def inputs(rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 10, generator=torch.Generator().manual_seed(3)).to(dtype)


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(4))


def adapted(base: nn.Module, *, seed: int = 1, std: float = 0.2, **settings: Any) -> Any:
    """`base` (a copy) with one adapter "default" whose matrices are all random; eval mode."""
    defaults: dict[str, Any] = {"r_par": 4, "r_seq": 3, "scale": 0.7}
    model = get_peft_model(copy.deepcopy(base), HydraConfig(**(defaults | settings)))
    randomise(model, seed, std)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int, std: float = 0.2, adapter: str = "default") -> None:
    """Every matrix of the adapter from N(0, std²)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for name in layer.adapter_layer_names:
            matrices = getattr(layer, name)
            if adapter in matrices:
                noise = torch.randn(matrices[adapter].shape, generator=generator, dtype=torch.float64)
                matrices[adapter].copy_(std * noise)


def wrap(base: nn.Module, settings: dict[str, Any], **options: Any) -> Any:
    return get_peft_model(copy.deepcopy(base), HydraConfig(**settings), **options).eval()


def run_mlp(model: Any) -> Tensor:
    return model(inputs(dtype=next(model.parameters()).dtype))


def run_llama(model: Any) -> Tensor:
    return model(input_ids=tokens()).logits


def layers(model: nn.Module) -> list[HydraLayer]:
    return [module for module in model.modules() if isinstance(module, HydraLayer)]


def formula(layer: Any, x: Tensor, names: list[str]) -> Tensor:
    """The adapted layer's output, every term spelt out, from the base layer's own weights."""
    base = layer.get_base_layer()
    y0 = x @ base.weight.T + (0 if base.bias is None else base.bias)
    y = y0.clone()
    for name in names:
        scale = layer.hydra_scale[name]
        if name in layer.hydra_par_A:
            y = y + scale * ((x @ layer.hydra_par_A[name].T) @ layer.hydra_par_B[name].T)
        if name in layer.hydra_seq_A:
            y = y + scale * ((y0 @ layer.hydra_seq_A[name].T) @ layer.hydra_seq_B[name].T)
    return y


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter that belongs to the base model."""
    inside = {
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for attribute in module.adapter_layer_names
    }
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in inside
    }


def difference(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


def relative(left: Tensor, right: Tensor) -> float:
    return ((left.double() - right.double()).norm() / right.double().norm()).item()


def difference_elsewhere(
    folder: Path, model: Any, work: Path, *, without: tuple[str, ...], opener: str
) -> float:
    """The largest difference of the logits of `model` from those of `folder`, in a process of its own.

    without: packages that cannot be imported there. opener: module and class that load the folder, "transformers.X".
    """
    torch.save((tokens(), model(tokens()).logits.detach()), work / "logits.pt")
    module, name = opener.split(".")
    hidden = " = ".join(f"sys.modules['{package}']" for package in without)
    script = (
        f"import sys; {hidden} = None\n"
        f"import torch; from {module} import {name}\n"
        "ids, expected = torch.load(sys.argv[2])\n"
        f"model = {name}.from_pretrained(sys.argv[1]).eval()\n"
        "print((model(ids).logits - expected).abs().max().item())"
    )
    words = [sys.executable, "-c", script, str(folder), str(work / "logits.pt")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
