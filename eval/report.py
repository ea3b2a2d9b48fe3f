"""The measured facts of a conversion: `report.json`, the model card beside the weights, and the table for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mhconvert.convert.checkpoint import is_adapter
from mhconvert.eval.units import count, duration, number, share, size

REPORT = "report.json"
CARD = "README.md"


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json` and the model card (README.md) into `folder`; an adapter has its card already."""
    text = json.dumps(json_safe(report), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    if is_adapter(folder):
        return
    (folder / CARD).write_text(model_card(report, licence_file(folder)), encoding="utf-8")


def json_safe(value: Any) -> Any:
    """`value` with every float that JSON cannot write (nan, infinities) as null, and paths as text."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(quantity, donor, converted, remark): the table that the command line and the model card show.

    A quantity that the report lacks has no row.
    """
    table: list[tuple[str, str, str, str]] = []
    perplexity = report.get("perplexity") or {}
    if "converted" in perplexity:
        donor, converted = perplexity.get("donor"), perplexity["converted"]
        times = f"× {converted / donor:.3f}" if donor and converted is not None else ""
        table.append(("perplexity", number(donor), number(converted), times))
    if report.get("kl") is not None:
        table.append(("KL from the donor", "0", number(report["kl"]), "nats a token"))
    if report.get("top1_agreement") is not None:
        table.append(("top-1 agreement", "100 %", share(report["top1_agreement"]), ""))
    tolerance = report.get("tolerance") or {}
    if tolerance:
        measure, limit = tolerance["asked"].split("=")
        found = f"at budget {share(tolerance['kv_budget'])}, on held-out text"
        table.append((f"tolerance {measure} ≤ {limit}", "", number(tolerance["measured"]), found))
    cache = report.get("kv_bytes_per_token") or {}
    if cache:
        donor, converted = cache.get("donor"), cache.get("converted")
        part = share(converted / donor) + " of the donor's" if donor and converted else ""
        table.append(("KV cache a token", size(donor), size(converted), part + ", measured"))
    elements = report.get("kv_elements_per_token") or {}
    if elements:
        part = share(elements["converted"] / elements["donor"]) + " of the donor's, measured"
        donor, converted = (f"{elements[key]:,.10g}" for key in ("donor", "converted"))
        table.append(("KV elements a token", donor, converted, part))
    heads, flops = report.get("active_heads") or {}, report.get("attention_flops") or {}
    if heads:
        part = share(heads["converted"] / heads["donor"]) + " of the donor's"
        table.append(("active heads a token", count(heads["donor"]), count(heads["converted"]), part))
    reads = report.get("kv_heads_read") or {}
    if reads:
        part = share(reads["converted"] / reads["donor"]) + " of the donor's, by a decoding step"
        table.append(("KV heads read", count(reads["donor"]), count(reads["converted"]), part))
    if flops:
        part = f"{share(flops['converted'] / flops['donor'])} behind {flops['context']:,} tokens"
        table.append(("attention FLOPs a token", number(flops["donor"]), number(flops["converted"]), part))
    parameters = report.get("parameters") or {}
    if parameters:
        table.append(("parameters", count(parameters.get("donor")), count(parameters.get("converted")), ""))
    if report.get("seconds") is not None:
        table.append(("time to convert", "", duration(report["seconds"]), ""))
    if report.get("peak_rss_bytes") is not None:
        table.append(("peak memory", "", size(report["peak_rss_bytes"]), "resident"))
    return table


def method_title(method: str) -> str:
    """A method's name as its paper writes it: mla -> MLA, moh -> MoH."""
    return "MoH" if method == "moh" else method.upper()


def healing_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a healed checkpoint: a line of titles, then what was measured before and after."""
    before, perplexity = report["before"], report["perplexity"]
    donor = perplexity["donor"]
    judge = "teacher" if report["healing"]["settings"]["teacher"] else "donor"
    table: list[tuple[str, ...]] = [("", judge, "converted", "healed", "")]
    pair = (before["perplexity"]["converted"], perplexity["converted"])
    times = " → ".join(f"× {value / donor:.3f}" for value in pair) if donor else ""
    table.append(("perplexity", number(donor), *map(number, pair), times))
    table.append((f"KL from the {judge}", "0", number(before["kl"]), number(report["kl"]), "nats a token"))
    table.append(
        ("top-1 agreement", "100 %", share(before["top1_agreement"]), share(report["top1_agreement"]), "")
    )
    return table


def healing_line(report: dict[str, Any]) -> str:
    """How the healing went, in a sentence."""
    healing = report["healing"]
    speed, of_layers = healing.get("tokens_per_second"), healing["settings"].get("layer_tokens")
    stages = [f"each layer on {of_layers:,} tokens"] if of_layers else []
    if healing["steps"]:
        stages.append(f"{healing['trained_tokens']:,} tokens in {healing['steps']:,} steps")
    return (
        f"{', '.join(stages)}, {duration(healing['seconds'])} in all"
        + (f", {speed:,.0f} tokens/s in training" if speed else "")
        + f"; teacher {Path(healing['teacher']).name}"
    )


def curve_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a curve: a line of titles, then one for each budget from the largest down."""
    titles = ("KV budget", "KV cache a token", "perplexity", "", "KL", "top-1", "layer error", "time")
    table: list[tuple[str, ...]] = [titles]
    for point in result["points"]:
        table.append(
            (
                share(point["kv_budget"]),
                size(point["kv_bytes_per_token"]),
                number(point["perplexity"]["converted"]),
                f"× {point['perplexity_ratio']:.3f}",
                number(point["kl"]),
                share(point["top1_agreement"]),
                number(point["mean_relative_error"]),
                duration(point["seconds"]),
            )
        )
    return table


def show(report: dict[str, Any], console: Any) -> None:
    """Print the table, a sample continuation and how to load the checkpoint on a rich console."""
    from rich.markup import escape
    from rich.table import Column, Table

    method = method_title(str(report.get("method", "")))
    title = f"{report.get('donor_name') or report.get('donor', '')} → {method}"
    console.out(title if method else str(report.get("output", "")), highlight=False)
    healed = bool(report.get("healing"))
    titles, *found = healing_rows(report) if healed else [("", "donor", "converted", ""), *rows(report)]
    table = Table(*(Column(title, justify="right" if title else "left") for title in titles))
    for row in found:
        table.add_row(*row)
    console.print(table)
    if healed:
        console.print(escape(healing_line(report)), highlight=False)
    sample = report.get("sample") or {}
    if sample:
        console.print(f"[bold]{escape(sample['prompt'])}[/bold]{escape(sample.get('converted') or '')}")
    if report.get("output") and is_adapter(Path(report["output"])):
        console.print(
            f"\n{escape(str(report['output']))}: an adapter; mhconvert merge makes a checkpoint of it"
        )
    elif report.get("output"):
        console.print(f"\n{escape(str(report['output']))} loads with plain transformers:", highlight=False)
        console.print(
            f"[dim]{escape(loading(str(report['output']), remote_code(report)))}[/dim]",
            highlight=False,
            soft_wrap=True,
        )


def loading(folder: str, remote_code: bool) -> str:
    """Python that loads `folder` where mhconvert is not installed."""
    trust = ", trust_remote_code=True" if remote_code else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{folder}"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})\n'
    )


def remote_code(report: dict[str, Any]) -> bool:
    """Whether the report's folder carries its own modeling file."""
    return bool(report.get("remote_code", True))


def licence_file(folder: Path) -> str | None:
    """The name of the donor's licence file as carried over into `folder`."""
    found = sorted(path.name for path in folder.glob("LICENSE*")) if folder.is_dir() else []
    return found[0] if found else None


def model_card(report: dict[str, Any], licence: str | None = None) -> str:
    """The README.md of a converted checkpoint: what it is, what was measured and how, how to load it."""
    base = report.get("hub_id")
    method = str(report.get("method", ""))
    name = Path(str(report.get("output", ""))).name
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {base}"] if base else []
    head += [f"license: {report['licence']}"] if report.get("licence") else []
    head += ["tags:", "- mhconvert", f"- {method}", "---", ""]
    about = [
        f"# {name}",
        "",
        f"{base or report.get('donor', 'A pretrained model')} with its attention rewritten as {method_title(method)} "
        f"by mhconvert {report.get('versions', {}).get('mhconvert', '')}."
        " The tokenizer and the chat template are the base model's, unchanged.",
        "",
    ]
    facts = _healed(report) if report.get("healing") else _measured(report)
    return "\n".join(head + about + facts + _usage(name, remote_code(report)) + _origin(report, licence))


def _healed(report: dict[str, Any]) -> list[str]:
    titles, *found = healing_rows(report)
    lines = ["## Measured", "", "| " + " | ".join(titles) + " |", "|---|---:|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in found]
    cache = next((row for row in rows(report) if row[0] == "KV cache a token"), None)
    lines += ["", f"The KV cache holds {cache[2]} a token, {cache[3]}."] if cache else []
    heads = report.get("active_heads")
    lines += ["", f"A token has {heads['converted']} of {heads['donor']} heads."] if heads else []
    healing = report["healing"]
    terms = ", ".join(
        f"{name} × {weight:g}" for name, weight in healing["settings"]["loss"].items() if weight
    )
    sources = ", ".join(Path(source).name for source in healing["settings"]["data"])
    lines += ["", f"Healed ({terms}): {healing_line(report)}. Text: {sources}."]
    lines += [f"Measured on {healing['held_out_tokens']:,} tokens of the same text, held out of the healing."]
    if healing.get("plot"):
        lines += ["", f"![loss and KL against tokens]({healing['plot']})"]
    return [*lines, ""]


def _measured(report: dict[str, Any]) -> list[str]:
    lines = ["## Measured", "", "| | base model | this model | |", "|---|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(report)]
    heads = [(layer["k_heads"], layer["v_heads"]) for layer in report.get("layers", []) if "k_heads" in layer]
    if heads:
        lines += ["", f"K + V heads by layer: {', '.join(f'{k} + {v}' for k, v in heads)}."]
    calibration = report.get("calibration") or {}
    if calibration:
        source = calibration.get("source") or calibration.get("sources") or "self"
        source = ", ".join(source) if isinstance(source, (list, tuple)) else source
        held_out = calibration.get("held_out_tokens")
        lines += [
            "",
            f"Calibrated on {calibration.get('tokens', 'an unrecorded number of')} tokens of: {source}"
            + (" (text sampled from the base model itself)." if source == "self" else ".")
            + " Perplexity, KL and agreement are measured on"
            + (f" {held_out} tokens" if held_out else " rows")
            + " of the same text that were held out of the conversion; `mhconvert eval` measures on any text.",
        ]
    return [*lines, ""]


def _usage(name: str, remote: bool) -> list[str]:
    note = "The folder carries its own modeling file, which is why `trust_remote_code=True` is needed."
    note = note if remote else "It is the base model's own architecture: any engine that runs that runs this."
    return ["## Use", "", "```python", loading(name, remote).rstrip(), "```", "", note, ""]


def _origin(report: dict[str, Any], licence: str | None) -> list[str]:
    terms = f"The base model's licence applies and is carried over in `{licence}`." if licence else ""
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
