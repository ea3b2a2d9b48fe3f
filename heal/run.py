"""The stages of healing a converted checkpoint:

    open ▸ text ▸ measure ▸ (layer by layer) ▸ distil ▸ (merge) ▸ measure ▸ write ▸ verify

The result is written to OUT.partial, which is renamed to OUT when it is complete. Several processes may run this
together, of which only the first writes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from mhconvert.errors import HealError
from mhconvert.library_versions import versions
from mhconvert.progress import Listener, Progress, ignore

from ..convert.bare_process.reload import peak_rss
from ..convert.calibration.token_rows import sampled_rows
from ..convert.storage.atomic_files import save_tensors
from ..convert.storage.safetensors_reader import SafetensorsSource
from . import fusion, heal_text, layer_healing, on_policy, schedule, write_result
from .build_student import build_student
from .distill import Distillation
from .held_out import Lesson, Measure, fidelity, held_out_values
from .metrics import Metrics
from .open_models import Run, check_output, longest_row, needed_bytes, open_both
from .packed_rows import reads_rows_whole
from .resumable_run import BLOCKS, METRICS, HealSpace, is_out_of_memory
from .student import Student, Teacher

Finish = Callable[[Path, dict[str, Any]], None]


def run(
    asked: Run, *, measure: Measure, finish: Finish, on_progress: Listener | None = None
) -> dict[str, Any]:
    """Heal a checkpoint and write the result; returns its report in the first process, {} in the others.

    Args:
        measure, finish: as in `convert.pipeline.convert_checkpoint`.

    Raises:
        MhconvertError: an error that the user can fix.
    """
    accelerator = schedule.make_accelerator(asked.settings)
    on_progress = (on_progress or ignore) if accelerator.is_main_process else ignore
    try:
        return _Healing(asked, accelerator, measure, on_progress).run(finish)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise HealError(
            "there is not enough memory for a step: try a smaller --micro-batch, a shorter --sequence-length, "
            "--gradient-checkpointing, or fewer --layer-tokens"
        ) from error
    finally:
        accelerator.end_training()


class _Healing:
    """A healing run in one process. The constructor makes every check that needs no weights."""

    def __init__(self, asked: Run, accelerator: Accelerator, measure: Measure, on_progress: Listener):
        self.asked, self.settings = asked, asked.settings
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.measure, self.on_progress = measure, on_progress
        self.begun = time.perf_counter()
        self.student, self.teacher = open_both(asked, accelerator, on_progress)
        limit, processes = longest_row(self.student, self.teacher), accelerator.num_processes
        self.steps = schedule.divide(self.settings, limit, processes, accelerator.device.type)
        self.own_rows = int(on_policy.written(self.steps, self.settings.on_policy).sum())
        self.adapter = self.student.adapter is not None
        self.source = SafetensorsSource(Path(asked.checkpoint)) if not self.adapter else None
        self.vocab_size = min(self.student.vocab_size, self.teacher.vocab_size)
        if self.main:
            check_output(asked, self.student, self.teacher)
        self.space = self._space()

    def run(self, finish: Finish) -> dict[str, Any]:
        """Run all stages; returns the report in the first process, {} in the others."""
        report: dict[str, Any] = {}
        with self.space:
            self.accelerator.wait_for_everyone()
            self.space.load()
            teacher = Teacher(self._teacher_model())
            text = self._text(teacher)
            lesson = Lesson(teacher, text, self._fidelity_function(teacher, text))
            model = self.student.model(trainable=self.adapter)
            if self.settings.train != "all":
                teacher.share(model)
            before = lesson.fidelity(model)
            metrics = self._metrics(before) if self.main else None
            if self.settings.layer_tokens:
                self._heal_layers(model, lesson)
            if self.settings.tokens:
                model = self._distil(model, lesson, metrics)
            if metrics is not None:
                report = self._finish(model, before, lesson, metrics, finish)
            self.accelerator.wait_for_everyone()
        self.on_progress(Progress("done", 1, 1, str(self.asked.output)))
        return report

    def _space(self) -> HealSpace:
        return HealSpace(
            self.asked.output,
            self.settings,
            {"checkpoint": self.student, "teacher": self.teacher},
            {name: getattr(self.steps, name) for name in ("steps", "length", "batch_rows")},
            needed=needed_bytes(self.student, self.source, self.steps, self.settings),
            resume=self.asked.resume,
            force=self.asked.force,
            main=self.main,
        )

    def _teacher_model(self) -> Any:
        """The teacher's model, in bfloat16 if the student is trained in it on a GPU, else in float32."""
        half = self.accelerator.device.type == "cuda" and self.accelerator.mixed_precision == "bf16"
        return self.teacher.model(torch.bfloat16 if half else torch.float32)

    def _text(self, teacher: Teacher) -> heal_text.HealText:
        """The rows; the first process prepares them once, the others and a resumed run read them."""
        if self.main and not self.space.has_text:
            settings, tokenizer, length = self.settings, self.student.tokenizer(), self.steps.length
            rows = max(self.steps.rows - self.own_rows, settings.layer_tokens // length, 1)
            self.on_progress(Progress("text", 0, 1, ", ".join(settings.data)))

            def sample(count: int, prompts: list[list[int]]) -> torch.Tensor:
                told = (settings.seed, self.on_progress)
                return sampled_rows(teacher.model, tokenizer, count, length, *told, prompts, self.vocab_size)

            alone = reads_rows_whole(self.student.config)
            text = heal_text.prepare(settings, tokenizer, self.vocab_size, length, rows, sample, alone)
            if alone:
                padding = (text.train.positions[:, 1:] == 0).sum().item() / text.train.positions.numel()
                words = f"each document has rows of its own, of which {padding:.0%} is padding, which --tokens counts"
                self.on_progress(Progress("text", 1, 1, words))
            if skipped := sum(text.skipped.values()):
                self.on_progress(Progress("text", 1, 1, f"{skipped:,} records without text were skipped"))
            self.space.write_text(text)
            self.space.start()
        self.accelerator.wait_for_everyone()
        return self.space.read_text()

    def _fidelity_function(
        self, teacher: Teacher, text: heal_text.HealText
    ) -> Callable[[Any], dict[str, Any]]:
        """A function that measures the fidelity of a model on the held-out rows."""
        micro, device = self.steps.micro_rows, self.accelerator.device

        def measured(model: Any) -> dict[str, Any]:
            self.on_progress(Progress("measure", 0, 1))
            student = Student(model, self.vocab_size)
            return fidelity(student, teacher, text.held_out, self.measure, micro, device)

        return measured

    def _metrics(self, before: dict[str, Any]) -> Metrics:
        metrics = Metrics(self.space.partial / METRICS, self.space.step, self.asked.tensorboard)
        if not self.space.step:
            metrics.add(0, **held_out_values(before))
        return metrics

    def _heal_layers(self, model: Any, lesson: Lesson) -> None:
        """Train layer by layer, identically in every process, or load the saved result of an interrupted run."""
        file, settings = self.space.work / BLOCKS, self.settings
        if file.is_file():
            model.load_state_dict(load_file(file), strict=False)
            return
        rows = lesson.text.order[: max(1, settings.layer_tokens // self.steps.length)].unique()
        layer_healing.fit_blocks(
            model,
            lesson.teacher.model,
            lesson.text.train.ids[rows],
            tokens=settings.layer_tokens,
            train=settings.train,
            seed=settings.seed,
            on_progress=self.on_progress,
        )
        if self.main:
            save_tensors({name: t for name, t in model.state_dict().items() if ".layers." in name}, file)

    def _distil(self, model: Any, lesson: Lesson, metrics: Metrics | None) -> Any:
        """Train end to end; returns the whole trained model in the first process."""
        settings, accelerator, space = self.settings, self.accelerator, self.space
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        student = build_student(model, settings, self.vocab_size, is_adapter=self.adapter)
        parts = (student, lesson.teacher, settings, self.steps, space, self.student.tokenizer())
        distillation = Distillation(accelerator, *parts)
        distillation.train(lesson.text, metrics, self.measure, self.on_progress)
        if accelerator.distributed_type is not DistributedType.FSDP:
            return accelerator.unwrap_model(distillation.model).model
        state = accelerator.get_state_dict(distillation.model)  # collective: every process must call it
        if not self.main:
            return model
        whole = build_student(
            self.student.model(trainable=self.adapter), settings, self.vocab_size, is_adapter=self.adapter
        )
        whole.load_state_dict(state)
        return whole.model

    def _finish(
        self, model: Any, before: dict[str, Any], lesson: Lesson, metrics: Metrics, finish: Finish
    ) -> dict[str, Any]:
        """Write the result, check it in a new process, and rename OUT.partial to OUT; returns the report."""
        asked, space, trusted = self.asked, self.space, self.asked.trust_remote_code
        if self.settings.fusion:
            fusion.fuse(model, self.settings.fusion)
        if self.source is not None:
            model = write_result.merge_adapter(model)
            write_result.round_weights(model, self.source)
        after = lesson.fidelity(model)
        metrics.add(self.steps.steps, **held_out_values(after))
        metrics.close()
        report = write_result.report(asked.checkpoint, asked.output, before, after)
        report |= {"healing": self._training_report(lesson.text, metrics), "versions": versions()}
        if self.settings.fusion and self.source is not None:
            write_result.record_heads(report, model, self.source)
        write_result.write_checkpoint(space, model, self.source, asked.checkpoint, code=trusted)
        if asked.verify and not self.adapter:
            self.on_progress(Progress("verify", 0, 1))
            report |= write_result.verify_reload(space, model, lesson.text.held_out, trusted, report)
        report["peak_rss_bytes"] = peak_rss(report)
        finish(space.partial, report)
        write_result.write_record(space.partial, asked.checkpoint, asked.output, self.settings)
        space.publish()
        return report

    def _training_report(self, text: heal_text.HealText, metrics: Metrics) -> dict[str, Any]:
        """The section "healing" of the report."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "teacher": self.teacher.reference,
            "processes": self.accelerator.num_processes,
            "steps": self.steps.steps,
            "step_tokens": self.steps.step_tokens,
            "trained_tokens": self.steps.rows * self.steps.length,
            **text.facts(),
            **metrics.facts(),
            "seconds": self.space.earlier_seconds + time.perf_counter() - self.begun,
        }
