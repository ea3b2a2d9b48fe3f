"""Everything that a GPU should be asked, in one run without network. `make gpu` runs it, or

    PYTHONPATH=. python3 benchmarks/gpu_run.py --out FOLDER [--inputs gpu_inputs] [--minutes 8] [--steps smoke,bench]

Each step of benchmarks/gpu_steps.py is a process of its own with a time limit, so that one that fails, overruns or
breaks the device costs itself alone. They come in the order of their worth, and FOLDER/gpu.json has what is found so
far whenever a step has ended. Inputs are named, or are those that `make gpu-inputs` packed. Of Python packages the
machine needs torch, transformers, accelerate and peft; what else mhconvert imports may be among the inputs as wheels.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_processes import ended_together

ROOT = Path(__file__).resolve().parents[1]
# In the order of their worth: a step's part of the time that is left for it and those behind it.
STEPS = {
    "smoke": 20,
    "convert": 20,
    "heal_16bit": 18,
    "bench": 14,
    "heal_coded": 12,
    "distributed": 8,
    "tasks": 8,
}
LEAST_SECONDS = 5.0  # no step is begun with less
LAST_LINES = 12  # of what a step said, when it fails
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors", "lm-eval")
ARCHIVE = "inputs.tar.xz"  # and behind it the number of a piece and how many there are: .000-of-002


@dataclass(frozen=True)
class Inputs:
    """What the steps read.

    Attributes:
        donor, small: references of the donor that is measured, and of a tiny one on which every command is tried.
        text: the evaluation's; calibration: never the evaluation's text.
        data: folder with the local evaluation sets; None: there are none.
    """

    donor: str
    small: str
    text: list[str]
    calibration: list[str]
    data: str | None


def main() -> int:
    asked = arguments(sys.argv[1:])
    begun = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        packed = unpacked(asked.inputs, Path(scratch))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *installed(packed / "wheels", Path(scratch) / "site")]),
            **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
            "TQDM_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MHCONVERT_EVAL_CACHE": str(Path(scratch) / "measured"),
        }
        inputs = chosen(asked, packed)
        report: dict[str, Any] = about(asked, inputs) | {"steps": {}}
        left = [name for name in STEPS if name in asked.steps]
        while left:
            seconds = asked.minutes * 60 - (time.monotonic() - begun)
            name, limit = left[0], seconds * STEPS[left[0]] / sum(STEPS[name] for name in left)
            left = left[1:]
            report["steps"][name] = run(name, asked.device, inputs, limit, Path(scratch), environment)
            report["seconds"] = round(time.monotonic() - begun, 1)
            written(asked.out / "gpu.json", report)
            print(f"{name}: {report['steps'][name]['status']}", file=sys.stderr, flush=True)
    return int(any(step["status"] != "done" for step in report["steps"].values()))


def interrupted(number: int, _frame: object) -> None:
    """Exit as a shell says it, 130 or 143. What runs is ended on the way out, which no second signal interrupts."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json")
    parser.add_argument(
        "--inputs", type=Path, default=ROOT / "gpu_inputs", help="what make gpu-inputs packed"
    )
    parser.add_argument("--donor", help="alias, folder or .gguf file")
    parser.add_argument("--small", help="a tiny donor for the smoke of every command; the donor itself")
    parser.add_argument("--text", nargs="+", help="evaluation text")
    parser.add_argument("--calibration", nargs="+", help="text to calibrate and to heal on")
    parser.add_argument("--data", help="folder with the local evaluation sets")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument(
        "--steps", type=lambda text: text.split(","), default=list(STEPS), help=",".join(STEPS)
    )
    asked = parser.parse_args(words)
    if unknown := set(asked.steps) - set(STEPS):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    return asked


def unpacked(folder: Path, scratch: Path) -> Path:
    """The folder of the inputs: `folder`, or where its pieces of an archive, wherever they lie in it, were unpacked.

    Exits where pieces are missing or are of several archives.
    """
    pieces = sorted(folder.rglob(f"{ARCHIVE}.*-of-*"), key=lambda piece: piece.name)
    if not pieces:
        return folder
    counts = {piece.name.rpartition("-of-")[2] for piece in pieces}
    if len(counts) > 1:
        sys.exit(f"gpu_run.py: {folder} has pieces of several archives; delete the older ones")
    names, count = {piece.name for piece in pieces}, int(counts.pop())
    if missing := [n for n in range(count) if f"{ARCHIVE}.{n:03}-of-{count:03}" not in names]:
        sys.exit(
            f"gpu_run.py: {folder} has {len(names)} pieces of an archive of {count}, without "
            f"{', '.join(map(str, missing))}: carry them too"
        )
    archive, place = scratch / ARCHIVE, scratch / "inputs"
    with archive.open("wb") as whole:
        for piece in pieces:
            whole.write(piece.read_bytes())
    with tarfile.open(archive) as opened:
        opened.extractall(place, filter="data")
    return place


def installed(wheels: Path, site: Path) -> list[str]:
    """The folder into which those of the wheels went that this Python has not, if there are any."""
    missing = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if not known(wheel.name.split("-")[0])]
    if not missing:
        return []
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *missing], check=True)
    return [str(site)]


def known(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def chosen(asked: argparse.Namespace, packed: Path) -> Inputs:
    """The inputs that are named, else those that are packed. Exits where there are none."""

    def of(name: str) -> list[str]:
        return sorted(map(str, (packed / name).glob("*")))

    donor = asked.donor or next(iter(of("donor")), None)
    text, calibration = asked.text or of("text"), asked.calibration or of("calibration")
    if not (donor and text and calibration):
        sys.exit(
            f"gpu_run.py: {packed} has no donor/, text/ and calibration/: run make gpu-inputs where there is a "
            "network, or name --donor, --text and --calibration"
        )
    small = asked.small or next(iter(of("small")), donor)
    data = asked.data or (str(packed / "data") if (packed / "data").is_dir() else None)
    files = [[file for word in words for file in glob.glob(word) or [word]] for words in (text, calibration)]
    return Inputs(donor, small, *files, data)


def run(
    name: str, device: str, inputs: Inputs, limit: float, scratch: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """A step in its own process, ended with all that it started when its time is over.

    Returns:
        status (done, failed, overran, or left out for want of time), seconds, limit, found (whatever the step had
        written, however it ended), and of a step that is not done its last_lines.
    """
    if limit < LEAST_SECONDS:
        return {"status": "left out: the time was over", "seconds": 0.0}
    record, log, begun = scratch / f"{name}.json", scratch / f"{name}.log", time.monotonic()
    given = vars(inputs) | {"device": device, "seconds": limit, "work": str(scratch), "record": str(record)}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_steps.py"), name, json.dumps(given)]
    with log.open("wb") as said, ended_together("GPU_STEP") as mark:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment | mark, start_new_session=True
        )
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "overran"
            process.kill()
            process.wait()
    result = {"status": status, "seconds": round(time.monotonic() - begun, 1), "limit": round(limit, 1)}
    result["found"] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if status != "done":
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        result["last_lines"] = [line[:300] for line in lines[-LAST_LINES:]]
    return result


def written(path: Path, report: dict[str, Any]) -> None:
    """The report, whole at any time."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def about(asked: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    """What holds for all steps."""
    return {
        "command": "make gpu" if asked.device == "cuda" else "benchmarks/gpu_run.py",
        "date": time.strftime("%Y-%m-%d"),
        "device": asked.device,
        "minutes": asked.minutes,
        "donor": Path(inputs.donor).name,
        "machine": f"{os.cpu_count()} cores of {platform.machine()}",
        "versions": {name: known(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }


if __name__ == "__main__":
    sys.exit(main())
