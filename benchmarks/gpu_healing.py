"""The steps of benchmarks/gpu_run.py that train: healing, alone and as `accelerate launch` starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_asked import Asked, Found, conversion, each, folder_of, gpu_peak, measured
from gpu_processes import ended_together

ROOT = Path(__file__).resolve().parents[1]
TRAINED_SHARE = 0.7  # of the time that a healing step has left: text, measurements and writing take the rest
LAUNCHED_SHARE = 0.8  # of the time left: what hangs is ended and told before the step is over


def heal(asked: Asked, name: str) -> None:
    """Healing on as many tokens as a trial's speed and the time left allow, which is read again where it is too short;
    and the evaluation text before and after.
    """
    if not folder_of(asked, name).is_dir():  # the step before did not come so far
        asked.keep(conversion=conversion(asked, name))
    asked.keep(before=measured(asked, [folder_of(asked, name)]))
    begun = time.monotonic()
    trial = healed(asked, name, asked.size("trial"))
    beside = time.monotonic() - begun - asked.size("trial") / trial["tokens_per_second"]
    asked.keep(trial=trial)
    tokens = int(TRAINED_SHARE * max(0.0, asked.left() - 1.5 * beside) * trial["tokens_per_second"])
    asked.keep(healing=healed(asked, name, max(tokens, asked.size("batch"))))
    asked.keep(after=measured(asked, [folder_of(asked, name + " healed")]))


def healed(asked: Asked, name: str, tokens: int) -> Found:
    import mhconvert

    settings = mhconvert.HealSettings(
        tokens=tokens,
        data=dict.fromkeys(asked.calibration, 1.0),
        batch_tokens=asked.size("batch"),
        sequence_length=None if asked.device == "cuda" else 64,
        epochs=99,
        device=asked.device,
    )
    checkpoint, output = folder_of(asked, name), folder_of(asked, name + " healed")
    report, peak = gpu_peak(
        asked,
        lambda: mhconvert.heal_model(str(checkpoint), settings, output=str(output), force=True, verify=False),
    )
    healing = report["healing"]
    names = ("trained_tokens", "step_tokens", "tokens_per_second", "seconds")
    held_out = {"before": report["before"]["kl"], "after": report["kl"]}
    return {key: healing[key] for key in names} | {"held_out_kl": held_out, "peak_gpu_bytes": peak}


def distributed(asked: Asked) -> None:
    """One process of DDP and of FSDP 2, as `accelerate launch` starts them: NCCL on a GPU, gloo on a CPU."""
    if not folder_of(asked, "mla, 16 bits").is_dir():
        asked.keep(conversion=conversion(asked, "mla, 16 bits"))
    kinds = ("ddp", "fsdp2") if asked.device == "cuda" else ("ddp",)  # there is no FSDP 2 on a CPU

    def within_its_part(kind: str) -> Found:
        return launched(asked, kind, LAUNCHED_SHARE * asked.left() / (len(kinds) - kinds.index(kind)))

    each(asked, kinds, within_its_part)


def launched(asked: Asked, kind: str, seconds: float) -> Found:
    """Healing by the config of `kind`, which is ended with all its workers after so many seconds."""
    config = ROOT / "recipes" / "accelerate" / f"{kind}.yaml"
    launch = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1"]
    environment = dict(os.environ)
    if asked.device == "cpu":
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        environment["ACCELERATE_USE_CPU"] = "true"
    words = [str(folder_of(asked, "mla, 16 bits")), "--tokens", str(2 * asked.size("batch"))]
    words += ["--batch-tokens", str(asked.size("batch")), "--sequence-length", "64", "--no-verify", "--json"]
    words += ["--data", asked.calibration[0], "-o", str(folder_of(asked, kind)), "--force", "--quiet"]
    with ended_together("GPU_LAUNCH") as mark:  # the launcher's workers would outlive it
        done = subprocess.run(
            [sys.executable, "-m", *launch, "-m", "mhconvert.heal", *words],
            env=environment | mark,
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    report = json.loads(done.stdout.strip().splitlines()[-1])
    return {"processes": report["healing"]["processes"], "kl": report["kl"], "before": report["before"]["kl"]}
