"""End-to-end healing: distillation of the teacher's predictions into the whole student, run by accelerate."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
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
from . import on_policy
from .heal_text import HealText
from .held_out import Measure, fidelity, held_out_values
from .metrics import Metrics
from .packed_rows import Rows
from .resumable_run import HealSpace
from .schedule import Steps
from .student import Student, Teacher, Weights, parameter_groups

BETAS = (0.9, 0.95)
DECAY = 0.2  # fraction of the steps that decay in a warmup-stable-decay schedule
SPIKE = 4.0  # a loss above this multiple of the median over the last RECENT steps stops the run
RECENT = 20


class OrderedRows(Dataset):
    """The rows of a run with their numbers, from the number `first` on.

    Args:
        order: for each row of the run its index in `rows`.
    """

    def __init__(self, rows: Rows, order: torch.Tensor, first: int):
        self.rows, self.order, self.first = rows, order, first

    def __len__(self) -> int:
        return len(self.order) - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.order[self.first + index])
        return {
            "ids": self.rows.ids[row],
            "positions": self.rows.positions[row],
            "number": self.first + index,
        }


class Distillation:
    """A student with its optimiser and schedule on an accelerator."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        teacher: Teacher,
        settings: HealSettings,
        plan: Steps,
        space: HealSpace,
        tokenizer: Any,
    ):
        """Prepare the student, and load the training checkpoint in `space` if there is one."""
        saved = space.checkpoint(space.step) if space.step else None
        self.own = on_policy.written(plan, settings.on_policy)
        self.own_text = None
        if settings.on_policy:
            parts = (accelerator, student, tokenizer, plan, self.own, settings.seed, saved)
            self.own_text = on_policy.OwnText(*parts)
        self.accelerator, self.teacher, self.space = accelerator, teacher, space
        self.settings, self.plan, self.step = settings, plan, space.step
        groups = parameter_groups(student, settings)
        peaks = [group["lr"] for group in groups]
        adam = torch.optim.AdamW(groups, betas=BETAS, fused=accelerator.device.type == "cuda")
        self.model, self.optimiser = accelerator.prepare(student, adam)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if saved is not None:
            accelerator.load_state(str(saved))
        # The loaded state has the learning rates of the interrupted run, which may differ.
        for group, peak in zip(self.optimiser.param_groups, peaks, strict=True):
            group["lr"] = group["initial_lr"] = peak
        self.schedule = _schedule(self.optimiser.optimizer, settings, plan.steps, self.step)

    def train(self, text: HealText, metrics: Metrics | None, measure: Measure, on_progress: Listener) -> None:
        """Run all remaining steps.

        Raises:
            HealError: the loss or the gradient is not finite, or the loss jumps.
        """
        plan, recent = self.plan, deque[float](maxlen=RECENT)
        order = on_policy.text_of(text.order, self.own)
        batches = self._batches(text, order)
        begun, first = time.perf_counter(), self.step
        held_out = ""
        on_progress(Progress("heal", self.step * plan.step_tokens, plan.rows * plan.length))
        while self.step < plan.steps:
            if self.own_text is not None:
                self.own_text.begin(self.step, text, order, on_progress)
            if self.step == plan.lm_from:
                recent.clear()  # from here on the loss has other terms
            self.model.train()
            values = self._step([next(batches) for _ in range(self._accumulation_steps)], recent)
            self.step += 1
            speed = (self.step - first) * plan.step_tokens / (time.perf_counter() - begun)
            if metrics is not None:
                metrics.add(self.step, tokens=self.step * plan.step_tokens, tokens_per_second=speed, **values)
            if self.step % plan.eval_every == 0 and self.step < plan.steps:
                result = self.measure(text.held_out, measure)
                held_out = (
                    f" · held-out KL {result['kl']:.4f}, perplexity {result['perplexity']['converted']:.4g}"
                )
                if metrics is not None:
                    metrics.add(self.step, **held_out_values(result))
            if self.step % plan.save_every == 0 or self.step == plan.steps:
                self._save()
            message = f"loss {values['loss']:.4f}{held_out} · {speed:,.0f} tokens/s"
            on_progress(Progress("heal", self.step * plan.step_tokens, plan.rows * plan.length, message))

    def measure(self, rows: Rows, measure: Measure) -> dict[str, Any]:
        """The fidelity of the student on `rows`, in float32; every process reads all rows."""
        return fidelity(
            self.model, self.teacher, rows, measure, self.plan.micro_rows, self.accelerator.device
        )

    @property
    def _accumulation_steps(self) -> int:
        """Micro-batches per optimiser step in each process."""
        return self.plan.batch_rows // (self.plan.micro_rows * self.accelerator.num_processes)

    def _batches(self, text: HealText, order: torch.Tensor) -> Iterator[Rows]:
        """The micro-batches of this process for all remaining steps."""
        plan, accelerator = self.plan, self.accelerator
        rows = OrderedRows(text.train, order, self.step * plan.batch_rows)
        # A loader draws a seed when it begins: not from the state that a resume has restored.
        loader = DataLoader(rows, batch_size=plan.micro_rows, shuffle=False, generator=torch.Generator())
        for batch in accelerator.prepare_data_loader(loader, device_placement=True):
            # Batches are fetched ahead of the round that writes their rows, so the student's text is put in here.
            plain = Rows(batch["ids"], batch["positions"])
            yield plain if self.own_text is None else self.own_text.put_in(plain, batch["number"])

    def _step(self, batches: list[Rows], recent: deque[float]) -> dict[str, Any]:
        """Take one optimiser step; the loss is the mean over the predictions of all processes.

        Returns the values to record. Raises HealError before the step if the loss or gradient is not acceptable.
        """
        accelerator, weights = self.accelerator, self._weights()
        local_count = sum(int(rows.predicted().sum()) for rows in batches)
        count = accelerator.reduce(torch.tensor(float(local_count), device=accelerator.device), "sum")
        names = ("loss", "kl", "ce", "own", "own_count", "hidden", "balance")
        sums = torch.zeros(len(names), device=accelerator.device)
        for number, rows in enumerate(batches):
            synchronisation = accelerator.no_sync(self.model) if number + 1 < len(batches) else nullcontext()
            with synchronisation:
                losses = self.model(rows, self.teacher, weights)
                # accelerate averages the gradients over processes; the factor makes that the mean over predictions.
                accelerator.backward(losses["loss"] * accelerator.num_processes / count)
            sums += torch.stack([losses[name].detach().float() for name in names])
        means = self._means(
            dict(zip(names, accelerator.reduce(sums, "sum").tolist(), strict=True)), count.item()
        )
        self._check_loss(means, recent)
        norm = accelerator.clip_grad_norm_(self.trained, self.settings.clip)
        if norm is not None and not torch.isfinite(norm) and accelerator.scaler is None:
            self._stop("the gradient is not finite")
        self.optimiser.step()
        self.optimiser.zero_grad()
        extra = accelerator.unwrap_model(self.model).end_step((self.step + 1) / self.plan.steps)
        if extra.get("fusion"):
            recent.clear()  # the loss is expected to rise while heads are being fused
        rate = self.schedule.get_last_lr()[0] / self.schedule.base_lrs[0]  # fraction of the peak
        self.schedule.step()
        return means | extra | {"rate": rate, "gradient_norm": float(norm)}

    def _means(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """The means of a step to record: of kl and ce over the text, of own over what the student wrote."""
        own = sums.pop("own_count")
        counts = {"kl": count - own, "ce": count - own, "own": own}
        means = {name: value / max(1.0, counts.get(name, count)) for name, value in sums.items()}
        means["predictions"] = count
        if self.own_text is None:
            return {name: mean for name, mean in means.items() if name != "own"}
        return means | {"own_predictions": own} | self.own_text.facts(self.step)

    def _weights(self) -> Weights:
        """The loss weights of the current step."""
        if self.step >= self.plan.lm_from:
            return Weights(ce=1.0, balance=self.settings.loss.get("balance", 0.0))
        return Weights(**self.settings.loss, beta=self.settings.on_policy_loss or 0.0)

    def _check_loss(self, means: dict[str, float], recent: deque[float]) -> None:
        """Raises HealError for a loss that is not finite or jumps; else adds it to `recent`."""
        loss = means["loss"]
        if not loss < float("inf"):
            self._stop(f"the loss is {loss}")
        if self.own_text is not None:  # of which steps have more or less, with a loss of its own
            if means["predictions"] == means["own_predictions"]:
                return
            weights = self._weights()
            loss = sum(getattr(weights, name) * means[name] for name in ("kl", "ce", "hidden", "balance"))
        if len(recent) == RECENT and loss > SPIKE * statistics.median(recent):
            self._stop(f"the loss leapt to {loss:.4g} from {statistics.median(recent):.4g}")
        recent.append(loss)

    def _stop(self, what: str) -> None:
        """Raises HealError that says how to continue."""
        way_out = "nothing was durable yet; begin again with a smaller --lr"
        if self.space.step:
            way_out = (
                f"the durable checkpoint after step {self.space.step} is kept, and the same command with --resume and "
                "a smaller --lr goes on from it"
            )
        raise HealError(f"{what} in step {self.step + 1}; {way_out}")

    def _save(self) -> None:
        """Write a training checkpoint, together with all processes."""
        accelerator, space = self.accelerator, self.space
        accelerator.save_state(str(space.unfinished(self.step)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self.own_text is not None:
                self.own_text.save(space.unfinished(self.step))
            space.commit(self.step)
        accelerator.wait_for_everyone()


def _schedule(optimiser: torch.optim.Optimizer, settings: HealSettings, steps: int, done: int) -> Any:
    """The learning-rate schedule of the settings, with warm-up, positioned after `done` steps."""
    warm, last = round(settings.warmup * steps), done - 1
    if settings.schedule == "cosine":
        return get_cosine_schedule_with_warmup(optimiser, warm, steps, last_epoch=last)
    if settings.schedule == "wsd":
        decay = max(1, round(DECAY * steps))
        return get_wsd_schedule(optimiser, warm, decay, num_training_steps=steps, last_epoch=last)
    return get_constant_schedule_with_warmup(optimiser, warm, last_epoch=last)
