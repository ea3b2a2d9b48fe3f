"""vLLM's own search for latent attention, and the forward that it makes, on a folder and without vLLM installed.

Run as `python vllm_fuser.py VLLM_SOURCE FOLDER MODULES`; prints one line of JSON. Of vLLM run
`model_executor/models/transformers/{fuser,fx_utils}.py` and `…/fusers/*.py`, unchanged. Stubbed is all else that they
import: packages are empty, loggers say nothing, the registry of gated activations is empty, and every other name is a
torch module that does nothing (vLLM's linear and norm layers, communication between devices, weight loaders).
`cachetools.cached` is stubbed where it is not installed. `vllm_mla` is a plain float32 attention on latents that takes
and gives what vLLM's interface of that name does.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HOME = "vllm.model_executor.models.transformers"
REAL = (f"{HOME}.fuser", f"{HOME}.fx_utils", f"{HOME}.fusers")


class Silent:
    """A logger; vLLM's have methods that say a thing once."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Stub(types.ModuleType):
    """A module that has every name."""

    VALUES = {"init_logger": lambda name: Silent(), "_ACTIVATION_AND_MUL_REGISTRY": {}}  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = self.VALUES.get(name, type(name, (torch.nn.Module,), {}))
        return self.__dict__.setdefault(name, made)


class Finder:
    """Finds REAL modules in VLLM_SOURCE and makes stubs of the others."""

    def __init__(self, source: Path):
        self.source, self.stubs = source, list[str]()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != "vllm":
            return None
        if name.startswith(REAL):
            return importlib.machinery.PathFinder.find_spec(
                name, [str(self.source.joinpath(*name.split(".")).parent)]
            )
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        self.stubs.append(spec.name)
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def cached(cache: dict[Any, Any], key: Any) -> Any:
    """`cachetools.cached`, as far as it is used."""

    def wrap(function: Any) -> Any:
        def known(*arguments: Any) -> Any:
            found = key(*arguments)
            if found not in cache:
                cache[found] = function(*arguments)
            return cache[found]

        return known

    return wrap


def latent_attention(
    module: Any, query: Tensor, latent: Tensor, k_rot: Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [1, H, T, n + p], latent [1, 1, T, r], k_rot [1, 1, T, p], causal -> [T, H v], as vLLM's layer gives it."""
    heads, length = query.shape[1:3]
    k_up, v_up = module.kv_b_proj.weight.view(heads, -1, latent.shape[-1]).split(
        [module.qk_nope_head_dim, module.v_head_dim], dim=1
    )
    q_nope, q_rot = query[0].split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    scores = torch.einsum("htn,hnr,sr->hts", q_nope, k_up, latent[0, 0])
    scores = (scores + torch.einsum("htp,sp->hts", q_rot, k_rot[0, 0])) * scaling
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    return torch.einsum("hts,sr,hvr->thv", weights, latent[0, 0], v_up).flatten(1), None


def main(source: str, folder: str) -> dict[str, Any]:
    """What vLLM finds in each layer, and how far its rewritten forward is from the folder's own."""
    finder = Finder(Path(source))
    sys.meta_path.insert(0, finder)
    if importlib.util.find_spec("cachetools") is None:
        sys.modules["cachetools"] = types.ModuleType("cachetools")
        sys.modules["cachetools"].cached = cached  # type: ignore[attr-defined]
    get_fusers = importlib.import_module(f"{HOME}.fuser").get_fusers
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    layers, real = [], set()
    for layer in model.model.layers:
        attention = layer.self_attn
        fusers = {type(fuser).__name__: fuser for fuser in get_fusers(attention)}
        real |= {type(fuser).__module__ for fuser in fusers.values()}
        found: dict[str, Any] = {"fusers": list(fusers)}
        if "MLAFuser" in fusers:
            mla, interface = fusers["MLAFuser"], fusers["AttentionFuser"]
            norm = attention.get_submodule(mla.kv_a_layernorm_name)
            [norm_fuser] = get_fusers(norm)
            names = ("q_proj", "q_a_proj", "kv_a_proj", "kv_a_layernorm", "kv_b_proj", "o_proj")
            found |= {name: getattr(mla, f"{name}_name") for name in names}
            found |= {
                "norm": type(norm_fuser).__name__,
                "norm_eps": getattr(norm, norm_fuser.eps_attr),
                "zero_centered": norm_fuser.zero_centered,
                "scale": interface.scale(attention),
                "layer": interface.layer_index(attention),
            }
            attention.forward = types.MethodType(mla.fused_forward, attention)
        layers.append(found)
    difference = None
    if all("MLAFuser" in layer["fusers"] for layer in layers):
        ALL_ATTENTION_FUNCTIONS.register("vllm_mla", latent_attention)
        model.config._attn_implementation = "vllm_mla"
        with torch.no_grad():
            difference = (model(ids, use_cache=False).logits - expected).norm() / expected.norm()
    return {
        "layers": layers,
        "relative_difference": None if difference is None else difference.item(),
        "stubs": finder.stubs,
        "real": sorted(real),
    }


if __name__ == "__main__":
    sys.modules["mhconvert"] = None  # type: ignore[assignment]
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
