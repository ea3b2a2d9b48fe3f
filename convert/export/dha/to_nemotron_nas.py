"""`mhconvert export CKPT --to nemotron-nas`: a DHA checkpoint as a Llama with a number of KV heads for each layer.

The format is that of DeciLM and Nemotron-NAS checkpoints. Statements about engines were read in their sources (SGLang
and llama.cpp of 2026: models/nemotron_nas.py, conversion/deci.py); transformers and vLLM 0.32 have been run on it.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from mhconvert.errors import ExportError
from mhconvert.progress import Listener, ignore

from ..engine_support import Engine, Named, require
from . import configuration_nemotron_nas, modeling_nemotron_nas
from .head_groups import GroupPlan
from .output_folder import Target, write
from .source_checkpoint import DHACheckpoint, open_dha
from .to_llama import biases, llama_config, plan

TO = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"
FFN_STEP = 256  # engines round an MLP's width up to a multiple of it
CODE = (configuration_nemotron_nas, modeling_nemotron_nas)


def export_checkpoint(
    reference: str,
    output: str | None = None,
    *,
    force: bool = False,
    duplicate: bool = False,
    engine: Named | None = None,
    verify: bool = True,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `reference` as a nemotron-nas one: K heads = V heads in each layer, in equal groups.

    An MLP whose width is no multiple of FFN_STEP is padded with zeros to one.

    Args:
        engine, force, verify, dry_run, trust_remote_code: as in `forms.Options`.
        duplicate: whether heads may be cached twice where a layer's groups do not come out equal.
    Returns:
        The report: checkpoint, method, to, output, architecture, heads_by_layer, duplicated_heads, kv_bytes_per_token
        {checkpoint, export}, dtype, biases, mlp_width {checkpoint, export}, engines, output_bytes, exact.
    Raises:
        ExportError: naming what the format cannot hold, before any weight is read.
    """
    checkpoint = open_dha(reference, TO, trust_remote_code)
    made = target(checkpoint, duplicate)
    if engine is not None:
        require(made.facts["engines"], engine)
    return write(checkpoint, made, output, force, verify, on_progress or ignore, dry_run)


def target(checkpoint: DHACheckpoint, duplicate: bool) -> Target:
    """The export. Raises ExportError where the blocks are not Llama's, or the groups of a layer are not equal."""
    config = llama_config(checkpoint, TO)
    if config.hidden_act != "silu":
        raise ExportError(
            f"{TO} cannot hold {checkpoint.reference}: hidden_act={config.hidden_act}, engines have silu"
        )
    plans = plan(checkpoint, duplicate, uniform=False, to=TO)
    width = -(-config.intermediate_size // FFN_STEP) * FFN_STEP
    widths = {"checkpoint": config.intermediate_size, "export": width}
    config.intermediate_size = width
    config.num_key_value_heads = max(plan.groups for plan in plans)
    config.dtype = checkpoint.dtype
    return Target(
        TO,
        ARCHITECTURE,
        _values(config, plans),
        plans,
        biases(config),
        width=width,
        code=tuple(Path(inspect.getfile(module)) for module in CODE),
        facts={
            "mlp_width": widths,
            "engines": engines(config, plans),
        },
        note="transformers loads it, and its tokenizer, with trust_remote_code=True; mhconvert need not be installed.",
    )


def ffn_mult(width: int, hidden_size: int) -> float:
    """The ffn_mult from which engines compute an MLP of `width`.

    They round int(2 · ffn_mult · hidden_size / 3) up to a multiple of FFN_STEP.
    """
    factor = 3 * width / (2 * hidden_size)
    assert -(-int(2 * factor * hidden_size / 3) // FFN_STEP) * FFN_STEP == width
    return factor


def engines(config: Any, plans: list[GroupPlan]) -> list[Engine]:
    """Which engines load an export with the Llama configuration `config` and the layers `plans`."""
    uneven = len({plan.groups for plan in plans}) > 1
    rope = config.rope_parameters.get("rope_type", "default")
    sglang = "wants the same number of KV heads in every layer" if uneven else None
    narrow = None
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        narrow = f"has heads of hidden_size / num_attention_heads only, and these have {config.head_dim}"
    dropped = rope not in ("default", "linear", "llama3")
    llama_cpp = narrow or (f"its converter drops {rope} scaling of RoPE" if dropped else None)
    if config.mlp_bias:
        sglang = "drops the biases of the MLP"
    return [
        ("transformers", True, "trust_remote_code=True"),
        ("vLLM", True, "--trust-remote-code, for the configuration's class; the model's is its own (run)"),
        ("SGLang", sglang is None, sglang or "--trust-remote-code, for the configuration's class"),
        (
            "llama.cpp",
            llama_cpp is None,
            llama_cpp or "after its own conversion to GGUF, where that knows the tokenizer",
        ),
        ("MLX", narrow is None, narrow or "mlx-lm, as nemotron-nas (read in source)"),
        ("exllamav3", True, "as DeciLMForCausalLM (read in source)"),
    ]


def _values(config: Any, plans: list[GroupPlan]) -> dict[str, Any]:
    """The content of config.json. RoPE is stated twice: as transformers 5 reads it, and as SGLang and llama.cpp do."""
    rope = dict(config.rope_parameters)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    files = [Path(inspect.getfile(module)).stem for module in CODE]
    block = {"ffn_mult": ffn_mult(config.intermediate_size, config.hidden_size), "no_op": False}
    values = config.to_diff_dict() | {
        "model_type": TO,
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{files[0]}.DeciLMConfig",
            "AutoModel": f"{files[1]}.DeciLMModel",
            "AutoModelForCausalLM": f"{files[1]}.{ARCHITECTURE}",
        },
        "block_configs": [
            {
                "attention": {
                    "n_heads_in_group": plan.group_size,
                    "no_op": False,
                    "replace_with_linear": False,
                },
                "ffn": block | {"replace_with_linear": False},
            }
            for plan in plans
        ],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }
    if "original_max_position_embeddings" in scaling:  # llama.cpp looks for it here
        values["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return values
