"""OUT.partial, the folder of a running healing: its rows, training checkpoints and metrics, for --resume."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mhconvert.errors import HealError, MhconvertError, OutputError, ReloadKilledError

from ..convert.checkpoint.fingerprint import sampled
from ..convert.open_model import OpenModel, of_model
from ..convert.recipe.heal_settings import HealSettings
from ..convert.storage.atomic_files import save_tensors, write_json
from ..convert.storage.disk_space import out_of_space
from ..convert.storage.output_folder import ResumableFolder
from .heal_text import HealText
from .packed_rows import Rows

# Files in the work folder:
STATE = "heal.json"  # the settings and the last training checkpoint
TEXT = "text.safetensors"  # the packed rows and their order
BLOCKS = "blocks.safetensors"  # the layers after the layer-local stage

METRICS = "metrics.jsonl"  # in OUT, one line per step or measurement


class HealSpace:
    """The folder of a run, a context manager: locked inside, deleted if the run fails before any training was saved.

    Args:
        models: the checkpoint that is healed, and the teacher.
        shape: numbers that a resumed run must repeat.
        needed: bytes of disk space.
        main: whether this is the first of several processes, the only one that creates, locks and writes the folder.

    Attributes:
        step: of the training checkpoint from which the run resumes; 0 for none.
    """

    def __init__(
        self,
        output: Path,
        settings: HealSettings,
        models: dict[str, OpenModel],
        shape: dict[str, int],
        *,
        needed: int,
        resume: bool,
        force: bool,
        main: bool,
    ):
        self._folder = ResumableFolder(output, "heal", STATE)
        self.partial, self.work = self._folder.folder, self._folder.work
        self._settings, self._models, self._shape, self._needed = settings, models, shape, needed
        self._source = str(Path(models["checkpoint"].reference).resolve())
        self._resume, self._force, self._main = resume, force, main
        self.step = 0
        self._new = False
        self.earlier_seconds, self._begun = 0.0, time.perf_counter()

    def __enter__(self) -> HealSpace:
        if self._main:
            self._new = not self.partial.exists()
            self._folder.enter(
                self._needed,
                finished=lambda state: f"a checkpoint after step {state['step'] if state else 0}",
                resume=self._resume,
                force=self._force,
            )
        return self

    def load(self) -> None:
        """Read the state in every process.

        Raises:
            HealError: it is the state of a run with other settings, or other weights of a model.
        """
        state = self._folder.state()
        if state is None:
            return
        other = self._settings.same_run(state["settings"]) or self._other_model(state)
        if other is not None:
            raise HealError(
                f"{self.partial} was started with another {other}; --resume needs the same command, --force starts over"
            )
        for name, value in self._shape.items():
            if state["shape"][name] != value:
                raise HealError(
                    f"{self.partial} was started with {name}={state['shape'][name]} and this run has {value}; --resume "
                    "needs a number of processes that divides the same batches"
                )
        self.step, self.earlier_seconds = state["step"], state["seconds"]

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not self._main:
            return
        self._folder.unlock()
        trained = self.step > 0 or (self.work / BLOCKS).is_file()
        if words := out_of_space(error):
            raise OutputError(
                f"{words}; {self.partial} holds what is durable: make room and run the same command with --resume"
            ) from error
        if not isinstance(error, MhconvertError):
            self._folder.leave(error)
        elif not isinstance(error, ReloadKilledError) and self._new and not trained:
            self._folder.discard()

    def write_text(self, text: HealText) -> None:
        """Write the rows, which the other processes and a resumed run read."""
        tensors = {
            "ids": text.train.ids,
            "positions": text.train.positions,
            "held_ids": text.held_out.ids,
            "held_positions": text.held_out.positions,
            "order": text.order,
        }
        facts = {"tokens": json.dumps(text.tokens), "skipped": json.dumps(text.skipped)}
        save_tensors(tensors, self.work / TEXT, facts)

    @property
    def has_text(self) -> bool:
        return (self.work / TEXT).is_file()

    def read_text(self) -> HealText:
        """The rows that `write_text` wrote."""
        from safetensors import safe_open

        tensors = load_file(self.work / TEXT)
        with safe_open(self.work / TEXT, framework="pt") as file:
            facts = {"skipped": "{}"} | file.metadata()  # versions before 0.3.0 skipped nothing
        tokens, skipped = json.loads(facts["tokens"]), json.loads(facts["skipped"])
        train = Rows(tensors["ids"], tensors["positions"])
        held_out = Rows(tensors["held_ids"], tensors["held_positions"])
        return HealText(train, held_out, tensors["order"], tokens, skipped)

    def checkpoint(self, step: int) -> Path:
        """The folder of the training checkpoint after `step`."""
        return self.work / f"step-{step:08d}"

    def unfinished(self, step: int) -> Path:
        """The folder in which the checkpoint after `step` is written until it is complete."""
        return self.work / f"step-{step:08d}.new"

    def commit(self, step: int) -> None:
        """Make the checkpoint in `unfinished(step)` the one to resume from, and delete older ones."""
        for file in sorted(path for path in self.unfinished(step).rglob("*") if path.is_file()):
            with open(file, "r+b") as stream:
                os.fsync(stream.fileno())
        if self.checkpoint(step).exists():
            shutil.rmtree(self.checkpoint(step))
        os.replace(self.unfinished(step), self.checkpoint(step))
        self._write_state(step)
        for stale in self.work.glob("step-*"):
            if stale != self.checkpoint(step):
                shutil.rmtree(stale)
        self.step = step

    def start(self) -> None:
        """Write the state of a new run."""
        if self._folder.state() is None:
            self._write_state(0)

    def _other_model(self, state: dict[str, Any]) -> str | None:
        """The model with other weights than the run of `state` began with; None: there is none."""
        begun = state.get("models")
        if begun is None:  # versions before 0.3.0 record the path alone
            return None if state["source"] == self._source else f"checkpoint ({state['source']})"
        return next((name for name, own in self._fingerprints.items() if begun[name] != own), None)

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        return {name: of_model(model, sampled) for name, model in self._models.items()}

    def _write_state(self, step: int) -> None:
        settings = dataclasses.asdict(self._settings)
        seconds = self.earlier_seconds + time.perf_counter() - self._begun
        state = {
            "settings": settings,
            "source": self._source,
            "models": self._fingerprints,
            "shape": self._shape,
            "step": step,
            "seconds": seconds,
        }
        write_json(self._folder.state_file, state)

    def publish(self) -> None:
        """Rename OUT.partial to OUT."""
        self._folder.publish()


def began_with_another(output: Path, checkpoint: OpenModel) -> bool:
    """Whether an interrupted healing into `output` is known to have begun with other weights than `checkpoint` has."""
    begun = (ResumableFolder(output, "heal", STATE).state() or {}).get("models")
    return begun is not None and begun["checkpoint"] != of_model(checkpoint, sampled)


def disk_needed(parameters: int, trained: int, written: int, tokens: int) -> int:
    """The bytes for two training checkpoints, the result and the rows.

    A training checkpoint has the weights and Adam's two moments of the trained parameters, in float32.

    Args:
        parameters, trained: numbers of parameters.
        written: bytes of the result.
        tokens: in all rows.
    """
    return 2 * 4 * (parameters + 2 * trained) + written + 2 * 4 * tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed for lack of memory."""
    message = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and ("not enough memory" in message or "out of memory" in message.lower())
    )
