"""End-to-end healing: the whole student learns its teacher's predictions. accelerate runs it on what there is."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_wsd_schedule,
)

from mhconvert.errors import HealError
from mhconvert.progress import Listener, Progress

from ..convert.recipe.heal_settings import HealSettings
from .metrics import Metrics
from .packed_rows import HealText, Rows
from .resumable_run import HealSpace
from .schedule import Steps
from .student import Student, Teacher, Weights, parameter_groups

BETAS = (0.9, 0.95)
DECAY = 0.2  # of a warmup-stable-decay schedule's steps
SPIKE = 4.0  # times the median loss of the last RECENT steps: something has broken
RECENT = 20

Measure = Callable[[], Any]  # makes an accumulator of predictions (`eval.fidelity.Fidelity`)


class InOrder(Dataset):
    """Samples the rows of a run in order, starting at the row of step `done`."""

    def __init__(self, text: HealText, first: int):
        self.rows, self.order = text.train, text.order[first:]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = int(self.order[index])
        return {"ids": self.rows.ids[row], "positions": self.rows.positions[row]}


class Distillation:
    """The student on its accelerator with optimiser and schedule; `run` trains it and `measure` evaluates it."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        teacher: Teacher,
        settings: HealSettings,
        plan: Steps,
        space: HealSpace,
    ):
        """Load the durable checkpoint in `space` to continue from, if there is one."""
        self.accelerator, self.teacher, self.space = accelerator, teacher, space
        self.settings, self.plan, self.step = settings, plan, space.step
        groups = parameter_groups(student, settings)
        peaks = [group["lr"] for group in groups]
        adam = torch.optim.AdamW(groups, betas=BETAS, fused=accelerator.device.type == "cuda")
        self.model, self.optimiser = accelerator.prepare(student, adam)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if space.step:
            accelerator.load_state(str(space.checkpoint(space.step)))
        for group, peak in zip(
            self.optimiser.param_groups, peaks, strict=True
        ):  # a resumed run may have others
            group["lr"] = group["initial_lr"] = peak
        self.schedule = _schedule(self.optimiser.optimizer, settings, plan.steps, self.step)

    def run(self, text: HealText, metrics: Metrics | None, measure: Measure, tell: Listener) -> None:
        """Take every remaining step. Raises HealError where the loss is not finite or jumps."""
        plan, recent = self.plan, deque[float](maxlen=RECENT)
        batches = self._batches(text)
        begun, first = time.perf_counter(), self.step
        held = ""
        tell(Progress("heal", self.step * plan.step_tokens, plan.rows * plan.length))
        while self.step < plan.steps:
            if self.step == plan.lm_from:
                recent.clear()  # another loss begins
            self.model.train()
            found = self._step([next(batches) for _ in range(self._accumulated)], recent)
            self.step += 1
            speed = (self.step - first) * plan.step_tokens / (time.perf_counter() - begun)
            if metrics is not None:
                metrics.add(self.step, tokens=self.step * plan.step_tokens, tokens_per_second=speed, **found)
            if self.step % plan.eval_every == 0 and self.step < plan.steps:
                result = self.measure(text.held_out, measure)
                held = (
                    f" · held-out KL {result['kl']:.4f}, perplexity {result['perplexity']['converted']:.4g}"
                )
                if metrics is not None:
                    metrics.add(self.step, **held_out_values(result))
            if self.step % plan.save_every == 0 or self.step == plan.steps:
                self._save()
            said = f"loss {found['loss']:.4f}{held} · {speed:,.0f} tokens/s"
            tell(Progress("heal", self.step * plan.step_tokens, plan.rows * plan.length, said))

    def measure(self, rows: Rows, measure: Measure) -> dict[str, Any]:
        """Return the fidelity on `rows` in float32; every process reads all of them."""
        return fidelity(
            self.model, self.teacher, rows, measure, self.plan.micro_rows, self.accelerator.device
        )

    @property
    def _accumulated(self) -> int:
        return self.plan.batch_rows // (self.plan.micro_rows * self.accelerator.num_processes)

    def _batches(self, text: HealText) -> Iterator[Rows]:
        """Yield this process's part of each remaining step's rows."""
        plan, accelerator = self.plan, self.accelerator
        rows = InOrder(text, self.step * plan.batch_rows)
        loader = DataLoader(rows, batch_size=plan.micro_rows, shuffle=False)
        for batch in accelerator.prepare_data_loader(loader, device_placement=True):
            yield Rows(batch["ids"], batch["positions"])

    def _step(self, batches: list[Rows], recent: deque[float]) -> dict[str, Any]:
        """One optimiser step; the loss is the mean over all predictions of all processes."""
        accelerator, weights = self.accelerator, self._weights()
        mine = sum(int(rows.predicted().sum()) for rows in batches)
        count = accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum")
        names = ("loss", "kl", "ce", "hidden", "balance")
        sums = torch.zeros(len(names), device=accelerator.device)
        for number, rows in enumerate(batches):
            apart = accelerator.no_sync(self.model) if number + 1 < len(batches) else nullcontext()
            with apart:
                found = self.model(rows, self.teacher, weights)
                # Gradients of the processes are averaged; the mean over all predictions is wanted.
                accelerator.backward(found["loss"] * accelerator.num_processes / count)
            sums += torch.stack([found[name].detach().float() for name in names])
        means = dict(zip(names, (accelerator.reduce(sums, "sum") / count).tolist(), strict=True))
        self._require_calm(means["loss"], recent)
        norm = accelerator.clip_grad_norm_(self.trained, self.settings.clip)
        if norm is not None and not torch.isfinite(norm) and accelerator.scaler is None:
            self._stop("the gradient is not finite")
        self.optimiser.step()
        self.optimiser.zero_grad()
        facts = accelerator.unwrap_model(self.model).end_step((self.step + 1) / self.plan.steps)
        if facts.get("fusion"):
            recent.clear()  # the loss rises as long as heads become one
        rate = self.schedule.get_last_lr()[0] / self.schedule.base_lrs[0]  # of the peak
        self.schedule.step()
        return means | facts | {"rate": rate, "gradient_norm": float(norm)}

    def _weights(self) -> Weights:
        if self.step >= self.plan.lm_from:
            return Weights(ce=1.0, balance=self.settings.loss.get("balance", 0.0))
        return Weights(**self.settings.loss)

    def _require_calm(self, loss: float, recent: deque[float]) -> None:
        """Raise HealError, before the step is taken, for a loss that is not finite or jumps."""
        if not loss < float("inf"):
            self._stop(f"the loss is {loss}")
        if len(recent) == RECENT and loss > SPIKE * statistics.median(recent):
            self._stop(f"the loss leapt to {loss:.4g} from {statistics.median(recent):.4g}")
        recent.append(loss)

    def _stop(self, what: str) -> None:
        way_out = "nothing was durable yet; begin again with a smaller --lr"
        if self.space.step:
            way_out = (
                f"the durable checkpoint after step {self.space.step} is kept, and the same command with --resume and "
                "a smaller --lr goes on from it"
            )
        raise HealError(f"{what} in step {self.step + 1}; {way_out}")

    def _save(self) -> None:
        accelerator, space = self.accelerator, self.space
        accelerator.save_state(str(space.unfinished(self.step)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            space.commit(self.step)
        accelerator.wait_for_everyone()


@torch.no_grad()
def fidelity(
    student: Any, teacher: Teacher, rows: Rows, measure: Measure, batch: int, device: torch.device
) -> dict[str, Any]:
    """Return what `measure` reports of the student's predictions against the teacher's, a few rows at a time."""
    found = measure()
    student.eval()
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        student(Rows(part.ids.to(device), part.positions.to(device)), teacher, Weights(), found)
    result: dict[str, Any] = found.result()
    return result


def held_out_values(result: dict[str, Any]) -> dict[str, float]:
    """Return a measurement as the values of one metrics line."""
    return {
        "held_out_kl": result["kl"],
        "held_out_perplexity": result["perplexity"]["converted"],
        "held_out_top1": result["top1_agreement"],
    }


def _schedule(optimiser: torch.optim.Optimizer, settings: HealSettings, steps: int, done: int) -> Any:
    """Return the learning rate's schedule from step `done` on: warm-up, then as the settings say."""
    warm, last = round(settings.warmup * steps), done - 1
    if settings.schedule == "cosine":
        return get_cosine_schedule_with_warmup(optimiser, warm, steps, last_epoch=last)
    if settings.schedule == "wsd":
        decay = max(1, round(DECAY * steps))
        return get_wsd_schedule(optimiser, warm, decay, num_training_steps=steps, last_epoch=last)
    return get_constant_schedule_with_warmup(optimiser, warm, last_epoch=last)
