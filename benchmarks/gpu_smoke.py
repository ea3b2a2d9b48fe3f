"""Every command on a GPU, on a tiny donor; and where a command has figures, beside those of the CPU.

Commands are processes, several at a time: none is timed, and one that breaks the device costs itself alone.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_asked import Asked

PROMPT = "Once upon a time"
CONVERSIONS = {
    "mla-coded": "--to mla --kv-budget 0.25",
    "mla-16": "--to mla --kv-bits 16 --kv-budget 0.5 --fit-steps 4",
    "dha": "--to dha --kv-budget 0.5 --equal-heads --fit-steps 4",
    "moh": "--to moh --active 0.75 --fit-steps 4",
    "swa": "--to swa --context 64 --window 16 --kv-budget 0.75",
    "mla+swa": "--to mla+swa --context 64 --window 16 --kv-budget 0.25",
}
# How far the figures of one command may lie apart on two devices, relative, and why.
SAME = 0.0  # counted
ONE_MODEL = 1e-3  # the same weights in float32: sums in another order
ONE_RECIPE = (
    0.2  # products in 16 bits may give a bit or a head to another component, and steps of a fit go otherwise
)


@dataclass(frozen=True)
class Command:
    """A command line, `{device}` and `{made}` (the folder of the device's outputs) being filled in.

    Attributes:
        figure: of what it prints with --json, to compare; None: only its exit status counts.
    """

    words: str
    figure: Callable[[Any], Any] | None = None
    tolerance: float = SAME
    environment: tuple[tuple[str, str], ...] = ()


def conversions() -> dict[str, Command]:
    """What the other commands read."""
    text = (
        "--effort quick --calibration {text} --calibration-tokens 2048 --sequence-length 64 --device {device}"
    )
    found = {
        name: Command(f"{{small}} {words} {text} -o {{made}}/{name}", lambda r: r["kl"], ONE_RECIPE)
        for name, words in CONVERSIONS.items()
    }
    return found | {"hydra": Command("{small} --to hydra -o {made}/hydra")}


def commands() -> dict[str, Command]:
    """All others. A checkpoint is read from {converted}, the same on both devices."""
    found = {
        "curve": Command(
            "curve {small} --to dha --budgets 0.5 --effort quick --calibration {text} --calibration-tokens 1024 "
            "--sequence-length 64 --device {device}",
            lambda r: r["points"][0]["kl"],
            ONE_RECIPE,
        ),
        "generate, triton": Command(
            generated("mla-coded"), lambda r: r["text"], environment=(("MHCONVERT_TRITON", "1"),)
        ),
        "generate, int4 cache": Command(generated("mla-16") + " --kv-cache-dtype int4", lambda r: r["text"]),
        "eval, quick suite": Command(
            "eval {converted}/mla-16 --suite quick --limit 4 --fresh --device {device}",
            lambda r: [model["value"] for model in r["tasks"][0]["metrics"][0]["models"]],
        ),
        "eval, retrieval": Command("eval {converted}/mla-coded --retrieval --fresh --device {device}"),
        "eval, generation": Command(
            "eval {converted}/mla-coded --generation --max-new-tokens 8 --fresh --device {device}"
        ),
        "eval, refusals": Command("eval {converted}/mla-16 --refusals --fresh --device {device}"),
        "inspect, heads": Command("inspect {small} --heads --device {device}"),
        "bench, random": Command(
            "bench {small} --random --to dha --contexts 64 --batch 2 --new-tokens 2 --device {device}"
        ),
        "bench, compiled": Command(
            "bench {converted}/mla-16 --compile --contexts 64 --batch 2 --new-tokens 2 --device {device}"
        ),
        "export, dha": Command("export {converted}/dha --to nemotron-nas -o {made}/nas --device {device}"),
        "export, lora": Command("export {converted}/hydra --to lora -o {made}/lora --device {device}"),
        "merge": Command("merge {converted}/hydra -o {made}/merged"),
        "verify": Command("verify {converted}/mla-coded"),
        "inspect": Command("inspect {converted}/mla-coded"),
        "donors": Command("donors"),
        "recipes": Command("recipes list"),
    }
    for name in (*CONVERSIONS, "hydra"):
        found[f"eval, {name}"] = Command(
            f"eval {{converted}}/{name} --text {{text}} --sequences 4 --sequence-length 64 --fresh --device {{device}}",
            lambda r: r["texts"][0]["models"][-1]["perplexity"],
            ONE_MODEL,
        )
        found[f"generate, {name}"] = Command(generated(name), lambda r: r["text"])
        if name in CONVERSIONS:
            found[f"bench, {name}"] = Command(
                f"bench {{converted}}/{name} --contexts 64 --batch 2 --new-tokens 2 --dtype float32 "
                "--device {device}",
                lambda r: r["rows"][0]["converted"]["cache_bytes"],
            )
        trained = "hydra --loss ce" if name == "hydra" else "attention" if name == "dha" else "lora"
        found[f"heal, {name}"] = Command(
            f"heal {{converted}}/{name} --tokens 1k --layer-tokens {0 if name == 'hydra' else 128} --data {{text}} "
            f"--sequence-length 64 --batch-tokens 256 --train {trained} --device {{device}} -o {{made}}/{name}-healed",
            lambda r: r["perplexity"]["converted"],
            ONE_RECIPE,
        )
    return found


def generated(name: str) -> str:
    return f"generate {{converted}}/{name} '{PROMPT}' --max-new-tokens 12 --device {{device}}"


def smoke_all(asked: Asked) -> None:
    """Try everything on `asked.device` and on the CPU, and keep what each gave. RuntimeError for what is wrong."""
    devices = dict.fromkeys((asked.device, "cpu"))
    threads = max(1, (os.cpu_count() or 2) // 2)
    with ThreadPoolExecutor(threads) as pool:
        for table in (conversions(), commands()):
            tried = {
                (name, device): pool.submit(attempt, asked, command, device)
                for name, command in table.items()
                for device in devices
                if device == asked.device or command.figure is not None
            }
            for name, command in table.items():
                result = tried[name, asked.device].result()
                if command.figure is not None and asked.device != "cpu":
                    result |= compared(result, tried[name, "cpu"].result(), command.tolerance)
                asked.keep(**{name: result})
    wrong = [name for name, result in asked.found.items() if result["rc"] or not result.get("agrees", True)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(asked.found)} commands fail or differ: {', '.join(wrong)}")


def attempt(asked: Asked, command: Command, device: str) -> dict[str, Any]:
    """rc, seconds, figure, and where it fails the last lines of what it said."""
    work = Path(asked.work)
    made = work / f"smoke-{device}"
    made.mkdir(exist_ok=True)
    places = {"small": asked.small, "text": asked.text[0], "device": device, "made": made}
    words = [
        word.format(**places, converted=work / f"smoke-{asked.device}") for word in shlex.split(command.words)
    ]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "mhconvert", *words, "--json", "--quiet"],
        env=os.environ | {"OMP_NUM_THREADS": "2"} | dict(command.environment),
        capture_output=True,
        text=True,
        timeout=max(1.0, asked.left()),
        check=False,
    )
    result: dict[str, Any] = {"rc": done.returncode, "seconds": round(time.monotonic() - begun, 1)}
    if done.returncode:
        return result | {"last_lines": done.stderr.strip().splitlines()[-4:]}
    return result | ({} if command.figure is None else {"figure": command.figure(json.loads(done.stdout))})


def compared(found: dict[str, Any], on_cpu: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """What the CPU gave, the tolerance, and whether both agree; nothing agrees with what failed."""
    figures = [result.get("figure") for result in (found, on_cpu)]
    return {"cpu": figures[1], "tolerance": tolerance, "agrees": agree(*figures, tolerance)}


def agree(found: Any, expected: Any, tolerance: float) -> bool:
    """Equal, or numbers whose difference is within `tolerance` of the expected one."""
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return abs(found - expected) <= tolerance * abs(expected)
    return found is not None and bool(found == expected)
