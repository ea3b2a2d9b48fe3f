"""Tokens a second of a donor and its conversions in llama.cpp, in one run.

    PYTHONPATH=. .venv/bin/python tests/engines/llamacpp_speed.py FOLDER --server .venv-llamacpp/bin/llama-server

FOLDER gets a random Llama of 3 layers and 8 heads of 128 elements, `--to mla --profile portable` of it with rows of
512 + 64 elements, and `--to dha --uniform --kv-budget 0.5`, each as a GGUF file; what is there is used again. With
`--files` other GGUF files are measured, the donor first. Each has a server of its own, one at a time, and they take
turns within a setting, so that a busier machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.engines import llama_server
from tests.engines.exported_forms import Forms
from tests.engines.llama_gguf import write_llama
from tests.engines.llama_server import LlamaServer

POSITIONS = 16384


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", nargs="+", type=Path)
    parser.add_argument("--server", default="llama-server")
    parser.add_argument("--contexts", type=_numbers, default=[512, 2048, 8192])
    parser.add_argument("--batches", type=_numbers, default=[1, 8])
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=320, help="prompts are random ids below it")
    parser.add_argument("--kind", default="q8_0", help="of the matrices that are written")
    asked = parser.parse_args()
    asked.files = asked.files or _written(asked.folder, asked.kind)
    about = llama_server.about(asked.server)
    for context in asked.contexts:
        for batch in asked.batches:
            for row in _setting(asked, context, batch):
                print(json.dumps(row | about | {"context": context, "batch": batch}), flush=True)


def _written(folder: Path, kind: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    forms = Forms(_cli, folder, POSITIONS)
    donor, dha = forms.donor(128), forms.dha("--uniform", "--kv-budget", 0.5)
    llamas = [write_llama(each, folder / f"{each.name}-{kind}.gguf", kind) for each in (donor, dha)]
    return [llamas[0], forms.gguf(forms.portable(128, (512 + 64) / (2 * 8 * 128)), kind), llamas[1]]


def _cli(*words: object, **_: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mhconvert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
