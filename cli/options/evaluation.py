"""The options of `mhconvert eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT...", help="Folders that mhconvert wrote, adapters, or donors; several make one table."
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", metavar="FILE", help="UTF-8 text: perplexity, KL and top-1 agreement; may be repeated."
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME,…", help="lm-eval tasks, groups, or quoted globs such as 'arc_*'."),
]
Suite = Annotated[
    Literal["quick", "transmla", "moh", "dha", "open-llm"] | None,
    typer.Option(
        help="A list of tasks with its shots: quick needs no download, the others are those of the papers."
    ),
]
Retrieval = Annotated[
    bool, typer.Option("--retrieval", help="A number hidden in texts of several lengths: is it found again?")
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with local copies (JSON lines) of hellaswag, arc, piqa, … instead of the Hub.",
    ),
]
IncludePath = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of lm-eval task YAMLs of your own.")
]
NumFewshot = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Examples before each question; the suite's or the task's own."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Documents of each task, from its first; all.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="ROWS", help="Rows together; found by lm-eval on CUDA, 8 on a CPU."),
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Tokens of a row of a task at most; what the model reads."),
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template", help="Ask through the chat template; it changes scores, and is recorded."
    ),
]
Backend = Annotated[
    Literal["hf", "vllm"],
    typer.Option(help="What runs the tasks: transformers, or vllm where it is installed."),
]
TaskDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of the weights in tasks and --retrieval; their own. Texts are measured in float32."),
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
