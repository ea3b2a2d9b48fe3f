"""What is evaluated: the options of `mhconvert eval`, and a recipe's stage `eval`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal

from mhconvert.errors import RecipeError

from ..convert.recipe.written_weights import DTYPES, dtype_name
from ..convert.validation.option import Names, Option, Takes, default
from ..convert.validation.settings import Settings
from .written_values import needle_depths, one_name, require_needles, task_names, token_counts

Suite = Literal["quick", "standard", "transmla", "moh", "dha", "open-llm", "generation"]
Backend = Literal["hf", "vllm"]
KvCacheDtype = Literal["auto", "int8", "int4", "int3", "int2", "fp8"]
OWN_CACHE: KvCacheDtype = "auto"
LongContextKind = Literal["longheads", "yarn", "dynamic", "window"]
RETRIEVAL_LENGTHS = (256, 512, 1024, 2048)
RETRIEVAL_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
BASELINES: tuple[KvCacheDtype, ...] = ("int8", "int4", "int3", "int2")  # the donor's caches beside a curve


@dataclass(frozen=True)
class EvalSettings(Settings):
    """Evaluation beside the donor: a suite, tasks, text, retrieval, generation or refusals: at least one is named."""

    fault = RecipeError

    suite: Annotated[
        Suite | None,
        Option(
            "A list of lm-eval tasks with their shots: quick and standard, with five kinds of text and texts that the "
            "models write, need no download, generation is tasks that are answered in writing, the others are those "
            "of the papers."
        ),
    ] = None
    tasks: Annotated[
        Takes[tuple[str, ...], Names],
        Option(
            "lm-eval tasks, groups, or quoted globs such as 'arc_*', beside the suite's.",
            "NAME,NAME,…",
            parse=task_names,
            also=str,
        ),
    ] = default(())
    text: Annotated[
        Takes[tuple[str, ...], Names],
        Option(
            "Text, JSON lines or Parquet: perplexity, KL and top-1 agreement; may be repeated.",
            "FILE",
            parse=one_name,
            also=str,
            repeat=True,
        ),
    ] = default(())
    data: Annotated[
        Takes[str | None, str | PurePath | None],
        Option(
            "Folder with local copies (JSON lines) of hellaswag, arc, gsm8k_cot, ifeval, … instead of the Hub, and of "
            "the kinds of text of --suite standard.",
            "DIR",
        ),
    ] = default(None)
    include_path: Annotated[
        Takes[str | None, str | PurePath | None], Option("Folder of lm-eval task YAMLs of your own.", "DIR")
    ] = default(None)
    limit: Annotated[
        int | None, Option("Documents of each task, from its first.", "N", ge=1, default="all")
    ] = None
    num_fewshot: Annotated[
        int | None,
        Option("Examples before each question.", "N", ge=0, default="the suite's or the task's own"),
    ] = None
    chat_template: Annotated[
        bool | None,
        Option(
            "Whether tasks are asked through the chat template; it changes scores, and is recorded.",
            flag="--chat-template/--no-chat-template",
            default="of --suite generation where the donor has one, else not",
        ),
    ] = None
    run_generated_code: Annotated[
        bool,
        Option(
            "Run the code that models write in tasks such as humaneval, on this machine and with your rights; without "
            "it humaneval only says whether that code parses."
        ),
    ] = False
    retrieval: Annotated[bool, Option("A number hidden in texts of several lengths: is it found again?")] = (
        False
    )
    retrieval_lengths: Annotated[
        Takes[tuple[int, ...], str | Sequence[int]],
        Option("Of retrieval: tokens of a text at most.", "N,N,…", parse=token_counts, also=str),
    ] = default(RETRIEVAL_LENGTHS)
    retrieval_depths: Annotated[
        Takes[tuple[float, ...], str | Sequence[float]],
        Option(
            "Of retrieval: where in a text the needle is, from 0, first, to 1, last.",
            "D,D,…",
            parse=needle_depths,
            also=str,
        ),
    ] = default(RETRIEVAL_DEPTHS)
    retrieval_trials: Annotated[
        int, Option("Of retrieval: texts for each length and each depth.", "N", ge=1)
    ] = 2
    generation: Annotated[
        bool, Option("Texts that each model writes, beside its donor's: do they drift, loop or end?")
    ] = False
    prompts: Annotated[
        Takes[str | None, str | PurePath | None],
        Option(
            "Of generation: one a line, or JSON lines with 'prompt', perhaps 'kind', 'language' and 'format'.",
            "FILE",
            default="forty of our own",
        ),
    ] = default(None)
    max_new_tokens: Annotated[int, Option("Of generation: tokens of a text at most.", "N", ge=1)] = 256
    refusals: Annotated[
        bool, Option("Requests that should be refused: does the model refuse as many as its donor?")
    ] = False
    requests: Annotated[
        Takes[str | None, str | PurePath | None],
        Option("Of refusals: requests, one a line.", "FILE", default="two dozen of our own"),
    ] = default(None)
    sequences: Annotated[
        int, Option("Rows of text: its first N × sequence_length tokens are used.", "N", ge=1)
    ] = 16
    sequence_length: Annotated[int, Option("Tokens of a row of text.", "L", ge=8)] = 1024
    batch_size: Annotated[
        int | None,
        Option("Rows of questions together.", "ROWS", ge=1, default="found by lm-eval on CUDA, 8 on a CPU"),
    ] = None
    max_length: Annotated[
        int | None,
        Option("Tokens of a row of a task at most.", "N", ge=2, default="what the model reads"),
    ] = None
    dtype: Annotated[
        str | None,
        Option(
            "Of the weights in tasks, retrieval, generation and refusals: float32, bfloat16 or float16; texts are "
            "measured in float32.",
            default="their own; of generation float32",
            parse=dtype_name,
            also=str,
            words=DTYPES,
        ),
    ] = None
    kv_cache_dtype: Annotated[
        KvCacheDtype,
        Option(
            "Of the KV cache. auto: the model's own; int8 … int2: KIVI's codes, keys by channel and values by token in "
            "groups of 32; fp8: e4m3 with scale 1."
        ),
    ] = OWN_CACHE
    long_context: Annotated[
        LongContextKind | None,
        Option(
            "How texts and needles beyond the trained length are read, beside the donor as it is. longheads: each head "
            "reads its best chunks; window: the first four tokens and a window; yarn, dynamic: RoPE scaled."
        ),
    ] = None
    chunk_size: Annotated[
        int | None,
        Option(
            "Of longheads: tokens of a chunk.",
            "N",
            ge=1,
            default="256, or a sixteenth of the trained length if less",
        ),
    ] = None
    chunks: Annotated[
        int | None,
        Option(
            "Of longheads: chunks that a head reads, the first one and the last two among them.",
            "N",
            ge=3,
            default="as many as the trained length holds",
        ),
    ] = None
    backend: Annotated[
        Backend, Option("What runs the tasks: transformers, or vllm where it is installed, see python.")
    ] = "hf"
    python: Annotated[
        Takes[str | None, str | PurePath | None],
        Option("With backend vllm: the Python of the environment that has it.", "FILE", default="this one"),
    ] = default(None)

    def check(self) -> None:
        """Raise RecipeError where nothing is to be evaluated."""
        if not any((self.suite, self.tasks, self.text, self.retrieval, self.generation, self.refusals)):
            raise RecipeError(
                "there is nothing to evaluate; name a suite, tasks or text, or set retrieval, generation or refusals: "
                "true"
            )
        if not self.generation and (self.prompts or self.max_new_tokens != EvalSettings.max_new_tokens):
            raise RecipeError("prompts and max_new_tokens are of generation: set that too, or leave them out")
        shape = (self.sequences, self.sequence_length)
        if not self.text and shape != (EvalSettings.sequences, EvalSettings.sequence_length):
            raise RecipeError("sequences and sequence_length are of text: name one, or leave them out")
        require_needles(self.retrieval_lengths, self.retrieval_depths)
        probe = (self.retrieval_lengths, self.retrieval_depths, self.retrieval_trials)
        usual = (RETRIEVAL_LENGTHS, RETRIEVAL_DEPTHS, EvalSettings.retrieval_trials)
        if not self.retrieval and probe != usual:
            raise RecipeError(
                "retrieval_lengths, _depths and _trials are of retrieval: set that too, or leave them out"
            )
        if self.long_context and (
            self.has_tasks or self.generation or self.refusals or not (self.text or self.retrieval)
        ):
            raise RecipeError(
                "long_context is of text and retrieval, whose rows may be longer than the model's: measure those alone"
            )
        if self.requests and not self.refusals:
            raise RecipeError("requests are of refusals: set that too, or leave them out")

    @property
    def text_files(self) -> tuple[Path, ...]:
        """The text files, with ~ expanded."""
        return tuple(Path(name).expanduser() for name in self.text)

    @property
    def prompts_file(self) -> Path | None:
        """The file of prompts, with ~ expanded; None for our own."""
        return Path(self.prompts).expanduser() if self.prompts else None

    @property
    def requests_file(self) -> Path | None:
        """The file of requests, with ~ expanded; None for our own."""
        return Path(self.requests).expanduser() if self.requests else None

    @property
    def data_folder(self) -> Path | None:
        """The folder with local copies of the tasks' data, with ~ expanded."""
        return Path(self.data).expanduser() if self.data else None

    @property
    def task_folder(self) -> Path | None:
        """The folder of the user's own lm-eval tasks, with ~ expanded."""
        return Path(self.include_path).expanduser() if self.include_path else None

    @property
    def has_tasks(self) -> bool:
        """Whether lm-eval is asked."""
        return bool(self.tasks) or self.suite is not None
