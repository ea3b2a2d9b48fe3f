"""Tokens a second of a donor and its conversions in llama.cpp, in one run.

    .venv/bin/python -m tests.engines.llamacpp_speed donor.gguf mla.gguf --server .venv-llamacpp/bin/llama-server

Each model has a server of its own, one at a time, and models take turns within each setting, so that a busier machine
meets all of them. `--llama FOLDER FILE` first writes a folder of class Llama (a donor, or `--to dha --uniform`) as a
GGUF file; a portable MLA checkpoint is written by `mhconvert export CKPT --to auto --for llama.cpp`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.engines import llama_server
from tests.engines.llama_gguf import write_llama
from tests.engines.llama_server import LlamaServer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files, the donor first")
    parser.add_argument("--server", default="llama-server")
    parser.add_argument("--contexts", type=_numbers, default=[512, 2048, 8192])
    parser.add_argument("--batches", type=_numbers, default=[1, 8])
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=320, help="prompts are random ids below it")
    parser.add_argument("--llama", nargs=2, metavar=("FOLDER", "FILE"), action="append", default=[])
    parser.add_argument("--kind", default="q8_0", help="of the matrices that --llama writes")
    asked = parser.parse_args()
    for folder, file in asked.llama:
        write_llama(Path(folder), Path(file), asked.kind)
    if not asked.files:
        return
    about = llama_server.about(asked.server)
    for context in asked.contexts:
        for batch in asked.batches:
            for row in _setting(asked, context, batch):
                print(json.dumps(row | about | {"context": context, "batch": batch}), flush=True)


def _setting(asked: argparse.Namespace, context: int, batch: int) -> list[dict[str, Any]]:
    """A row for each file: medians over the rounds."""
    found: dict[Path, list[tuple[float, float]]] = {file: [] for file in asked.files}
    for _ in range(asked.rounds):
        for file in asked.files:
            found[file].append(_measure(asked, file, context, batch))
            print(f"{context} x {batch} {file.name}: {found[file][-1]}", file=sys.stderr)
    return [
        {
            "file": file.name,
            "prompt": round(statistics.median(prompt for prompt, _ in runs), 2),
            "decode": round(statistics.median(decode for _, decode in runs), 2),
        }
        for file, runs in found.items()
    ]


def _measure(asked: argparse.Namespace, file: Path, context: int, batch: int) -> tuple[float, float]:
    """Tokens a second of prompts of `context` tokens, and of decoding after them: of all `batch` rows together."""
    cells = batch * (context + asked.new + 8)
    with LlamaServer(asked.server, file, "-c", cells, "-np", batch, "-t", asked.threads) as server:
        slots = range(batch)
        rows = [[2 + (slot + 7 * n) % (asked.vocab - 2) for n in range(context)] for slot in slots]

        def ask(slot: int, new: int) -> None:
            body = {"prompt": rows[slot], "n_predict": new, "temperature": 0, "ignore_eos": True}
            server.post("/completion", body | {"id_slot": slot, "cache_prompt": True})

        with ThreadPoolExecutor(batch) as pool:
            seconds = []
            for new in (1, 1 + asked.new):  # the second time the prompts are cached
                begun = time.perf_counter()
                list(pool.map(ask, slots, [new] * batch))
                seconds.append(time.perf_counter() - begun)
    return batch * context / seconds[0], batch * (1 + asked.new) / seconds[1]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
