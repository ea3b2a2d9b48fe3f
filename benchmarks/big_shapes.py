"""Time and memory of a layer of a large donor: its shape and its vocabulary with random weights, few layers.

    PYTHONPATH=. python benchmarks/big_shapes.py FOLDER [--shape llama-3-8b] [--tokens 4096] [-- --to mla …]

What a conversion takes for each layer, and for what is not a layer, are the figures of two runs, with one and with two
layers. Random weights have the time and the memory of trained ones, and no quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.donors import TEXT, make_tokenizer

# (hidden_size, intermediate_size, heads, KV heads, layers), head_dim 128
SHAPES = {"llama-3-8b": (4096, 14336, 32, 8, 32), "llama-3-70b": (8192, 28672, 64, 8, 80)}
VOCABULARY = 128256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration text")
    asked, options = parser.parse_known_args()
    options = [word for word in options if word != "--"] or ["--to", "mla", "--kv-budget", "0.125"]
    runs = [run(asked, layers, options) for layers in (1, 2)]
    stages = {
        name: [found["stage_seconds"].get(name, 0.0) for found in runs] for name in runs[1]["stage_seconds"]
    }
    depth = SHAPES[asked.shape][-1]
    each = {name: round(two - one, 1) for name, (one, two) in stages.items()}
    found = {
        "shape": asked.shape,
        "options": options,
        "tokens": asked.tokens,
        "seconds_a_layer": each,
        "seconds_beside": {name: round(2 * one - two, 1) for name, (one, two) in stages.items()},
        "hours": round(
            (runs[1]["seconds"] + (depth - 2) * (runs[1]["seconds"] - runs[0]["seconds"])) / 3600, 2
        ),
        "peak_gib": [round(found["peak_rss_bytes"] / 2**30, 2) for found in runs],
        "planned_gib": [round(found["memory_needed_bytes"] / 2**30, 2) for found in runs],
    }
    print(json.dumps(found))


def run(asked: argparse.Namespace, layers: int, options: list[str]) -> dict[str, Any]:
    """The report of a conversion of `layers` layers."""
    donor, output = asked.folder / f"{asked.shape}-{layers}", asked.folder / "converted"
    if not donor.is_dir():
        write_donor(donor, asked.shape, layers)
    text = asked.folder / "text.txt"
    text.write_text(TEXT * 400, encoding="utf-8")
    calibration = ["--calibration", str(text), "--calibration-tokens", str(asked.tokens)]
    command = [sys.executable, "-m", "mhconvert", str(donor), *options, *calibration]
    planned = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True, text=True)
    subprocess.run([*command, "-o", str(output), "--force", "--no-verify"], check=True)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report | {"memory_needed_bytes": json.loads(planned.stdout)["memory_needed_bytes"]}


def write_donor(folder: Path, shape: str, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, heads, kv_heads, _ = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="2GB")
    torch.set_default_dtype(torch.float32)
    make_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    main()
