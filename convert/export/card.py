"""The README.md of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.card_front_matter import front_matter


def write_card(folder: Path, name: str, report: dict[str, Any], donor: dict[str, Any]) -> None:
    """Write README.md: front matter, what it is, and which engines serve it."""
    head = front_matter(
        library="transformers",
        base=donor.get("hub_id"),
        relation="finetune",
        licence=donor.get("licence"),
        tags=["mhconvert", report["method"], "kv-cache"],
    )
    lines = [
        f"# {name}",
        "",
        f"{donor.get('hub_id') or 'A pretrained model'} with latent attention, converted by mhconvert and exported as "
        f"`{report['architecture']}`: a cache of {report['kv_elements_per_token']:,} elements a token. It loads with "
        "plain transformers and needs no remote code.",
        "",
        "| engine | small cache | |",
        "|---|---|---|",
        *(f"| {engine} | {'yes' if served else 'no'} | {how} |" for engine, served, how in report["engines"]),
    ]
    (folder / "README.md").write_text(f"{head}\n" + "\n".join(lines) + "\n", encoding="utf-8")
