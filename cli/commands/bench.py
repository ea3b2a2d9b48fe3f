"""`mhconvert bench`: how fast a converted checkpoint reads and writes, beside its donor."""

from __future__ import annotations

from typing import Any, TextIO

import typer

from ...eval.settings import OWN_CACHE
from ..options import common, timing
from ..options.from_settings import settings_options, values_of
from ..options.ignored import refuse_ignored
from ..output import Flags, calm_transformers, execute
from ..progress import progress


@settings_options(*common.method_groups(["mla"], ["kv_budget", "kv_bits"]), common.KV_CACHE)
def command(
    checkpoint: common.Checkpoint,
    against: common.Against = None,
    contexts: timing.Contexts = "512,2048,8192",
    batch: timing.Batch = 8,
    new_tokens: timing.NewTokens = 16,
    step_tokens: timing.StepTokens = 1,
    chunk_tokens: timing.ChunkTokens = None,
    reexpand: timing.Reexpand = False,
    static_cache: timing.StaticCache = False,
    compile: timing.Compile = False,
    random: timing.Random = False,
    to: common.AnyMethod = None,
    dtype: timing.RunDtype = None,
    device: common.Device = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    **options: Any,
) -> None:
    """Time prefill and decode of a converted checkpoint and of its donor, in turns."""
    lengths, of_shape = _numbers(contexts), {name: options[name] for name in ("kv_budget", "kv_bits")}
    _refuse_ignored(random, {"to": to, "against": against, "reexpand": reexpand, **of_shape})

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.bench(
                checkpoint,
                against=against,
                contexts=lengths,
                batch=batch,
                new_tokens=new_tokens,
                step_tokens=step_tokens,
                chunk_tokens=chunk_tokens,
                reexpand=reexpand,
                static_cache=static_cache,
                compile=compile,
                random=(to or "mla") if random else None,
                **of_shape,
                **values_of(common.KV_CACHE, options),
                dtype=dtype,
                device=device,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, show)


def show(result: dict[str, Any], console: Any) -> None:
    """Print the timings: a line for each model at each context."""
    from rich.table import Column, Table

    of = result["checkpoint"] or f"{result['random']}, random weights"
    console.out(f"{result['against']} → {of}", highlight=False)
    plural = "s" * (result["threads"] > 1)
    place = f"cpu, {result['threads']} thread{plural}" if result["device"] == "cpu" else result["device"]
    how = f"{result['cache']} cache" + (", compiled" if result["compiled"] else "")
    if result.get("kv_cache_dtype", OWN_CACHE) != OWN_CACHE:
        how += f", the second model's of {result['kv_cache_dtype']}"
    if result["step_tokens"] > 1:
        how += f", steps of {result['step_tokens']} tokens"
    if result["chunk_tokens"]:
        how += f", prompts in pieces of {result['chunk_tokens']:,}"
    console.out(f"batch {result['batch']}, {result['dtype']}, {place}, {how}", highlight=False)
    names = (
        "context",
        "",
        "prefill tok/s",
        "prefill",
        "decode tok/s",
        "±",
        "decode",
        "KV cache",
        "",
        "step memory",
    )
    table = Table(*(Column(name, justify="left" if name == "" else "right") for name in names))
    for row in result["rows"]:
        donor, converted, slow = (row.get(name) for name in ("donor", "converted", "reexpanded"))
        table.add_section()
        table.add_row(f"{row['context']:,}", "donor", *_cells(donor, 1.0, 1.0, 1.0))
        ratios = row["prefill_ratio"], row["ratio"], row["cache_ratio"]
        table.add_row("", "converted", *_cells(converted, *ratios))
        if slow:
            table.add_row(
                "", "re-expanded", *_cells(slow, None, row["ratio"] / row["ratio_to_reexpanded"], None)
            )
    console.print(table)
    if result.get("kv_cache_dtype", OWN_CACHE) != OWN_CACHE and result["dtype"] == "float32":
        console.out(
            "KV caches are compared with a float32 one; of 16-bit bytes they are twice the share",
            highlight=False,
        )


def _cells(
    timing: dict[str, Any], prefill: float | None, decode: float, cache: float | None
) -> tuple[str, ...]:
    """What follows a model's name; the ratios are to the donor."""
    from ...eval.report.units import number, share, size

    read, memory = timing.get("prefill_tokens_per_s"), timing["step_memory_bytes"]
    return (
        f"{read:,.0f}" if read else "",
        f"× {number(prefill)}" if prefill else "",
        f"{timing['decode_tokens_per_s']:,.1f}",
        share(timing["step_spread"]),
        f"× {number(decode)}",
        size(timing["cache_bytes"]) if cache else "",
        share(cache) if cache else "",
        "" if memory is None else size(memory),
    )


def _numbers(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--contexts '{words}' is not a list of whole numbers like 512,2048"
        ) from None


def _refuse_ignored(random: bool, given: dict[str, Any]) -> None:
    """Raise BadParameter for what shapes are only timed by, and for what they are not."""
    if not random:
        names = [name for name in given if name not in ("against", "reexpand")]
        refuse_ignored(given, names, "goes with --random; a checkpoint has its own")
        return
    refuse_ignored(given, ["against"], "does not go with --random, which times CKPT's own shape")
    if given["to"] not in (None, "mla"):
        refuse_ignored(given, ["reexpand"], f"is of mla: leave it out with --to {given['to']}")
