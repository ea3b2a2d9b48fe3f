"""README.md of folders with an adapter, and of what is made from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.card_front_matter import front_matter
from ..checkpoint.markdown_text import inline
from ..donor.donor import Donor


def write(folder: Path, name: str, donor: Donor, text: str, *, library: str = "peft") -> None:
    """Write README.md: front matter, title and `text`.

    Args:
        library: the Hub's name of the library that loads the folder.
    """
    head = front_matter(
        library=library,
        base=donor.hub_id,
        relation="adapter" if library == "peft" else "finetune",
        licence=donor.licence,
        tags=["mhconvert"],
    )
    (folder / "README.md").write_text(f"{head}\n# {inline(name)}\n\n{text}\n", encoding="utf-8")


def about_new(report: dict[str, Any]) -> str:
    """The text about a new, untrained adapter."""
    chosen, parameters = report["settings"], report["parameters"]
    return (
        f"A Hydra adapter (r_par {chosen['r_par']}, r_seq {chosen['r_seq']}, scale {chosen['scale']:g}) of "
        f"{inline(report['donor'])} on {len(report['modules'])} modules ({', '.join(report['target_modules'])}): "
        f"{parameters['trainable']:,} trainable parameters, {100 * parameters['share']:.3g} % of the base model's. "
        "It is untrained as it is written: with it the base model computes what it computes without. What it was "
        "trained on since is in `mhconvert.json`."
    )


def about_merged(report: dict[str, Any]) -> str:
    """The text about a checkpoint with an adapter merged into its weights."""
    return (
        f"{inline(report['base'])} with a {report['method']} adapter merged into {len(report['modules'])} of its "
        "modules. A plain checkpoint: it loads as the base model does, with neither peft nor mhconvert."
    )


def about_lora(report: dict[str, Any]) -> str:
    """The text about a LoRA made from a Hydra adapter."""
    text = (
        f"A Hydra adapter of {report['base']} as a LoRA of rank {report['rank']}, the same to rounding. It loads "
        "with peft, and mhconvert need not be installed."
    )
    if report["lora_bias"]:
        text += " It has biases (`lora_bias`), which not every server reads"
    elif report["bias"] != "none":
        text += (
            f" It carries biases of base layers (`bias: {report['bias']}`), which peft loads, for one LoRA of a model "
            "and no second, and servers may ignore"
        )
    else:
        return text
    return f"{text}; `mhconvert merge` makes a plain checkpoint."
