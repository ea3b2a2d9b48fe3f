"""`mhconvert eval`: how near converted checkpoints stay to their donor: texts, tasks, needles and what they write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from mhconvert.errors import MhconvertError

from ...eval.settings import EvalSettings
from ..evaluation_tables import show
from ..options import common
from ..options.from_settings import Group, settings_options, values_of
from ..options.ignored import refuse_ignored
from ..output import Flags, calm_harness, calm_transformers, execute
from ..progress import progress

INTERRUPTED = "interrupted; the same command goes on after what is measured"


Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...", help="Folders that mhconvert wrote, adapters, or donors; several make one table."
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure anew what earlier runs have measured already.")]
Record = Annotated[
    bool,
    typer.Option(
        "--record", help="Keep the figures in each CKPT as evaluation.json, for its card on the Hub."
    ),
]
Pages = Annotated[
    list[Path] | None,
    typer.Option(
        "--report", metavar="FILE", help="Write the report as one page, .html or .md; may be repeated."
    ),
]
MEASURED = ("text", "tasks", "suite", "retrieval", "generation", "refusals")  # of which at least one is given
NOTHING = (
    "there is nothing to measure; give --text, --tasks, --suite, --retrieval, --generation or --refusals"
)
OF_TASKS = (
    "data",
    "include_path",
    "limit",
    "num_fewshot",
    "chat_template",
    "run_generated_code",
    "max_length",
    "backend",
)
OF_TEXT = ("sequences", "sequence_length")
OF_RETRIEVAL = ("retrieval_lengths", "retrieval_depths", "retrieval_trials")
OF_LONGHEADS = ("chunk_size", "chunks")
OF_GENERATION = ("prompts", "max_new_tokens")
GROUP = Group("What is measured", EvalSettings)


@settings_options(GROUP)
def command(
    checkpoints: Checkpoints,
    against: common.Against = None,
    fresh: Fresh = False,
    record: Record = False,
    report: Pages = None,
    device: common.Device = None,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    **options: Any,
) -> None:
    """Measure CKPTs beside their donor: on texts, on lm-eval's tasks, retrieval at length, generation, refusals.

    Several GPUs: accelerate launch --num_processes N -m mhconvert eval CKPT ...
    """

    if any(options[name] for name in MEASURED):
        _refuse_ignored(options)

    def work(_: TextIO) -> dict[str, Any]:
        if not any(options[name] for name in MEASURED):
            raise MhconvertError(NOTHING)
        settings = EvalSettings(**values_of(GROUP, options))
        calm_harness(debug)
        from mhconvert import api

        from ...eval.page import page

        calm_transformers()
        for path in report or []:
            page.check(path)
        with progress(quiet) as listener:
            result = api.evaluate(
                checkpoints,
                settings,
                against=against,
                record=record,
                fresh=fresh,
                device=device,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )
        for path in report or [] if result else []:
            page.write(path, result, *page.sources(result))
        return result

    execute(Flags(json, quiet, debug), work, show, interrupted=INTERRUPTED)


def _refuse_ignored(options: Mapping[str, Any]) -> None:
    """Raise BadParameter for an option of what is not measured."""
    tasks = options["tasks"] or options["suite"]
    own_dtype = tasks or any(options[name] for name in ("retrieval", "generation", "refusals"))
    rules = (
        (tasks, OF_TASKS, "is of tasks: name some with --tasks or --suite, or leave it out"),
        (tasks or options["generation"], ("batch_size",), "is of tasks and --generation: leave it out"),
        (
            own_dtype,
            ("dtype",),
            "is of tasks and of --retrieval, --generation and --refusals; texts are measured in float32: leave it out",
        ),
        (options["text"], OF_TEXT, "is of texts: name one with --text, or leave it out"),
        (options["retrieval"], OF_RETRIEVAL, "is of --retrieval: give that too, or leave it out"),
        (
            options["long_context"] == "longheads",
            OF_LONGHEADS,
            "is of --long-context longheads: leave it out",
        ),
        (options["generation"], OF_GENERATION, "is of --generation: give that too, or leave it out"),
        (options["refusals"], ("requests",), "is of --refusals: give that too, or leave it out"),
        (
            options["backend"] == "vllm",
            ("python",),
            "is of --backend vllm: give that too, or leave it out",
        ),
        (
            options["backend"] != "vllm" or options["generation"],
            ("batch_size",),
            "is of --backend hf; vllm makes its own batches: leave it out",
        ),
    )
    for used, names, words in rules:
        if not used:
            refuse_ignored(options, names, words)
