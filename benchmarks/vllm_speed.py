"""Tokens a second of a donor and of what was made of it, in vLLM, in turns: is a smaller cache faster there?

python benchmarks/vllm_speed.py --python VLLM_PYTHON [DONOR CONVERTED [OTHER …]] -o FILE

Without folders it makes a random Llama of 8 layers of 8 × 128 heads, and its mla export with a row of 512 + 64.

Each folder is loaded in a process of its own, and all stay loaded: under every load each reads its prompts and decodes
in turn, REPEATS times, with other prompts each time and no prefix cache, so that nothing is read from an earlier turn.
Prefill is the time until every row has its first token; decoding is the median of the steps after that. After the last
step a row has CONTEXT tokens at most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mhconvert.eval.vllm.engine import Engine

Turn = dict[str, Any]
LEAST_CHUNK = 512  # tokens that vLLM reads in a step, at least; it takes 2,048 or more
ROW = 512 + 64  # of the random pair's latent, elements


def main() -> None:
    given = arguments()
    # GiB of cache in each process: a load that does not fit would be timed with rows that wait.
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(given.cache)
    given.folders = given.folders or random_pair(given.output.with_suffix(".models"))
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                Engine(
                    folder,
                    python=given.python,
                    dtype=given.dtype,
                    max_model_len=max(given.contexts),
                    trust_remote_code=True,
                    enable_prefix_caching=False,
                )
            )
            for folder in given.folders
        ]
        vocabulary = min(_vocabulary(folder) for folder in given.folders)
        rows = []
        for context in given.contexts:
            for batch in given.batches:
                rows += under_load(engines, context, batch, given, vocabulary)
                save(given, engines, rows)


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="the donor first")
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--contexts", default="512,2048,8192", type=_numbers)
    parser.add_argument("--batches", default="1,8", type=_numbers)
    parser.add_argument("--new-tokens", default=16, type=int, help="timed steps")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--cache", default=5, type=int, help="GiB in each process")
    parser.add_argument("-o", "--output", required=True, type=Path)
    return parser.parse_args()


def under_load(engines: list[Engine], context: int, batch: int, given: Any, vocabulary: int) -> list[Turn]:
    """A row for each engine: tokens a second in prefill and in decoding, the latter as a multiple of the donor's."""
    generator = random.Random(f"{context} {batch}")
    spare = batch + batch * context // LEAST_CHUNK
    prompt_tokens = context - given.new_tokens - spare - 2
    turns: list[list[Turn]] = [[] for _ in engines]
    for turn in range(given.repeats + 1):
        prompts = [[generator.randrange(3, vocabulary) for _ in range(prompt_tokens)] for _ in range(batch)]
        for engine, found in zip(engines, turns, strict=True):
            if turn == 0:  # allocations, and kernels made for these shapes
                engine.timed([row[:64] for row in prompts], 2, batch)
            else:
                found.append(engine.timed(prompts, given.new_tokens, spare))
    made = []
    for engine, found in zip(engines, turns, strict=True):
        prefill = batch * prompt_tokens / statistics.median(each["prefill"] for each in found)
        step = statistics.median(seconds for each in found for seconds in each["steps"])
        made.append(
            {
                "model": Path(engine.model).name,
                "context": context,
                "batch": batch,
                "prefill": round(prefill, 1),
                "decode": round(batch / step, 2),
                "cache": engine.about["cache_bytes_per_token"],
                "prefills": [each["prefill"] for each in found],
                "steps": [each["steps"] for each in found],
            }
        )
    for row in made:
        row["decode_ratio"] = round(row["decode"] / made[0]["decode"], 3)
        row["prefill_ratio"] = round(row["prefill"] / made[0]["prefill"], 3)
        shown = {name: value for name, value in row.items() if name not in ("prefills", "steps")}
        print(json.dumps(shown), flush=True)
    return made


def random_pair(place: Path) -> list[Path]:
    """A donor and the export of its conversion, made once; the tokenizer is that of the tests."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.donors import TEXT, make_tokenizer

    donor, latent, served = (place / name for name in ("donor", "latent", "mla-512-64"))
    if served.is_dir():
        return [donor, served]
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    more = {
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "vocab_size": 320,
        "max_position_embeddings": 8192,
    }
    LlamaForCausalLM(LlamaConfig(**shape, **more, bos_token_id=0, eos_token_id=1)).save_pretrained(donor)
    make_tokenizer().save_pretrained(donor)
    text = place / "text.txt"
    text.write_text(TEXT * 40, encoding="utf-8")
    budget = ROW / (2 * 8 * 128)
    convert = (donor, "--to", "mla", "--profile", "portable", "--kv-budget", budget, "--effort", "quick")
    small = ("--calibration", text, "--calibration-tokens", 1024, "--sequence-length", 128, "--force")
    for words in (
        (*convert, *small, "-o", latent),
        ("export", latent, "--to", "deepseek_v3", "-o", served, "--force"),
    ):
        subprocess.run([sys.executable, "-m", "mhconvert.cli.main", *map(str, words), "--quiet"], check=True)
    return [donor, served]


def save(given: Any, engines: list[Engine], rows: list[Turn]) -> None:
    """Write what is there so far."""
    facts = {"dtype": given.dtype, "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
    facts |= {"threads": os.environ.get("OMP_NUM_THREADS"), "load": os.getloadavg()[0]}
    facts |= {name: engines[0].about[name] for name in ("version", "device")}
    given.output.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


if __name__ == "__main__":
    main()
