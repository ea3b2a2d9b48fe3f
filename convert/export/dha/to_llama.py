"""`mhconvert export CKPT --to llama`: a DHA checkpoint as grouped-query attention in its donor's own class."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, LlamaConfig

from mhconvert.errors import ExportError
from mhconvert.progress import Listener, ignore

from ...families.facts import attention_facts, class_free_values, family_of, layer_window
from .head_groups import GroupPlan, plan_layers
from .output_folder import INPUTS, Target, shapes, write
from .source_checkpoint import DHACheckpoint, open_dha

TO = "llama"
OUTPUT_BIAS_FIELDS = (
    "attention_bias",
    "attention_out_bias",
)  # of configs: give o_proj a bias, and no MLP one
# Families whose blocks differ from Llama's only in windows and in which projections have biases.
LLAMA_LIKE = ("llama", "mistral", "ministral", "qwen2")


def export_checkpoint(
    reference: str,
    output: str | None = None,
    *,
    force: bool = False,
    duplicate: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `reference` as its donor's own class, with as many KV heads in every layer.

    A donor whose class has no bias of o_proj, which fused values need, becomes a Llama where its blocks are Llama's.

    Args:
        force, verify, dry_run, trust_remote_code: as in `forms.Options`.
        duplicate: whether heads may be cached twice where groups do not come out equal.
    Returns:
        The report: checkpoint, method, to, output, architecture, num_key_value_heads, heads_by_layer, duplicated_heads,
        kv_bytes_per_token {checkpoint, export}, dtype, biases, output_bytes, exact.
    Raises:
        ExportError: naming what the class cannot hold, before any weight is read.
    """
    checkpoint = open_dha(reference, TO, trust_remote_code)
    if checkpoint.stock:
        raise ExportError(f"{reference} is a {_class(checkpoint.config)} already: engines load it as it is")
    return write(
        checkpoint, target(checkpoint, duplicate), output, force, verify, on_progress or ignore, dry_run
    )


def target(checkpoint: DHACheckpoint, duplicate: bool) -> Target:
    """The export in a stock class. Raises ExportError where none holds the checkpoint."""
    config = _stock_config(checkpoint)
    plans = plan(checkpoint, duplicate, uniform=True, to=TO)
    _require_norm_in_place(checkpoint, plans)
    config.num_key_value_heads = plans[0].groups
    architecture = _class(config)
    config.architectures = [architecture]
    config.dtype = checkpoint.dtype
    made = Target(
        TO,
        architecture,
        config.to_diff_dict(),
        plans,
        biases(config),
        facts={"num_key_value_heads": plans[0].groups},
        note="It loads with plain transformers and needs no remote code.",
    )
    _require_fit(checkpoint, made, config)
    return made


def plan(checkpoint: DHACheckpoint, duplicate: bool, *, uniform: bool, to: str) -> list[GroupPlan]:
    """The layers of the checkpoint as grouped-query attention; see `plan_layers`."""
    return plan_layers(
        checkpoint.maps,
        uniform=uniform,
        duplicate=duplicate,
        head_bytes=checkpoint.head_bytes,
        donor_heads=2 * attention_facts(checkpoint.donor_config).kv_heads,
        way_out=_way_out(checkpoint, to),
    )


def _way_out(checkpoint: DHACheckpoint, to: str) -> str:
    """What a user can do where heads do not come out as equal groups."""
    if attention_facts(checkpoint.donor_config).qk_norm:
        return "or serve it with trust_remote_code=True"
    if to == TO:
        return "or export --to nemotron-nas, where layers may differ; or convert again with --uniform"
    return "or convert again with --equal-heads, or with --uniform"


def biases(config: Any) -> tuple[str, ...]:
    """The attention projections that have a bias in the class of `config`."""
    facts = attention_facts(config)
    return (*(INPUTS if facts.input_bias else ()), *(("o_proj",) if facts.output_bias else ()))


def llama_config(checkpoint: DHACheckpoint, to: str) -> LlamaConfig:
    """The donor's configuration as a Llama configuration. Raises ExportError naming what Llama does not have."""
    donor, facts = checkpoint.donor_config, attention_facts(checkpoint.donor_config)
    windows = (layer_window(donor, index) for index in range(donor.num_hidden_layers))
    index, window = next(((i, size) for i, size in enumerate(windows) if size), (None, None))
    reason = None
    if donor.model_type not in LLAMA_LIKE:
        reason = f"{donor.model_type} blocks are not Llama's"
    elif index is not None:
        reason = f"layer {index} sees the last {window} tokens only, and a Llama sees all"
    if reason:
        raise ExportError(
            f"{to} cannot hold {checkpoint.reference}: {reason}; serve it with trust_remote_code=True"
        )
    values = class_free_values(donor)
    known = LlamaConfig().to_dict().keys() & values.keys()
    config = LlamaConfig(**{name: values[name] for name in known} | {"head_dim": facts.head_dim})
    config.attention_bias = facts.input_bias or checkpoint.output_bias is not None
    return config


def _require_norm_in_place(checkpoint: DHACheckpoint, plans: list[GroupPlan]) -> None:
    """Raises ExportError where heads are moved or copied that one norm divides all together."""
    facts = attention_facts(checkpoint.donor_config)
    own = (tuple(range(facts.heads)), tuple(range(facts.kv_heads)))
    moved = next((index for index, plan in enumerate(plans) if (plan.order, plan.k_heads) != own), None)
    if facts.qk_norm == "width" and moved is not None:
        raise ExportError(
            f"{TO} cannot hold {checkpoint.reference}: layer {moved} needs copies of K heads, and the donor's norm "
            "divides all K heads by one RMS; serve it with trust_remote_code=True"
        )


def _class(config: Any) -> str:
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return str(model.__name__)


def _stock_config(checkpoint: DHACheckpoint) -> Any:
    """The donor's own configuration, with an o_proj bias if needed; a Llama configuration where only Llama has one."""
    donor = checkpoint.donor_config
    family, facts = family_of(donor), attention_facts(donor)
    if family.fused_qkv:
        raise ExportError(
            f"{TO} cannot hold {checkpoint.reference}: in {donor.model_type} models q, k and v are one "
            "matrix, which this export does not write; serve it with trust_remote_code=True"
        )
    if facts.output_bias or checkpoint.output_bias is None:
        return copy.deepcopy(donor)
    if family.output_bias in OUTPUT_BIAS_FIELDS:
        config = copy.deepcopy(donor)
        setattr(config, str(family.output_bias), True)
        return config
    try:
        return llama_config(checkpoint, TO)
    except ExportError as error:
        raise ExportError(
            f"{checkpoint.output_bias}, what fused values lack of the donor's means, has no place in a "
            f"{donor.model_type} model and would be lost; {error}"
        ) from error


def _require_fit(checkpoint: DHACheckpoint, planned: Target, config: Any) -> None:
    """Raises ExportError unless the tensors of the export are exactly those of the class, with their shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    places = {name: tensor.shape for name, tensor in model.state_dict().items()}
    coming = {name: tensor.shape for name, tensor in shapes(checkpoint, planned).items()}
    if config.tie_word_embeddings:
        coming.setdefault("lm_head.weight", places["lm_head.weight"])
    for name in sorted(places.keys() | coming.keys()):
        if places.get(name) != coming.get(name):
            wanted, given = (list(s[name]) if name in s else "none" for s in (places, coming))
            raise ExportError(
                f"{planned.architecture} cannot hold {checkpoint.reference}: its {name} has shape {wanted}, and the "
                f"checkpoint would give {given}"
            )
