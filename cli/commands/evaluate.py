"""`mhconvert eval`: how near converted checkpoints stay to their donor, on texts, on tasks and on needles."""

from __future__ import annotations

from typing import Any, TextIO

from ..evaluation_tables import show
from ..options import common
from ..options import conversion as o
from ..options import evaluation as e
from ..output import Flags, calm_harness, calm_transformers, execute
from ..progress import progress

INTERRUPTED = "interrupted; the same command goes on after what is measured"


def command(
    checkpoints: e.Checkpoints,
    text: e.Texts = None,
    tasks: e.Tasks = None,
    suite: e.Suite = None,
    retrieval: e.Retrieval = False,
    against: o.Against = None,
    sequence_length: o.SequenceLength = 1024,
    sequences: o.Sequences = 16,
    data: e.Data = None,
    include_path: e.IncludePath = None,
    num_fewshot: e.NumFewshot = None,
    limit: e.Limit = None,
    batch_size: e.BatchSize = None,
    max_length: e.MaxLength = None,
    chat_template: e.ChatTemplate = False,
    backend: e.Backend = "hf",
    dtype: e.TaskDtype = None,
    fresh: e.Fresh = False,
    record: e.Record = False,
    report: e.Pages = None,
    device: common.Device = None,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Measure CKPTs beside their donor: perplexity and KL on texts, lm-eval's tasks, retrieval at length.

    Several GPUs: accelerate launch --num_processes N -m mhconvert.cli.main eval CKPT ...
    """
    names = tuple(word.strip() for word in (tasks or "").split(",") if word.strip())

    def work(_: TextIO) -> dict[str, Any]:
        calm_harness(debug)
        from mhconvert import api

        from ...eval.comparison import Settings
        from ...eval.page import page
        from ...eval.tasks.harness import Options
        from ...eval.tasks.task_choice import TaskChoice

        calm_transformers()
        for path in report or []:
            page.check(path)
        settings = Settings(
            texts=tuple(text or ()),
            sequences=sequences,
            sequence_length=sequence_length,
            choice=TaskChoice(names, suite, data, include_path, num_fewshot),
            options=Options(limit, batch_size, max_length, dtype, chat_template, backend),
            retrieval=retrieval,
            fresh=fresh,
        )
        with progress(quiet) as listener:
            result = api.evaluate(
                checkpoints,
                settings,
                against=against,
                record=record,
                device=device,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )
        for path in report or [] if result else []:
            page.write(path, result, *page.sources(result))
        return result

    execute(Flags(json, quiet, debug), work, show, interrupted=INTERRUPTED)
