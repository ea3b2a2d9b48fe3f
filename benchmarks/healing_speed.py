"""Healing beside a plain Trainer that distils with whole logits: tokens a second and peak memory, in turns.

    PYTHONPATH=. python benchmarks/healing_speed.py CHECKPOINT TEXT [--tokens 16k] [--train lora] [--rounds 2]

CHECKPOINT is what mhconvert made of a donor, TEXT a file to learn from. Both train the same tensors at the same rate,
on rows of the same length, as many of them in memory together. Each run is a process of its own. Beside other work the
tokens of a second of the CPU's time are what compares.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROW, ROWS_TOGETHER, ROWS_A_STEP = 1024, 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--row", type=int, default=ROW, help="tokens of a row")
    parser.add_argument("--train", choices=("lora", "attention", "all"), default="lora")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=RIVALS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(RIVALS[asked.only](asked) | {"peak_rss_bytes": peak_rss()}))
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in RIVALS}
    for _ in range(asked.rounds):
        for name, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, runs[-1], file=sys.stderr, flush=True)
    best = {name: max(run["tokens_per_second"] for run in runs) for name, runs in found.items()}
    peak = {name: min(run["peak_rss_bytes"] for run in runs) for name, runs in found.items()}
    own = {name: max(run["tokens_per_cpu_second"] for run in runs) for name, runs in found.items()}
    ratios = {
        "speed": round(best["mhconvert"] / best["trainer"], 2),
        "speed_of_cpu": round(own["mhconvert"] / own["trainer"], 2),
        "memory": round(peak["mhconvert"] / peak["trainer"], 2),
    }
    print(json.dumps({"train": asked.train, "tokens": asked.tokens, "runs": found} | ratios))


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_mhconvert(asked: argparse.Namespace) -> dict[str, Any]:
    import mhconvert
    from mhconvert.heal.distill import Distillation

    train, seconds = Distillation.train, []

    def timed(*words: Any) -> None:
        begun = time.process_time()
        train(*words)
        seconds.append(time.process_time() - begun)

    Distillation.train = timed  # type: ignore[method-assign]
    settings = mhconvert.HealSettings(
        tokens=asked.tokens,
        data={str(asked.text): 1.0},
        train=asked.train,
        batch_tokens=ROWS_A_STEP * asked.row,
        micro_batch=ROWS_TOGETHER,
        sequence_length=asked.row,
        eval_tokens=asked.tokens,
        save_tokens=asked.tokens,
        held_out=1,
        epochs=99,
    )
    with tempfile.TemporaryDirectory() as folder:
        report = mhconvert.heal_model(asked.checkpoint, settings, output=f"{folder}/healed", verify=False)
    speed = report["healing"]["tokens_per_second"]
    return {"tokens_per_second": speed, "tokens_per_cpu_second": asked.tokens / seconds[0]}


def by_trainer(asked: argparse.Namespace) -> dict[str, Any]:
    """As a script of the Hub's examples does it: both models' logits whole, in the dtype that is loaded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from mhconvert.convert.open_model import open_model, recorded_donor
    from mhconvert.heal.student import LEARNING_RATES, choose_trained

    tokenizer = AutoTokenizer.from_pretrained(asked.checkpoint)
    ids = tokenizer(asked.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    number = -(-asked.tokens // asked.row)
    rows = ids.repeat(-(-number * asked.row // len(ids)))[: number * asked.row].reshape(number, asked.row)
    teacher = open_model(recorded_donor(asked.checkpoint)).model().eval().requires_grad_(False)
    model = AutoModelForCausalLM.from_pretrained(
        asked.checkpoint, trust_remote_code=True, dtype=torch.float32
    )
    student = choose_trained(model, asked.train, 16)

    class Distillation(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            own = model(input_ids=inputs["input_ids"]).logits.float().log_softmax(-1)
            with torch.no_grad():
                taught = teacher(input_ids=inputs["input_ids"]).logits.float().log_softmax(-1)
            lost = torch.nn.functional.kl_div(own, taught, reduction="sum", log_target=True)
            return lost / inputs["input_ids"].numel()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=ROWS_TOGETHER,
            gradient_accumulation_steps=ROWS_A_STEP // ROWS_TOGETHER,
            max_steps=number // ROWS_A_STEP,
            learning_rate=LEARNING_RATES[asked.train],
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Distillation(student, arguments, train_dataset=[{"input_ids": row} for row in rows])
        begun, used = time.perf_counter(), time.process_time()
        trainer.train()
    return {
        "tokens_per_second": asked.tokens / (time.perf_counter() - begun),
        "tokens_per_cpu_second": asked.tokens / (time.process_time() - used),
    }


RIVALS = {"trainer": by_trainer, "mhconvert": by_mhconvert}


if __name__ == "__main__":
    main()
