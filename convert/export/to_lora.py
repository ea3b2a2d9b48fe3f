"""Exports a Hydra adapter as a LoRA: the same function, which peft alone and LoRA servers load.

    s · B_p A_p + s · B_s A_s W = s · [B_p, B_s] · [A_p; A_s W]

The sequential branch also reads a base layer's bias b, which adds s · B_s A_s b: it becomes the bias of the LoRA
(`lora_bias`), or is added to the base layer's own bias where other targets have none, since peft could not merge that.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from mhconvert.errors import AdapterError, UnsupportedError
from mhconvert.progress import Listener, Progress, ignore

from ..adapters import card
from ..adapters.saved_adapter import PREFIX, WEIGHTS, AdapterFolder, open_adapter, open_base, output_folder
from ..adapters.shape_check import require_fit
from ..checkpoint import provenance
from ..donor.donor import Donor
from ..methods.hydra.branches import as_lora, bias_delta
from ..storage.byte_size import SLACK_BYTES
from ..storage.whole_folder import whole_folder

BIASES = {"none": "none", "all": "all", "hydra_only": "lora_only"}


def export_checkpoint(
    reference: str,
    output: str | None = None,
    *,
    base: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the Hydra adapter `reference` as a LoRA of the same function; options as in `forms.Options`.

    Returns:
        The report: adapter, base, method, output and the facts of the LoRA.

    Raises:
        AdapterError: the adapter has no modules, or does not fit the base model.
        UnsupportedError: it is a LoRA already.
    """
    tell = on_progress or ignore
    adapter = open_adapter(reference, base)
    if adapter.method != "hydra":
        raise UnsupportedError(f"{reference} is a LoRA already")
    if not adapter.modules:
        raise AdapterError(f"{adapter.file} adapts no module; there is nothing to make a LoRA of")
    donor = open_base(adapter, tell, trust_remote_code=trust_remote_code)
    place = output_folder(output, "lora", adapter, donor, force)
    require_fit(adapter, donor)
    tensors, ranks, bias_place = _convert(adapter, donor, tell)
    config = _config(adapter, ranks, bias_place)
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
    """The LoRA's tensors, the rank of each module, and what `_bias_place` says."""
    bias_place = _bias_place(adapter, donor)
    tensors = {PREFIX + _wrapped(name, adapter): adapter.read(key) for name, key in adapter.replaced.items()}
    ranks = {}
    for done, module in enumerate(adapter.modules, 1):
        branches, key = adapter.branches(module), PREFIX + module
        pair = branches.par or branches.seq
        assert pair is not None, "require_fit has seen a pair for every module"
        weight, bias = _own(adapter, donor, f"{module}.weight"), _own(adapter, donor, f"{module}.bias")
        assert weight is not None, "require_fit has seen a weight for every module"
        down, up = as_lora(weight.double(), branches)
        made = {"lora_A.weight": down, "lora_B.weight": up}
        if bias is not None and bias_place != "none":
            delta = bias_delta(bias.double(), branches)
            made |= (
                {"lora_B.bias": delta / (branches.scale or 1.0)}
                if bias_place == "lora"
                else {"base_layer.bias": bias.double() + delta}
            )
        dtype = torch.promote_types(pair[0].dtype, weight.dtype)
        for part, tensor in made.items():
            tensors[f"{key}.{part}"] = _finite(f"{key}.{part}", tensor.to(dtype).contiguous(), adapter)
        ranks[module] = branches.rank
        tell(Progress("export", done, len(adapter.modules)))
    return tensors, ranks, bias_place


def _finite(name: str, tensor: Tensor, adapter: AdapterFolder) -> Tensor:
    """`tensor`. Raises AdapterError where it is not finite."""
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{adapter.file}: exporting it makes {name} infinite; the adapter has diverged")
    return tensor


def _bias_place(adapter: AdapterFolder, donor: Donor) -> str:
    """Where the changes of biases are stored.

    Returns:
        "none": no sequential branch reads a bias. "lora": in the LoRA, since every target has one. "base": in the
        base layers, since only some targets have one, or the adapter holds trained biases already.
    """
    shapes = donor.shapes()
    biased = [module for module in adapter.modules if f"{module}.bias" in shapes]
    if adapter.config.bias != "none":
        return "base"
    if not any("hydra_seq_A" in adapter.modules[module] for module in biased):
        return "none"
    return "lora" if len(biased) == len(adapter.modules) else "base"


def _own(adapter: AdapterFolder, donor: Donor, name: str) -> Tensor | None:
    """A tensor of an adapted layer: the trained one in the adapter, or the base model's; None where there is none."""
    if name in adapter.replaced:
        return adapter.read(adapter.replaced[name])
    return donor.source.read(name) if name in donor.shapes() else None


def _wrapped(name: str, adapter: AdapterFolder) -> str:
    """The name under which peft saves a base tensor: adapted layers are wrapped."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.{kind}" if module in adapter.modules else name


def _config(adapter: AdapterFolder, ranks: dict[str, int], bias_place: str) -> LoraConfig:
    """The LoRA's configuration: alpha / r is the Hydra scale; ranks other than the most frequent one are patterns."""
    ours = adapter.config
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in ranks.items() if own != rank}
    own_biases = BIASES[ours.bias] if ours.bias != "none" else "lora_only" if bias_place == "base" else "none"
    return LoraConfig(
        task_type=ours.task_type,
        base_model_name_or_path=ours.base_model_name_or_path,
        revision=ours.revision,
        inference_mode=True,
        r=rank,
        lora_alpha=_alpha(ours.scale, rank),
        rank_pattern=others,
        alpha_pattern={module: _alpha(ours.scale, own) for module, own in others.items()},
        lora_bias=bias_place == "lora",
        bias=own_biases,  # type: ignore[arg-type]
        target_modules=ours.target_modules,
        exclude_modules=ours.exclude_modules,
        layers_to_transform=ours.layers_to_transform,
        layers_pattern=ours.layers_pattern,
        modules_to_save=ours.modules_to_save,
    )


def _alpha(scale: float, rank: int) -> Any:
    """scale · rank, as an int where it is whole, since LoRA configurations have one."""
    alpha = scale * rank
    return int(alpha) if float(alpha).is_integer() else alpha
