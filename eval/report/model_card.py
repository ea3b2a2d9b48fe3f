"""`report.json` and the model card (README.md) of a converted or healed checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...convert.checkpoint.card_front_matter import front_matter
from ...convert.checkpoint.markdown_text import inline
from ...convert.methods.registry import METHODS
from ...convert.recipe.recorded import last_step
from ...convert.storage.folder_kind import is_adapter
from .conversion_tables import (
    chain_title,
    conversion_rows,
    has_remote_code,
    healing_line,
    healing_rows,
    json_safe,
    loading_code,
)
from .layer_kinds import kind_rows, kinds_known, picture, price_notes
from .units import count, share, size

REPORT = "report.json"
CARD = "README.md"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json` and the model card into `folder`; an adapter keeps the card that it has."""
    text = json.dumps(json_safe(report), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    if not is_adapter(folder):
        (folder / CARD).write_text(model_card(report, licence_file(folder)), encoding="utf-8")


def licence_file(folder: Path) -> str | None:
    """The name of the licence file in `folder`, copied from the donor; None if there is none."""
    names = sorted(path.name for path in folder.glob("LICENSE*")) if folder.is_dir() else []
    return names[0] if names else None


def model_card(report: dict[str, Any], licence: str | None = None) -> str:
    """The README.md of a converted checkpoint: description, measured results, loading code, licence.

    Args:
        report: the contents of `report.json`.
        licence: the name of the donor's licence file in the folder.
    """
    base, method = report.get("hub_id"), str(report.get("method", ""))
    name = Path(str(report.get("output", ""))).name
    head = front_matter(
        library="transformers",
        base=base,
        relation="finetune",  # the Hub's relation for everything but an adapter, a merge or a quantisation
        licence=report.get("licence"),
        tags=_tags(method, report),
    )
    donor = inline(base or report.get("donor_name") or report.get("donor", "A pretrained model"))
    about = [
        "",
        f"# {inline(name)}",
        "",
        f"{donor} with its attention rewritten as {chain_title(report)} "
        f"by mhconvert {report.get('versions', {}).get('mhconvert', '')}."
        " The tokenizer and the chat template are the base model's, unchanged.",
        *_reduction(report),
        "",
    ]
    results = _healing_results(report) if report.get("healing") else _conversion_results(report)
    results += _layers(report)
    return head + "\n".join(about + results + usage(name, has_remote_code(report)) + _origin(report, licence))


def _tags(method: str, report: dict[str, Any]) -> list[str]:
    cache = report.get("kv_bytes_per_token") or {}
    smaller = bool(cache.get("donor")) and (cache.get("converted") or cache["donor"]) < cache["donor"]
    tags = [
        "mhconvert",
        method,
        METHODS[method].tag if method in METHODS else None,
        "kv-cache" if smaller else None,
    ]
    return [tag for tag in tags if tag]


def _reduction(report: dict[str, Any]) -> list[str]:
    """The paragraph on the size of the KV cache; empty if it was not measured."""
    cache = report.get("kv_bytes_per_token") or {}
    donor, converted = cache.get("donor"), cache.get("converted")
    if not donor or converted is None:
        return []
    if converted == donor:
        return ["", f"Its KV cache is as large as the base model's: {size(donor)} a token."]
    part = f"{share(converted / donor)} of the base model's {size(donor)}"
    if not (context := report.get("cache_context")):
        return [
            "",
            f"Its KV cache holds {size(converted)} a token, {part}, measured on the cache after generating.",
        ]
    shares = (report.get("windows") or {}).get("shares") or {}
    shorter = [
        f" ({share(part)} at {int(tokens):,})" for tokens, part in shares.items() if int(tokens) < context
    ]
    part += f" where both hold {context:,} tokens{''.join(shorter[:1])}"
    return ["", f"Its KV cache holds {size(converted)} a token, {part}, measured on the cache filled so far."]


def _healing_results(report: dict[str, Any]) -> list[str]:
    """The section with the results of a healed checkpoint."""
    titles, *table = healing_rows(report)
    lines = ["## Measured", "", "| " + " | ".join(titles) + " |", "|---|---:|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    cache = next((row for row in conversion_rows(report) if row[0] == "KV cache a token"), None)
    lines += ["", f"The KV cache holds {cache[2]} a token, {cache[3]}."] if cache else []
    heads = report.get("active_heads")
    lines += ["", f"A token has {heads['converted']} of {heads['donor']} heads."] if heads else []
    healing = report["healing"]
    terms = ", ".join(
        f"{name} × {weight:g}" for name, weight in healing["settings"]["loss"].items() if weight
    )
    sources = ", ".join(Path(source).name for source in healing["settings"]["data"])
    lines += ["", f"Healed ({terms}): {healing_line(report)}. Text: {inline(sources)}."]
    lines += [f"Measured on {healing['held_out_tokens']:,} tokens of the same text, held out of the healing."]
    if healing.get("plot"):
        lines += ["", f"![loss and KL against tokens]({healing['plot']})"]
    return [*lines, ""]


def _protected(report: dict[str, Any]) -> list[str]:
    """The line on the heads that the conversion kept whole, or whose errors it weighed more; [] without any."""
    for kind, done in (("protected", "Protected"), ("weighted", "Weighed more")):
        for key, unit in ((f"{kind}_heads", "head"), (f"{kind}_kv_heads", "KV head")):
            number = sum(len(layer.get(key, ())) for layer in report.get("layers", []))
            if number:
                settings = last_step(report["recipe"])["settings"]
                origin = inline(Path(str(settings["protect"]["from"])).name)
                heads = f"{count(number)} {unit}{'s' * (number > 1)}"
                return ["", f"{done} by the conversion: {heads} ({origin})."]
    return []


def _conversion_results(report: dict[str, Any]) -> list[str]:
    """The section with the results of a converted checkpoint."""
    lines = ["## Measured", "", "| | base model | this model | |", "|---|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in conversion_rows(report)]
    lines += [line for text in report.get("warnings") or () for line in ("", f"Beware: {inline(text)}.")]
    heads = [(layer["k_heads"], layer["v_heads"]) for layer in report.get("layers", []) if "k_heads" in layer]
    if heads:
        lines += ["", f"K + V heads by layer: {', '.join(f'{k} + {v}' for k, v in heads)}."]
    lines += _protected(report)
    calibration = report.get("calibration") or {}
    if calibration:
        source = calibration.get("source") or calibration.get("sources") or "self"
        source = ", ".join(source) if isinstance(source, (list, tuple)) else source
        held_out = calibration.get("held_out_tokens")
        lines += [
            "",
            f"Calibrated on {calibration.get('tokens', 'an unrecorded number of')} tokens of: {inline(source)}"
            + (" (text sampled from the base model itself)." if source == "self" else ".")
            + " Perplexity, KL and agreement are measured on"
            + (f" {held_out} tokens" if held_out else " rows")
            + " of the same text that were held out of the conversion; `mhconvert eval` measures on any text.",
        ]
    return [*lines, ""]


def _layers(report: dict[str, Any]) -> list[str]:
    """The section on layers of several kinds: a picture of them, and each one's share and price; [] without any."""
    if not kinds_known(report):
        return []
    layers = report["layers"]
    titles, *rows = kind_rows(layers)
    lines = ["## Layers", "", f"`{picture(layers)}`", "", *price_notes(report)]
    lines += ["", "<details><summary>each layer</summary>", "", "| " + " | ".join(titles) + " |"]
    lines += ["|---|---|" + "---:|" * (len(titles) - 2), *("| " + " | ".join(row) + " |" for row in rows)]
    return [*lines, "", "</details>", ""]


def usage(name: str, remote: bool) -> list[str]:
    """The Markdown section on loading the model `name`.

    Args:
        remote: whether the checkpoint has its own modeling file.
    """
    note = "The folder carries its own modeling file, which is why `trust_remote_code=True` is needed."
    note = note if remote else "It is the base model's own architecture: any engine that runs that runs this."
    return ["## Use", "", "```python", loading_code(name, remote).rstrip(), "```", "", note, ""]


def _origin(report: dict[str, Any], licence: str | None) -> list[str]:
    """The section on the licence and on the files that record the conversion."""
    terms = f"The base model's licence applies and is carried over in {inline(licence)}." if licence else ""
    terms = terms or "The base model's licence applies; its folder had no licence file to carry over."
    notice = report.get("notice")
    return (
        ["## Origin", "", terms]
        + (["", str(notice)] if notice else [])
        + [
            "",
            "`mhconvert.json` holds the recipe as run and the versions; `report.json` every measured number.",
            "",
        ]
    )
