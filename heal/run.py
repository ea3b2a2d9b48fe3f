"""Healing from a converted checkpoint to a healed one.

    open ▸ text ▸ measure ▸ (layers one by one) ▸ distil ▸ (merge) ▸ measure ▸ write ▸ verify

Everything is written to OUT.partial, which is renamed when it is whole. Several processes run this together; the first
of them writes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from mhconvert.convert import checkpoint as folders
from mhconvert.convert import load
from mhconvert.convert.checkpoint import is_adapter
from mhconvert.convert.errors import HealError, MhconvertError
from mhconvert.convert.heal_settings import HealSettings
from mhconvert.convert.progress import Listener, Progress, ignore
from mhconvert.convert.provenance import PROMPT, peak_rss
from mhconvert.convert.sources import SafetensorsSource
from mhconvert.convert.text import sampled_rows
from mhconvert.convert.versions import versions
from mhconvert.heal import blocks, data, plan, result
from mhconvert.heal.distill import Distillation, Measure, fidelity, held_out_values
from mhconvert.heal.metrics import Metrics, require_tensorboard
from mhconvert.heal.space import METRICS, HealSpace, disk_needed, memory_fault
from mhconvert.heal.student import Student, Teacher, choose_trained

BLOCKS = "blocks.safetensors"  # in the work folder: the layers behind the layer-local stage

Finish = Callable[[Path, dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """What a run was asked for."""

    checkpoint: str
    settings: HealSettings
    output: Path
    resume: bool = False
    force: bool = False
    verify: bool = True
    tensorboard: Path | None = None
    trust_remote_code: bool = False


def run(
    asked: Run, *, measure: Measure, finish: Finish, on_progress: Listener | None = None
) -> dict[str, Any]:
    """Heal the checkpoint and write the result; returns its report in the first process, an empty one in others.

    measure, finish: as in `convert.pipeline.run`. Raises MhconvertError for what a user can mend.
    """
    accelerator = plan.make_accelerator(asked.settings)
    tell = (on_progress or ignore) if accelerator.is_main_process else ignore
    try:
        return _Healing(asked, accelerator, measure, tell).run(finish)
    except (RuntimeError, MemoryError) as error:
        if not memory_fault(error):
            raise
        raise HealError(
            "there is not enough memory for a step: try a smaller --micro-batch, a shorter --sequence-length, "
            "--gradient-checkpointing, or fewer --layer-tokens"
        ) from error
    finally:
        accelerator.end_training()


class _Healing:
    """One run in one process, opened: every refusal that needs no weights is behind it."""

    def __init__(self, asked: Run, accelerator: Accelerator, measure: Measure, tell: Listener):
        self.asked, self.settings = asked, asked.settings
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.measure, self.tell = measure, tell
        self.begun = time.perf_counter()
        self.student, self.teacher = _open(asked, accelerator, tell)
        limit, processes = _limit(self.student, self.teacher), accelerator.num_processes
        self.steps = plan.divide(self.settings, limit, processes, accelerator.device.type)
        self.adapter = self.student.adapter is not None
        self.source = SafetensorsSource(Path(asked.checkpoint)) if not self.adapter else None
        self.vocab_size = min(self.student.vocab_size, self.teacher.vocab_size)
        if self.main:
            _check_output(asked, self.student, self.teacher)

    def run(self, finish: Finish) -> dict[str, Any]:
        report: dict[str, Any] = {}
        with self._space() as self.space:
            self.accelerator.wait_for_everyone()
            self.space.load()
            self.teaching = Teacher(self._teacher_model())
            self.text = self._text()
            model = self.student.model(trainable=self.adapter)
            before = self._fidelity(model)
            self.metrics = self._metrics(before) if self.main else None
            if self.settings.layer_tokens:
                self._heal_layers(model)
            if self.settings.tokens:
                model = self._distil(model)
            if self.metrics is not None:
                report = self._finish(model, before, finish)
            self.accelerator.wait_for_everyone()
        self.tell(Progress("done", 1, 1, str(self.asked.output)))
        return report

    def _space(self) -> HealSpace:
        asked, place = self.asked, str(Path(self.asked.checkpoint).resolve())
        needed = _disk_needed(self.student, self.source, self.steps, self.settings)
        shape = {name: getattr(self.steps, name) for name in ("steps", "length", "batch_rows")}
        options: dict[str, Any] = {"resume": asked.resume, "force": asked.force, "main": self.main}
        return HealSpace(asked.output, self.settings, place, shape, needed=needed, **options)

    def _teacher_model(self) -> Any:
        """In bfloat16 on a GPU that has it: it is only read."""
        accelerator = self.accelerator
        half = accelerator.device.type == "cuda" and accelerator.mixed_precision == "bf16"
        return self.teacher.model(torch.bfloat16 if half else torch.float32)

    def _text(self) -> data.HealText:
        """The rows: prepared once, by the first process, then the same everywhere and after every resume."""
        if self.main and not self.space.has_text:
            settings, tokenizer, length = self.settings, self.student.tokenizer(), self.steps.length
            rows = max(self.steps.rows, settings.layer_tokens // length)
            self.tell(Progress("text", 0, 1, ", ".join(settings.data)))

            def sample(count: int) -> torch.Tensor:
                return sampled_rows(self.teaching.model, tokenizer, count, length, settings.seed, self.tell)

            self.space.keep_text(data.prepare(settings, tokenizer, length, rows, sample))
            self.space.start()
        self.accelerator.wait_for_everyone()
        return self.space.text()

    def _fidelity(self, model: Any) -> dict[str, Any]:
        """Of the whole `model`, on the held-out rows."""
        self.tell(Progress("measure", 0, 1))
        student = Student(model, self.vocab_size)
        rows, micro = self.text.held_out, self.steps.micro_rows
        return fidelity(student, self.teaching, rows, self.measure, micro, self.accelerator.device)

    def _metrics(self, before: dict[str, Any]) -> Metrics:
        metrics = Metrics(self.space.partial / METRICS, self.space.step, self.asked.tensorboard)
        if not self.space.step:
            metrics.add(0, **held_out_values(before))
        return metrics

    def _heal_layers(self, model: Any) -> None:
        """The layer-local stage, in every process alike; its result is durable."""
        file, settings = self.space.work / BLOCKS, self.settings
        if file.is_file():
            model.load_state_dict(load_file(file), strict=False)
            return
        rows = self.text.order[: max(1, settings.layer_tokens // self.steps.length)].unique()
        options: dict[str, Any] = {
            "tokens": settings.layer_tokens,
            "train": settings.train,
            "seed": settings.seed,
        }
        blocks.fit_blocks(model, self.teaching.model, self.text.train.ids[rows], **options, tell=self.tell)
        if self.main:
            layers = {
                name: value.contiguous() for name, value in model.state_dict().items() if ".layers." in name
            }
            partial = file.with_name(BLOCKS + ".new")
            save_file(layers, partial)
            partial.replace(file)

    def _distil(self, model: Any) -> Any:
        """The end-to-end stages; returns the trained model, whole, in the first process."""
        settings, accelerator, space = self.settings, self.accelerator, self.space
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        student = self._trainable(model)
        distillation = Distillation(accelerator, student, self.teaching, settings, self.steps, space)
        distillation.run(self.text, self.metrics, self.measure, self.tell)
        if accelerator.distributed_type is not DistributedType.FSDP:
            return accelerator.unwrap_model(distillation.model).model
        state = accelerator.get_state_dict(distillation.model)  # of all processes
        if not self.main:
            return model
        whole = self._trainable(self.student.model(trainable=self.adapter))
        whole.load_state_dict(state)
        return whole.model

    def _trainable(self, model: Any) -> Student:
        if self.adapter:  # what trains is settled
            return Student(model, self.vocab_size)
        torch.manual_seed(self.settings.seed)  # a new adapter starts at random
        return Student(choose_trained(model, self.settings.train, self.settings.rank), self.vocab_size)

    def _finish(self, model: Any, before: dict[str, Any], finish: Finish) -> dict[str, Any]:
        """Write the folder, prove it, and give it its name."""
        asked, space = self.asked, self.space
        if self.source is not None:
            model = result.merged(model)
            result.round_to(model, self.source)
        after = self._fidelity(model)
        if self.metrics is not None:
            self.metrics.add(self.steps.steps, **held_out_values(after))
            self.metrics.close()
        report = result.report(asked.checkpoint, asked.output, before, after)
        report |= {"healing": self._facts(), "versions": versions()}
        result.write(space, model, self.source, asked.checkpoint)
        if asked.verify and not self.adapter:
            self.tell(Progress("verify", 0, 1))
            report |= result.proof(space, model, self.text.held_out)
        report["peak_rss_bytes"] = max(peak_rss(), report.get("verified", {}).get("peak_rss_bytes", 0))
        finish(space.partial, report)
        result.record(space.partial, asked.checkpoint, self.settings)
        space.publish()
        return report

    def _facts(self) -> dict[str, Any]:
        """What was done, for the report."""
        entries = self.metrics.entries if self.metrics is not None else []
        speeds = [entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry]
        trained = self.text.train[self.text.order[: self.steps.rows]]
        return {
            "settings": dataclasses.asdict(self.settings),
            "teacher": self.teacher.reference,
            "processes": self.accelerator.num_processes,
            "steps": self.steps.steps,
            "step_tokens": self.steps.step_tokens,
            "trained_tokens": self.steps.rows * self.steps.length,
            "predictions": int(trained.predicted().sum()),
            "held_out_tokens": self.text.held_out.ids.numel(),
            "text_tokens": self.text.tokens,
            "tokens_per_second": speeds[-1] if speeds else None,
            "seconds": self.space.earlier_seconds + time.perf_counter() - self.begun,
        }


def _open(asked: Run, accelerator: Accelerator, tell: Listener) -> tuple[load.OpenModel, load.OpenModel]:
    """Student and teacher, no weights read yet."""
    settings, place = asked.settings, str(accelerator.device)
    if asked.tensorboard is not None:
        require_tensorboard()
    method = load.converted_method(asked.checkpoint)
    if method is None and not is_adapter(Path(asked.checkpoint)):
        raise HealError(
            f"{asked.checkpoint} is not a checkpoint that mhconvert wrote; convert a donor first: "
            f"mhconvert {asked.checkpoint} --to mla"
        )
    data.check(settings)
    student = load.open_model(asked.checkpoint, device=place, trust_remote_code=asked.trust_remote_code)
    if student.adapter is not None:
        _require_adapter_settings(student.adapter.method, settings)
    reference = settings.teacher or _recorded_donor(asked.checkpoint)
    tell(Progress("donor", 0, 1, reference))
    teacher = load.open_model(reference, device=place, trust_remote_code=asked.trust_remote_code)
    _require_one_tokenizer(student, teacher)
    if settings.layer_tokens or settings.loss.get("hidden"):
        _require_alike(student, teacher)
    return student, teacher


def _recorded_donor(checkpoint: str) -> str:
    try:
        return load.recorded_donor(checkpoint)
    except MhconvertError as error:
        raise HealError(
            f"{checkpoint} does not say what it was made from; name the donor with --teacher"
        ) from error


def _require_alike(student: load.OpenModel, teacher: load.OpenModel) -> None:
    """Raises HealError where layers of the two cannot be compared."""
    for name in ("num_hidden_layers", "hidden_size"):
        ours, theirs = (getattr(model.config.get_text_config(), name) for model in (student, teacher))
        if ours != theirs:
            raise HealError(
                f"layers cannot be compared one by one: {name} is {theirs} in the teacher {teacher.reference} and "
                f"{ours} in {student.reference}; leave out --layer-tokens and the loss's hidden, or take the donor as "
                "the teacher"
            )


def _require_adapter_settings(method: str, settings: HealSettings) -> None:
    """Raises HealError for what an adapter that is there already cannot do."""
    if settings.train != method:
        raise HealError(f"this is a {method} adapter, and its matrices are what trains: use --train {method}")
    if settings.layer_tokens:
        raise HealError(
            "--layer-tokens is for converted checkpoints; an adapter's base has the teacher's layers"
        )
    if settings.teacher is None and not settings.loss.get("ce"):
        raise HealError(
            "an adapter begins as its base model and has nothing to learn from it: teach it the text with --loss ce, "
            "or name a --teacher"
        )


def _check_output(asked: Run, student: load.OpenModel, teacher: load.OpenModel) -> None:
    """Raises OutputError where the result may not be written. Over its own checkpoint it may, with --force."""
    checkpoint = Path(asked.checkpoint)
    read = [model.donor.folder for model in (student, teacher) if model.donor is not None]
    read += [Path(teacher.reference)]
    with suppress(MhconvertError):  # a donor elsewhere cannot be replaced
        read += [Path(load.recorded_donor(asked.checkpoint))]
    if asked.output.resolve() != checkpoint.resolve():
        read.append(checkpoint)
    folders.check_free(asked.output, asked.force, *read)


def _require_one_tokenizer(student: load.OpenModel, teacher: load.OpenModel) -> None:
    tokenizers = (student.tokenizer(), teacher.tokenizer())
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if ours == theirs:
        probes = (tokenizer(PROMPT, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers)
        if next(probes) != next(probes):
            raise HealError(
                f"the teacher {teacher.reference} splits text into other tokens than {student.reference}; distillation "
                "needs a teacher of the same tokenizer"
            )
        return
    other = next(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
    raise HealError(
        f"the teacher {teacher.reference} has another tokenizer than {student.reference} (token {other!r} is "
        f"{theirs.get(other)} there and {ours.get(other)} here); distillation needs a teacher of the same tokenizer"
    )


def _limit(*models: load.OpenModel) -> int | None:
    """Tokens that all of them read."""
    limits = [getattr(each.config.get_text_config(), "max_position_embeddings", None) for each in models]
    return min((limit for limit in limits if limit), default=None)


def _disk_needed(
    student: load.OpenModel, source: SafetensorsSource | None, steps: plan.Steps, settings: HealSettings
) -> int:
    tokens = steps.rows * steps.length
    if student.adapter is not None and student.donor is not None:
        base = sum(math.prod(shape) for shape in student.donor.shapes().values())
        trained = sum(math.prod(tensor.shape) for tensor in student.adapter.stored.values())
        return disk_needed(base + trained, trained, 4 * trained, tokens)
    assert source is not None
    sizes = {name: source.nbytes(name) // source.dtype(name).itemsize for name in source.names()}
    trained = sum(size for name, size in sizes.items() if settings.train == "all" or ".self_attn." in name)
    written = sum(source.nbytes(name) for name in source.names())
    return disk_needed(sum(sizes.values()), trained, written, tokens)
