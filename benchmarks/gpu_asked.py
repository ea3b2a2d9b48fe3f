"""What the steps of benchmarks/gpu_run.py are given and share: their record, the conversions, the evaluation text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Found = dict[str, Any]
# What is made of the donor: method and settings. The first two are healed.
CONVERSIONS: dict[str, tuple[str, Found]] = {
    "mla, 16 bits": ("mla", {"kv_bits": "16", "kv_budget": 0.3125}),
    "mla, coded": ("mla", {"kv_budget": 0.125}),
    "dha": ("dha", {"kv_budget": 0.6667}),
    "moh": ("moh", {"active": 0.75}),
}
# By device: tokens of calibration, of a step of healing and of the trial that finds its speed; rows of evaluation text;
# questions of a task.
SIZES = {
    "cuda": {"calibration": 65536, "batch": 32768, "trial": 262144, "rows": 64, "limit": 200},
    "cpu": {"calibration": 1024, "batch": 512, "trial": 2048, "rows": 2, "limit": 4},
}


@dataclass
class Asked:
    """What a step is given; see `gpu_run.Inputs`. `work` is for folders that later steps read."""

    donor: str
    small: str
    text: list[str]
    calibration: list[str]
    data: str | None
    device: str
    seconds: float
    work: str
    record: str
    begun: float = field(default_factory=time.monotonic)
    found: Found = field(default_factory=dict)

    def keep(self, **found: Any) -> None:
        """Add to the record."""
        self.found |= found
        beside = Path(self.record).with_suffix(".new")
        beside.write_text(json.dumps(self.found), encoding="utf-8")
        beside.replace(self.record)

    def size(self, name: str) -> int:
        return SIZES[self.device][name]

    def left(self) -> float:
        """Seconds until this step is ended."""
        return self.seconds - (time.monotonic() - self.begun)


def conversion(asked: Asked, name: str) -> Found:
    import mhconvert
    from mhconvert.convert.methods.registry import settings_class

    method, settings = CONVERSIONS[name]
    recipe = mhconvert.Recipe(
        model=asked.donor,
        method=method,
        settings=settings_class(method)(**settings),
        output=str(folder_of(asked, name)),
        calibration=mhconvert.Calibration(sources=tuple(asked.calibration), tokens=asked.size("calibration")),
        effort="default" if asked.device == "cuda" else "quick",
        device=asked.device,
        verify=False,
    )
    report, peak = gpu_peak(asked, lambda: mhconvert.convert_model(recipe, force=True))
    names = ("kv_bytes_per_token", "perplexity", "kl", "seconds", "stage_seconds", "peak_rss_bytes")
    return {key: report.get(key) for key in names} | {"peak_gpu_bytes": peak}


def measured(asked: Asked, checkpoints: list[Path], **settings: Any) -> Found:
    """By model: perplexity, KL and top-1 agreement on the evaluation text; with `settings` what these ask for."""
    import mhconvert

    length = {} if asked.device == "cuda" else {"sequence_length": 64}
    of_text = {"text": tuple(asked.text), "sequences": asked.size("rows")} | length
    result = mhconvert.evaluate(
        list(map(str, checkpoints)),
        mhconvert.EvalSettings(**(settings or of_text)),
        against=asked.donor,
        device=asked.device,
    )
    if settings:
        primary = {
            task["task"]: [
                model["value"]
                for metric in task["metrics"]
                if metric["primary"]
                for model in metric["models"]
            ]
            for task in result["tasks"]
        }
        return {"models": [model["name"] for model in result["models"]], "tasks": primary}
    texts = result["texts"][0]["models"]
    return {model["role"]: figures for model, figures in zip(result["models"], texts, strict=True)}


def each(asked: Asked, names: Iterable[str], work: Callable[[str], Found], suffix: str = "") -> None:
    """Do `work` for each name and keep what it finds or how it fails; RuntimeError at the end where one failed."""
    failed = []
    for name in names:
        begun = time.monotonic()
        try:
            found = work(name)
        except Exception as error:  # whatever it is, the others go on
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            failed.append(name + suffix)
        asked.keep(**{name + suffix: found | {"wall_seconds": round(time.monotonic() - begun, 2)}})
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed: {asked.found[failed[0]]['error']}")


def folder_of(asked: Asked, name: str) -> Path:
    return Path(asked.work) / name.replace(", ", "-").replace(" ", "-")


def gpu_peak(asked: Asked, work: Callable[[], Found]) -> tuple[Found, int | None]:
    """What `work` returns, and the most bytes of GPU memory that torch had meanwhile; None on a CPU."""
    if asked.device == "cpu":
        return work(), None
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return work(), torch.cuda.max_memory_allocated()
