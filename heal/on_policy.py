"""On-policy distillation: a share of the rows is written by the student while it trains, and the teacher scores it.

Each of these rows continues the first words of a text. A text that is empty or loops is dropped: the row that lent its
first words stands in for it.

Source: GKD, arXiv 2306.13649. Departures from it: a round of rows is written for several steps at once, since a
decoding step takes about as long for many rows as for one; and a text goes on behind an end token until its row is
full.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import Tensor

from mhconvert.errors import HealError
from mhconvert.progress import Listener, Progress

from ..convert.calibration.loops import loops
from ..convert.calibration.token_rows import batches_of, continued
from ..convert.storage.atomic_files import save_tensors
from .first_words import first_words
from .heal_text import HealText
from .packed_rows import Rows
from .schedule import Steps
from .student import Student

FILE = "on_policy.safetensors"  # in a training checkpoint: the rows of the current round
ROUND_ROWS = 32  # that a process writes at most in a round of more than one step
ROUNDS = 4  # that a run has at least, if it has as many steps
FEW = 4  # dropped rows that stop no run
FAULTS = ("empty", "loops")


def written(plan: Steps, share: float | None) -> Tensor:
    """(rows,), bool: which rows of the run the student writes, evenly spread over those that have a teacher.

    Raises HealError if a share is given and there are too few rows for one of its own.
    """
    numbers = torch.arange(plan.rows + 1, dtype=torch.float64)
    taught = plan.lm_from * plan.batch_rows
    own = ((numbers * (share or 0.0)).floor().diff() > 0) & (numbers[:-1] < taught)
    if share and not own.any():
        raise HealError(
            f"on_policy={share:g} of the {taught} rows that the teacher scores is less than one row: the student would "
            f"write none; choose a share of at least 1/{taught}, or more --tokens"
        )
    return own


def text_of(order: Tensor, own: Tensor) -> Tensor:
    """(rows,), indices of the training row that is read, or lends its first words, for each row of the run.

    Args:
        order: the training rows in their order, at least one and as many as there are rows not in `own`.
    """
    text, ours = int((~own).sum()), int(own.sum())
    found = torch.empty(len(own), dtype=torch.long)
    found[~own] = order[:text]
    found[own] = order[torch.arange(ours) * max(1, text) // max(1, ours)]
    return found


class OwnText:
    """The rows that the student writes.

    Attributes:
        own: as `written` gives it.
        every: the steps of a round.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        tokenizer: Any,
        plan: Steps,
        own: Tensor,
        seed: int,
        saved: Path | None,
    ):
        """saved: the training checkpoint from which the run resumes."""
        self.accelerator, self.student, self.tokenizer = accelerator, student, tokenizer
        self.plan, self.own, self.seed = plan, own, seed
        a_step = max(1, int(own.sum())) / max(1, plan.lm_from)
        most = -(-plan.lm_from // ROUNDS)
        self.every = max(1, min(most, int(ROUND_ROWS * accelerator.num_processes / a_step)))
        self.rows: dict[int, Tensor] = {}  # of the round: number of the row -> its ids (L,), int32
        self.faults: dict[int, str] = {}  # of the round: number of the row -> what is wrong with its text
        self.counts = Counter[str]()  # of the run: rows, and each of FAULTS
        if saved is not None:
            self._load(saved / FILE)

    def begin(self, step: int, text: HealText, lenders: Tensor, on_progress: Listener) -> None:
        """Write the rows of the round that begins with `step`, if one does; with all processes.

        Args:
            lenders: as `text_of` gives them.

        Raises:
            HealError: more than half of the texts so far are dropped.
        """
        if step % self.every:
            return
        first, last = step * self.plan.batch_rows, (step + self.every) * self.plan.batch_rows
        numbers = (self.own[first:last].nonzero()[:, 0] + first).tolist()
        self.rows, self.faults = {}, {}
        if not numbers:
            return
        begun = first_words(text.train[lenders[numbers]], self.tokenizer)
        for number, words, ids in self._write(numbers, begun, step, on_progress):
            fault = self._fault(ids[len(words) :].tolist())
            if fault is None:
                self.rows[number] = ids.int()
            else:
                self.faults[number] = fault
        self.counts.update(rows=len(numbers), **Counter(self.faults.values()))
        dropped = sum(self.counts[fault] for fault in FAULTS)
        if dropped > FEW and 2 * dropped > self.counts["rows"]:
            raise HealError(
                f"{dropped} of {self.counts['rows']} texts that the student wrote are dropped "
                f"({self.counts['empty']} empty, {self.counts['loops']} in loops); it does not write well enough to "
                "learn from them: heal it first without --on-policy, or with --layer-tokens"
            )

    def _write(
        self, numbers: list[int], begun: list[list[int]], step: int, on_progress: Listener
    ) -> list[tuple[int, list[int], Tensor]]:
        """(number, first words, ids) of each row; every process writes some of them, and gets all."""
        accelerator, length = self.accelerator, self.plan.length
        together, found = -(-len(numbers) // batches_of(len(numbers), length)), []
        tokens = self.plan.rows * length
        model, known = self.student.eval().model, self.student.vocab_size
        starts = range(0, len(numbers), together)
        for start in starts[accelerator.process_index :: accelerator.num_processes]:
            part = slice(start, start + together)
            generator = torch.Generator().manual_seed(
                random.Random(f"{self.seed} {numbers[start]}").getrandbits(63)
            )
            with accelerator.autocast() if accelerator.device.type == "cuda" else nullcontext():
                for ids in continued(model, begun[part], length, generator, vocab_size=known):
                    if ids.shape[1] % max(1, length // 10) == 0:  # each message is a line in a log
                        message = (
                            f"the student writes {len(numbers)} rows, token {ids.shape[1]:,} of {length:,}"
                        )
                        on_progress(Progress("heal", step * self.plan.step_tokens, tokens, message))
            found += list(zip(numbers[part], begun[part], ids, strict=True))
        return sorted(gather_object(found), key=lambda row: row[0])

    def _fault(self, ids: list[int]) -> str | None:
        """What is wrong with a text: "empty" or "loops"; None for nothing."""
        if not self.tokenizer.decode(ids, skip_special_tokens=True).strip():
            return "empty"
        return "loops" if loops(ids) else None

    def put_in(self, rows: Rows, numbers: Tensor) -> Rows:
        """`rows` with the student's texts in the place of those that lent it their first words.

        Args:
            numbers: (N,), of the rows in the run.
        """
        ids, positions = rows.ids.clone(), rows.positions.clone()
        by_student = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
        for place, number in enumerate(numbers.tolist()):
            if number in self.rows:
                ids[place] = self.rows[number].to(ids)
                positions[place] = torch.arange(len(ids[place])).to(positions)
                by_student[place] = True
        return Rows(ids, positions, by_student)

    def facts(self, step: int) -> dict[str, int]:
        """What metrics record of a step: its rows of the student's own text, and those that were dropped."""
        numbers = range(step * self.plan.batch_rows, (step + 1) * self.plan.batch_rows)
        faults = Counter(self.faults.get(number) for number in numbers)
        own = sum(number in self.rows for number in numbers)
        return {"own_rows": own} | {f"own_{fault}": faults[fault] for fault in FAULTS}

    def save(self, folder: Path) -> None:
        """Write the round to a training checkpoint."""
        parts = {"faults": self.faults, "counts": self.counts, "every": self.every}
        facts = {name: json.dumps(part) for name, part in parts.items()}
        save_tensors({str(number): ids for number, ids in self.rows.items()}, folder / FILE, facts)

    def _load(self, file: Path) -> None:
        with safe_open(file, framework="pt") as saved:
            facts = saved.metadata()
            self.rows = {int(name): saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        self.faults = {int(number): fault for number, fault in json.loads(facts["faults"]).items()}
        self.counts = Counter(json.loads(facts["counts"]))
        self.every = json.loads(facts["every"])  # another number of processes would divide the run otherwise
