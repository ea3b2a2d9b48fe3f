"""The state of a conversion in OUT.partial, with which an interrupted run continues behind its last layer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mhconvert.errors import MhconvertError, OutputError, ReloadKilledError
from mhconvert.library_versions import versions

from ..calibration.calibration_rows import Rows
from ..checkpoint.fingerprint import of_place, sampled
from ..recipe.recipe import Recipe
from ..recipe.recorded import NOT_THE_RESULT, as_recorded
from ..storage.atomic_files import save_tensors, write_json
from ..storage.byte_size import byte_size
from ..storage.disk_space import out_of_space
from ..storage.output_folder import ResumableFolder
from ..storage.shard_writer import ShardWriter
from . import stored_needs
from .decoder_layer import Streams
from .stored_needs import Needs, Survey

# Files in the work folder:
STATE = "state.json"  # what is finished
ROWS = "rows.safetensors"  # the calibration rows
SOURCES = "sources.json"  # where the held-out ones are from
TEXTS = "texts"  # a folder: what the converted model wrote
KEPT = (STATE, ROWS, SOURCES, *stored_needs.FILES, TEXTS)  # by a search, from one conversion to the next

# Largest share of wall time spent writing resume state; each write saves both hidden-state streams.
COMMIT_SHARE = 0.1


class Workspace:
    """OUT.partial of a conversion. Use as a context: it is locked inside, and removed when the run fails for good, or
    before anything is durable.

    An interrupt, a full disk or a killed reload leaves it for `resume`. A layer is finished when the state file says
    so; all that it needs was written before.

    Attributes:
        partial: OUT.partial, where the checkpoint is written.
        layers: what was chosen and measured for each finished layer.
        search: what a search for the budget has found.
        earlier_seconds: what interrupted runs have taken.
        probe: the file of logits that the reload is compared with.
        texts: the folder of what the converted model wrote, and of how its donor reads it.
    """

    def __init__(self, output: Path, recipe: Recipe, donor: Path, needed: int, *, resume: bool, force: bool):
        """
        Args:
            donor: the folder or file that the conversion reads.
            needed: bytes that a new run writes.
            resume: go on with an interrupted run of the same recipe and donor.
            force: start over where there is an interrupted run.
        """
        self._folder = ResumableFolder(output, "convert", STATE)
        self.partial, self._work = self._folder.folder, self._folder.work
        self.probe, self.texts = self._work / "probe.safetensors", self._work / TEXTS
        self._recipe, self._donor, self._needed = recipe, of_place(donor, sampled), needed
        self._resume, self._force = resume, force
        self._limit = byte_size(recipe.max_shard_size)
        self.layers: list[dict[str, Any]] = []
        self.search: dict[str, Any] | None = None
        self.earlier_seconds = 0.0
        self._begun = self._committed = time.perf_counter()
        self._commit_seconds = 0.0
        self._streams: Streams | None = None
        self._writer: ShardWriter | None = None
        self._tensors = 0

    @property
    def streams_ready(self) -> bool:
        """Whether an interrupted run, or `begin`, has left streams."""
        return self._streams is not None

    @property
    def streams(self) -> Streams:
        assert self._streams is not None
        return self._streams

    def __enter__(self) -> Workspace:
        self._folder.enter(
            self._needed,
            finished=lambda state: f"{len(state['layers']) if state else 0} layers finished",
            resume=self._resume,
            force=self._force,
        )
        try:
            if (state := self._folder.state()) is not None:
                self._load(state)
        except BaseException:
            self._folder.unlock()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._folder.unlock()
        if isinstance(error, MhconvertError) and not isinstance(error, ReloadKilledError):
            self._folder.discard()
        elif words := out_of_space(error):
            raise OutputError(
                f"{words}; {len(self.layers)} layers are finished in {self.partial}: make room and run the same "
                "command with --resume"
            ) from error
        else:
            self._folder.leave(error)

    def rows(self, draw: Callable[[], Rows]) -> Rows:
        """The calibration rows of this run: drawn once, the same after every resume."""
        path = self._work / ROWS
        if not path.is_file():
            rows = draw()
            write_json(self._work / SOURCES, rows.sources)
            save_tensors({"fit": rows.fit, "held_out": rows.held_out}, path)
            return rows
        sources = self._work / SOURCES  # runs that an earlier version began have none
        return Rows(
            **load_file(path), sources=tuple(json.loads(sources.read_text()) if sources.is_file() else ())
        )

    def needs(self, survey: Survey) -> Needs:
        """What this run's survey found of each layer: made once, the same after every resume."""
        return stored_needs.made_once(self._work, survey)

    def begin(self, streams: Streams, outer: Iterable[tuple[str, Tensor]], tensors: int) -> None:
        """Start with the embedded rows, and write the tensors `outer` that belong to no layer.

        tensors: how many the checkpoint has at most.
        """
        self._writer = ShardWriter(self.partial, self._limit, tensors)
        self._tensors = tensors
        for name, tensor in outer:
            self._writer.add(name, tensor)
        self._streams = streams
        self._commit()

    def finish_layer(self, tensors: Iterable[tuple[str, Tensor]], chosen: dict[str, Any], last: bool) -> None:
        """Write a layer. It is durable at once, or with a later layer where commits are slow.

        A commit writes the tensors, the streams behind the layer, and then the state file.
        """
        assert self._writer is not None
        for name, tensor in tensors:
            self._writer.add(name, tensor)
        self.layers.append(chosen)
        since = time.perf_counter() - self._committed
        if last or self._commit_seconds < COMMIT_SHARE * since:
            self._commit()

    def start_over(self, search: dict[str, Any]) -> None:
        """Forget all layers; the calibration rows, the layers' needs and the state of the search are kept."""
        self.layers, self.search = [], search
        self._streams = self._writer = None
        write_json(self._folder.state_file, self._state())  # first, as what it counted is removed next
        self._folder.empty(*KEPT)

    def finish_tensors(self) -> int:
        """Complete the shards and their index; returns the bytes of all tensors."""
        assert self._writer is not None
        return self._writer.finish()

    def release_streams(self) -> None:
        """Free the streams' memory when all layers are done."""
        self._streams = None

    def publish(self, *, finished: bool) -> None:
        """Rename OUT.partial to OUT; `finished` as `publishing.publish` has it."""
        self._folder.publish(finished=finished)

    def _commit(self) -> None:
        """Write tensors, streams and state; from here an interrupted run continues."""
        assert self._writer is not None
        begun = time.perf_counter()
        self._writer.flush()
        count = len(self.layers)
        save_tensors(
            {"teacher": self.streams.teacher, "student": self.streams.student}, self._stream_file(count)
        )
        state = self._state() | {"fitted": self.streams.fitted, "tensors": self._tensors}
        write_json(self._folder.state_file, state | {"writer": self._writer.state})
        for stale in self._work.glob("streams-*.safetensors"):
            if stale != self._stream_file(count):
                stale.unlink()
        self._committed = time.perf_counter()
        self._commit_seconds = self._committed - begun

    def _state(self) -> dict[str, Any]:
        """What is finished; of layers where their tensors are comes to it."""
        spent = self.earlier_seconds + time.perf_counter() - self._begun
        asked = {"recipe": self._result_recipe(), "donor": self._donor, "versions": versions()}
        return asked | {"seconds": spent, "layers": self.layers, "search": self.search}

    def _load(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises OutputError where another recipe, another donor or other versions wrote it."""
        begun, asked = as_recorded(state["recipe"]), self._result_recipe()
        others = [key for key in asked | begun if begun.get(key) != asked.get(key)]
        if state.get("donor", self._donor) != self._donor:  # versions before 0.3.0 do not say
            others.append("donor")
        if others:
            raise OutputError(
                f"{self.partial} was started with another {others[0]}; --resume needs the same command, --force "
                "starts over"
            )
        for name, version in versions().items():
            if state["versions"].get(name) != version:
                raise OutputError(
                    f"{self.partial} was started with {name} {state['versions'].get(name)}, and this is {version}; "
                    "use that version with --resume, or start over with --force"
                )
        self.layers, self.earlier_seconds = state["layers"], state["seconds"]
        self.search = state.get("search")
        if (
            "writer" not in state
        ):  # a search was between two conversions, the first perhaps not wholly removed
            self._folder.empty(*KEPT)
            return
        self._tensors = state["tensors"]
        streams = load_file(self._stream_file(len(self.layers)))
        self._streams = Streams(streams["teacher"], streams["student"], state["fitted"])
        self._writer = ShardWriter(self.partial, self._limit, self._tensors, state["writer"])

    def _result_recipe(self) -> dict[str, Any]:
        """The recipe's values that change the result, as state.json has them."""
        recipe = json.loads(json.dumps(self._recipe.to_dict()))  # as state.json gives it back
        return {key: value for key, value in recipe.items() if key not in NOT_THE_RESULT}

    def _stream_file(self, layers: int) -> Path:
        """Where the streams after so many layers are."""
        return self._work / f"streams-{layers:05d}.safetensors"
