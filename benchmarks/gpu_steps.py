"""The steps of benchmarks/gpu_run.py: `python gpu_steps.py NAME SETTINGS`, SETTINGS being `Asked` as JSON.

Whatever a step finds is in its record at once, so that one that is ended has said what it knew.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from gpu_asked import CONVERSIONS, Asked, Found, conversion, each, folder_of, gpu_peak, measured
from gpu_healing import distributed, heal
from gpu_smoke import smoke_all

TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa")
LLAMA = {  # the shape of Llama-3.1-8B, which reads more than Llama-3-8B
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "dtype": "bfloat16",
}  # fmt: skip
LOADS: dict[str, Found] = {  # of `mhconvert bench`
    "cuda": {"contexts": [2048, 8192, 32768, 65536], "batch": 4, "new_tokens": 8, "dtype": "bfloat16"},
    "cpu": {"contexts": [64], "batch": 2, "new_tokens": 2},
}


def convert(asked: Asked) -> None:
    """Time, memory and quality of each conversion; one that fails does not keep the others."""
    asked.keep(device_name=device_name(asked.device))
    each(asked, CONVERSIONS, lambda name: conversion(asked, name))


def bench(asked: Asked) -> None:
    """Speed beside the donor: of random weights in the shape of Llama-3.1-8B on a GPU, of the donor's on a CPU."""
    shape = asked.donor
    if asked.device == "cuda":
        shape = str(Path(asked.work) / "llama-3.1-8b")
        Path(shape).mkdir(exist_ok=True)
        (Path(shape) / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    each(asked, CONVERSIONS, lambda name: timed(asked, shape, name))
    if asked.device == "cuda":
        os.environ["MHCONVERT_TRITON"] = "1"
        each(asked, ["mla, coded"], lambda name: timed(asked, shape, name), " by the Triton kernel")


def timed(asked: Asked, shape: str, name: str) -> Found:
    import mhconvert

    method, settings = CONVERSIONS[name]
    kv_budget, kv_bits = settings.get("kv_budget", settings.get("active")), settings.get("kv_bits")
    result, peak = gpu_peak(
        asked,
        lambda: mhconvert.bench(
            shape,
            random=method,
            kv_budget=kv_budget,
            kv_bits=kv_bits,
            device=asked.device,
            **LOADS[asked.device],
        ),
    )
    return {key: result[key] for key in ("batch", "dtype", "device", "rows")} | {"peak_gpu_bytes": peak}


def tasks(asked: Asked) -> None:
    """lm-eval's tasks on the local sets, by the donor and what was made of it."""
    made = [folder_of(asked, name) for name in CONVERSIONS] + [folder_of(asked, "mla, 16 bits healed")]
    settings = {"tasks": TASKS, "data": asked.data, "limit": asked.size("limit")}
    if asked.data is None:
        raise RuntimeError("there is no folder of local sets: name it with --data")
    asked.keep(**measured(asked, [folder for folder in made if folder.is_dir()], **settings))


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


STEPS: dict[str, Callable[[Asked], None]] = {
    "smoke": smoke_all,
    "convert": convert,
    "heal_16bit": lambda asked: heal(asked, "mla, 16 bits"),
    "bench": bench,
    "heal_coded": lambda asked: heal(asked, "mla, coded"),
    "distributed": distributed,
    "tasks": tasks,
}

if __name__ == "__main__":
    STEPS[sys.argv[1]](Asked(**json.loads(sys.argv[2])))
