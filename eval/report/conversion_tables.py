"""Tables and sentences of `report.json`, for the terminal and the model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ...convert.calibration.text_files import told_apart
from ...convert.methods.combinations import behind_adapters
from ...convert.methods.registry import METHODS
from ...convert.recipe.tolerance import OWN_PROMPTS
from ...convert.storage.folder_kind import is_adapter
from .length_rows import by_length, has_codes
from .units import count, duration, number, share, size

FEW_PREDICTED = 0.9  # of the tokens of a healing: below it there is padding, or there are many short texts


def json_safe(value: Any) -> Any:
    """A copy of `value` that JSON can hold: NaN and infinities become None, paths and dictionary keys strings."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cache_row(report: dict[str, Any]) -> tuple[str, str, str, str]:
    """The bytes of the cache. A budget of codes is a share of 16 bits, which a donor in float32 has twice."""
    donor, converted = (report["kv_bytes_per_token"].get(key) for key in ("donor", "converted"))
    part = ""
    if donor and converted:
        part = share(converted / donor) + " of the donor's"
        if has_codes(report) and report.get("dtype") == "float32":
            part += f" float32, {share(2 * converted / donor)} of 16 bits"
    context = report.get("cache_context")
    where = f" at {context:,} tokens" if context else ""
    return "KV cache a token", size(donor), size(converted), f"{part}, measured{where}"


def _tolerance_row(found: dict[str, Any], on_policy: dict[str, Any] | None) -> tuple[str, str, str, str]:
    """What was reached of a tolerance; of one on the model's own text the mean, which is within it, and its error."""
    measure, limit = found["asked"].split("=")
    stderr, where = found.get("stderr"), "on held-out text"
    if on_policy:
        of = f" of {on_policy['prompts']}" if on_policy.get("prompts", OWN_PROMPTS) != OWN_PROMPTS else ""
        where = f"KL on its own texts after {on_policy['count']} prompts{of}"
    value = number(found["measured"]) + (f" ± {stderr:.1g}" if stderr is not None else "")
    return f"tolerance {measure} ≤ {limit}", "", value, f"at budget {share(found['kv_budget'])}, {where}"


def _source_row(name: str, one: dict[str, Any]) -> tuple[str, str, str, str]:
    """What is lost on the held-out rows of one source of calibration text, under its `name`."""
    times, kl = (
        f"{one[field]:.{digits}f}"
        + (f" ± {error:.1g}" if (error := one[f"{field}_stderr"]) is not None else "")
        for field, digits in (("perplexity_ratio", 3), ("kl", 4))
    )
    return (
        f"on {name}",
        "",
        f"× {times}",
        f"KL {kl}{', much more' if one['much'] else ''}",
    )


def conversion_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The rows (quantity, donor, converted, remark) of a conversion's table, without a header.

    A quantity that is missing from the report has no row.
    """
    table: list[tuple[str, str, str, str]] = []
    perplexity = report.get("perplexity") or {}
    if "converted" in perplexity:
        donor, converted = perplexity.get("donor"), perplexity["converted"]
        ratio = f"× {converted / donor:.3f}" if donor and converted is not None else ""
        table.append(("perplexity", number(donor), number(converted), ratio))
    if report.get("kl") is not None:
        table.append(("KL from the donor", "0", number(report["kl"]), "nats a token"))
    if report.get("top1_agreement") is not None:
        table.append(("top-1 agreement", "100 %", share(report["top1_agreement"]), ""))
    found = report.get("by_source") or ()
    table += map(_source_row, told_apart([one["source"] for one in found]), found)
    tolerance = report.get("tolerance") or {}
    if tolerance:
        table.append(_tolerance_row(tolerance, report.get("on_policy")))
    if report.get("kv_bytes_per_token"):
        table.append(_cache_row(report))
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
    table += [(quantity, "", "", value) for quantity, value in by_length(report)]
    parameters = report.get("parameters") or {}
    if parameters:
        table.append(("parameters", count(parameters.get("donor")), count(parameters.get("converted")), ""))
    if report.get("seconds") is not None:
        by_step = ", ".join(
            f"{step['method']} {duration(step['seconds'])}" for step in report.get("steps") or ()
        )
        table.append(("time to convert", "", duration(report["seconds"]), by_step))
    if report.get("peak_rss_bytes") is not None:
        table.append(("peak memory", "", size(report["peak_rss_bytes"]), "resident"))
    return table


def method_title(method: str) -> str:
    """The method's name as its paper spells it: "mla" -> "MLA", "moh" -> "MoH"; upper case if it is not registered."""
    return METHODS[method].label if method in METHODS else method.upper()


def chain_title(report: dict[str, Any]) -> str:
    """The methods that made a checkpoint of the donor in its report, first to last: "DHA, then MoH"."""
    names = [str(step["method"]) for step in behind_adapters(report.get("chain") or [])]
    return ", then ".join(map(method_title, [*names, str(report.get("method", ""))]))


def healing_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a healed checkpoint: a header, then rows (quantity, donor or teacher, converted, healed, remark)."""
    before, perplexity = report["before"], report["perplexity"]
    donor = perplexity["donor"]
    reference = "teacher" if report["healing"]["settings"]["teacher"] else "donor"
    table: list[tuple[str, ...]] = [("", reference, "converted", "healed", "")]
    pair = (before["perplexity"]["converted"], perplexity["converted"])
    ratios = " → ".join(f"× {value / donor:.3f}" for value in pair) if donor else ""
    table.append(("perplexity", number(donor), *map(number, pair), ratios))
    table.append(
        (f"KL from the {reference}", "0", number(before["kl"]), number(report["kl"]), "nats a token")
    )
    table.append(
        ("top-1 agreement", "100 %", share(before["top1_agreement"]), share(report["top1_agreement"]), "")
    )
    return table


def healing_line(report: dict[str, Any]) -> str:
    """One line on the training of a healed checkpoint: tokens and steps, time, tokens/s, teacher."""
    healing = report["healing"]
    speed, layer_tokens = healing.get("tokens_per_second"), healing["settings"].get("layer_tokens")
    stages = [f"each layer on {layer_tokens:,} tokens"] if layer_tokens else []
    if healing["steps"]:
        trained, predicted = healing["trained_tokens"], healing.get("predictions")
        padded = predicted is not None and predicted < FEW_PREDICTED * trained
        of_these = f" ({predicted:,} predicted, the others padding or the first of a text)" if padded else ""
        stages.append(f"{trained:,} tokens{of_these} in {healing['steps']:,} steps")
    if own := healing.get("own_texts"):
        dropped = f"; dropped: {own['empty']} empty, {own['loops']} in loops"
        stages.append(f"{own['rows']:,} texts of its own{dropped if own['empty'] + own['loops'] else ''}")
    return (
        f"{', '.join(stages)}, {duration(healing['seconds'])} in all"
        + (f", {speed:,.0f} tokens/s in training" if speed else "")
        + f"; teacher {Path(healing['teacher']).name}"
    )


def curve_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a KV-budget curve: a header, then one row for each point, in the order of `result["points"]`, and
    one for each of the donor's caches in `result["baselines"]`."""
    titles = ("KV budget", "KV cache", "a token", "perplexity", "", "KL", "top-1", "layer error", "time")
    table: list[tuple[str, ...]] = [titles]
    for point in [*result["points"], *result.get("baselines", ())]:
        table.append(
            (
                point["name"] if "name" in point else share(point["kv_budget"]),
                share(point["kv_share"]),
                size(2 * point["kv_share"] * result["kv_elements_per_token"]),
                number(point["perplexity"]["converted"]),
                f"× {point['perplexity_ratio']:.3f}",
                number(point["kl"]),
                share(point["top1_agreement"]),
                number(point.get("mean_relative_error")),
                duration(point["seconds"]),
            )
        )
    return table


def show(report: dict[str, Any], console: Any) -> None:
    """Print the table, a sample continuation and the loading code of a checkpoint on a rich console."""
    from rich.table import Column, Table
    from rich.text import Text

    method = chain_title(report)
    title = f"{report.get('donor_name') or report.get('donor', '')} → {method}"
    console.out(title if method else str(report.get("output", "")), highlight=False)
    healed = bool(report.get("healing"))
    titles, *rows = (
        healing_rows(report) if healed else [("", "donor", "converted", ""), *conversion_rows(report)]
    )
    table = Table(*(Column(title, justify="right" if title else "left") for title in titles))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for text in report.get("warnings") or ():
        console.print(f"warning: {text}", highlight=False, markup=False)
    if healed:
        console.print(healing_line(report), highlight=False)
    sample = report.get("sample") or {}
    if sample:
        console.print(Text.assemble((sample["prompt"], "bold"), sample.get("converted") or ""))
    if report.get("output") and is_adapter(Path(report["output"])):
        console.print(f"\n{report['output']}: an adapter; mhconvert merge makes a checkpoint of it")
    elif report.get("output"):
        console.print(f"\n{report['output']} loads with plain transformers:", highlight=False)
        console.print(
            loading_code(str(report["output"]), has_remote_code(report)),
            style="dim",
            highlight=False,
            soft_wrap=True,
        )


def loading_code(folder: str, remote_code: bool) -> str:
    """Python source that loads `folder` with transformers alone, without mhconvert."""
    name, trust = json.dumps(folder, ensure_ascii=False), ", trust_remote_code=True" if remote_code else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({name}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})\n"
    )


def has_remote_code(report: dict[str, Any]) -> bool:
    """Whether the checkpoint has its own modeling file, so that transformers needs `trust_remote_code`."""
    return bool(report.get("remote_code", True))
