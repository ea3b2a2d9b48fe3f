"""The table of speeds: SmolLM2-135M-Instruct's conversions beside their donor, in turns. `make bench` runs it.

    PYTHONPATH=. python benchmarks/speed_table.py FOLDER [-o benchmarks/speed.json] [--method NAME …]

The conversions are made in FOLDER, quickly, as their quality is not what is timed. It takes about an hour and a
quarter on two cores, which have to be idle otherwise; the file is written behind each method, whose rows replace those
that it had.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engines.engines_table import commit

ROOT = Path(__file__).resolve().parents[1]
DONOR = "smollm2-135m"
CONVERSIONS = {
    "MLA": ("31.25 % of the KV cache", "--to mla --kv-bits 16 --kv-budget 0.3125"),
    "MLA, coded": ("12.5 % of the bytes", "--to mla --kv-budget 0.125"),
    "MLA, coded, windows": ("6.25 % of the bytes at 8,192 tokens", "--to mla+swa --kv-budget 0.0625"),
    "DHA": ("66.7 % of the KV cache", "--to dha --kv-budget 0.6667"),
    "MoH": ("75 % of the heads active", "--to moh --active 0.75"),
}
# The donor itself, with a cache of codes.
RIVALS = {"donor, int2 cache": ("18.75 % of the bytes", "--kv-cache-dtype int2")}
QUICKLY = "--effort quick --calibration-tokens 8192 --no-verify"
# What is timed of each: its name in the table, and the options of `mhconvert bench`.
LOADS = {
    "float32, batch 8": "--contexts 512,2048,8192 --batch 8 --new-tokens 8 --dtype float32",
    "float32, batch 1": "--contexts 128,512,2048 --batch 1 --dtype float32",
    "bfloat16, batch 8": "--contexts 512,2048,8192 --batch 8 --new-tokens 4 --dtype bfloat16",
    "float32, batch 1, prompt in pieces of 512": "--contexts 2048 --batch 1 --dtype float32 --chunk-tokens 512",
    "float32, batch 1, steps of 5 tokens": "--contexts 2048 --batch 1 --dtype float32 --step-tokens 5",
}
COLUMNS = [
    {"key": "method", "label": "method"},
    {"key": "setting", "label": "setting"},
    {"key": "load", "label": "load"},
    {"key": "context", "label": "context", "format": "{context:,}"},
    {"key": "donor", "label": "donor, tokens/s"},
    {"key": "converted", "label": "converted, tokens/s"},
    {"key": "decode", "label": "decoding", "format": "{decode:.2f} ×"},
    {"key": "prompt", "label": "prompt", "format": "{prompt:.2f} ×"},
    {"key": "donor_memory", "label": "memory of a step: donor", "format": "{donor_memory} MiB"},
    {"key": "memory", "label": "its own", "format": "{memory} MiB"},
    {"key": "planned", "label": "counted before", "format": "{planned} MiB"},
]
ABOUT = (
    "SmolLM2-135M-Instruct and its conversions, or itself with a quantised cache, timed in turns: tokens a second of a "
    "batch that decodes, by the tokens in the cache, the speed of reading a prompt of one row as a multiple of the "
    "donor's, and the memory that a decoding step takes beside weights and cache."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "speed.json")
    names = [*CONVERSIONS, *RIVALS]
    parser.add_argument("--method", choices=names, action="append", help="only these; may be repeated")
    asked = parser.parse_args()
    for method in asked.method or names:
        write(asked.output, method, timed(method, asked.folder))


def timed(method: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of a conversion, which is made in `folder`, or of a rival."""
    if method in RIVALS:
        setting, words = RIVALS[method]
        model = [DONOR, "--against", DONOR, *words.split()]
    else:
        setting, words = CONVERSIONS[method]
        model = [str(folder / method.lower().replace(", ", "-"))]
        mhconvert(DONOR, *words.split(), *QUICKLY.split(), "-o", *model, "--force")
    rows = []
    for load, options in LOADS.items():
        found = json.loads(mhconvert("bench", *model, *options.split(), "--json"))
        rows += [{"method": method, "setting": setting, "load": load} | row(each) for each in found["rows"]]
    return rows


def write(path: Path, method: str, rows: list[dict[str, Any]]) -> None:
    """The file of the figure with `rows` in the place of those that it has of `method`; each says when it was made."""
    now, order = about(), [*CONVERSIONS, *RIVALS]
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now | {"rows": []}
    made = {name: now[name] for name in ("commit", "date", "machine")}
    kept = [each for each in before["rows"] if each["method"] != method]
    rows = sorted([*kept, *(each | made for each in rows)], key=lambda each: order.index(each["method"]))
    path.write_text(text_of({name: before[name] for name in now}, rows), encoding="utf-8")


def mhconvert(*words: str) -> str:
    """What a command prints; its progress is shown."""
    print("mhconvert", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "mhconvert", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def row(found: dict[str, Any]) -> dict[str, Any]:
    """A context of `mhconvert bench --json`, as the table has it."""
    donor, converted = found["donor"], found["converted"]
    memory = {
        "donor_memory": donor["step_memory_bytes"],
        "memory": converted["step_memory_bytes"],
        "planned": converted["step_memory_planned_bytes"],
    }
    return {
        "context": found["context"],
        "donor": round(donor["decode_tokens_per_s"], 1),
        "converted": round(converted["decode_tokens_per_s"], 1),
        "decode": round(found["ratio"], 2),
        "prompt": round(found["prefill_ratio"], 2),
    } | {name: round(size / 2**20, 1) for name, size in memory.items() if size is not None}


def about() -> dict[str, Any]:
    """What holds for all rows."""
    return {
        "title": "Speed beside the donor",
        "about": ABOUT,
        "command": ["make bench"],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__},
    }


def text_of(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The file of the figure, a row a line."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items()
    ]
    for name, items in (("columns", COLUMNS), ("rows", rows)):
        inner = ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in items)
        lines.append(f'  "{name}": [\n{inner}\n  ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def processor() -> str:
    """Its name as Linux has it, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0]}" if names else platform.machine()


if __name__ == "__main__":
    main()
