"""A Hydra adapter as a LoRA: the same function, in a form that peft alone and LoRA servers load.

    s · B_p A_p + s · B_s A_s W = s · [B_p, B_s] · [A_p; A_s W]

A bias b of a base layer is part of what the sequential branch reads, so s · B_s A_s b comes along: as the bias of a
LoRA (`lora_bias`), or, where other targets have none and peft could not merge that, in the base layers' own biases.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from mhconvert.convert import provenance
from mhconvert.convert.adapter import card
from mhconvert.convert.adapter.folder import (
    PREFIX,
    WEIGHTS,
    AdapterFolder,
    open_adapter,
    open_base,
    output_folder,
)
from mhconvert.convert.donor import Donor
from mhconvert.convert.errors import UnsupportedError
from mhconvert.convert.adapter.merging import as_lora, bias_delta
from mhconvert.convert.progress import Listener, Progress, ignore
from mhconvert.convert.whole_folder import whole_folder

SLACK_BYTES = 1 << 20  # config, README, headers
BIASES = {"none": "none", "all": "all", "hydra_only": "lora_only"}


def run(
    reference: str,
    output: str | None = None,
    *,
    base: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """See `mhconvert.api.export`."""
    tell = on_progress or ignore
    adapter = open_adapter(reference, base)
    if adapter.method != "hydra":
        raise UnsupportedError(f"{reference} is a LoRA already")
    donor = open_base(adapter, tell, trust_remote_code=trust_remote_code)
    place = output_folder(output, "lora", adapter, donor, force)
    adapter.require_fit(donor)
    tensors, ranks, travels = _convert(adapter, donor, tell)
    config = _config(adapter, ranks, travels)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    report = {
        "adapter": reference,
        "base": adapter.base,
        "method": "lora",
        "output": str(place),
        "modules": sorted(adapter.modules),
        "rank": config.r,
        "rank_pattern": config.rank_pattern,
        "lora_bias": config.lora_bias,
        "bias": config.bias,
        "output_bytes": size,
    }
    with whole_folder(place, size + SLACK_BYTES, force=force) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        card.write(folder, place.name, donor, card.about_lora(report))
        provenance.record(folder, donor, exported=report)
    tell(Progress("done", 1, 1, str(place)))
    return report


def _convert(
    adapter: AdapterFolder, donor: Donor, tell: Listener
) -> tuple[dict[str, Tensor], dict[str, int], str]:
    """The LoRA's tensors, the rank of each module, and how biases travel: "none", "lora" or "base"."""
    travels = _how_biases_travel(adapter, donor)
    tensors = {PREFIX + _wrapped(name, adapter): adapter.read(key) for name, key in adapter.replaced.items()}
    ranks = {}
    for done, module in enumerate(adapter.modules, 1):
        branches, key = adapter.branches(module), PREFIX + module
        pair = branches.par or branches.seq
        assert pair is not None, "require_fit has seen a pair for every module"
        down, up = as_lora(donor.source.read(f"{module}.weight").double(), branches)
        tensors[f"{key}.lora_A.weight"] = down.to(pair[0].dtype).contiguous()
        tensors[f"{key}.lora_B.weight"] = up.to(pair[0].dtype).contiguous()
        ranks[module] = branches.rank
        own = _bias(adapter, donor, module)
        if travels == "lora" and own is not None:
            delta = bias_delta(own.double(), branches) / (branches.scale or 1.0)
            tensors[f"{key}.lora_B.bias"] = delta.to(pair[0].dtype)
        elif travels == "base" and own is not None:
            tensors[f"{key}.base_layer.bias"] = (own.double() + bias_delta(own.double(), branches)).to(
                pair[0].dtype
            )
        tell(Progress("export", done, len(adapter.modules)))
    return tensors, ranks, travels


def _how_biases_travel(adapter: AdapterFolder, donor: Donor) -> str:
    """ "none": no sequential branch reads one. "lora": every target has one. "base": some have, or biases were trained
    and are in the adapter already."""
    shapes = donor.shapes()
    biased = [module for module in adapter.modules if f"{module}.bias" in shapes]
    if adapter.config.bias != "none":
        return "base"
    if not any("hydra_seq_A" in adapter.modules[module] for module in biased):
        return "none"
    return "lora" if len(biased) == len(adapter.modules) else "base"


def _bias(adapter: AdapterFolder, donor: Donor, module: str) -> Tensor | None:
    """The bias that the module's branches read: trained along with them, or the base model's."""
    name = f"{module}.bias"
    if name in adapter.replaced:
        return adapter.read(adapter.replaced[name])
    return donor.source.read(name) if name in donor.shapes() else None


def _wrapped(name: str, adapter: AdapterFolder) -> str:
    """A base tensor's name as peft saves it: an adapted layer is wrapped."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}" if module in adapter.modules else name


def _config(adapter: AdapterFolder, ranks: dict[str, int], travels: str) -> LoraConfig:
    """alpha / r is the Hydra scale in every module; ranks that differ from the most frequent one go by module."""
    ours = adapter.config
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in ranks.items() if own != rank}
    own_biases = BIASES[ours.bias] if ours.bias != "none" else "lora_only" if travels == "base" else "none"
    return LoraConfig(
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.revision,
        inference_mode=True,
        r=rank,
        lora_alpha=_alpha(ours.scale, rank),
        rank_pattern=others,
        alpha_pattern={module: _alpha(ours.scale, own) for module, own in others.items()},
        lora_bias=travels == "lora",
        bias=own_biases,  # type: ignore[arg-type]
        target_modules=ours.target_modules,
        exclude_modules=ours.exclude_modules,
        layers_to_transform=ours.layers_to_transform,
        layers_pattern=ours.layers_pattern,
        modules_to_save=ours.modules_to_save,
    )


def _alpha(scale: float, rank: int) -> Any:
    """A whole number where it is one, as LoRA configs have it."""
    alpha = scale * rank
    return int(alpha) if float(alpha).is_integer() else alpha
