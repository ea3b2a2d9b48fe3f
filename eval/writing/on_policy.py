"""KL(converted ‖ donor) on text that the converted model writes: what a tolerance on generation is of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, Progress

from ...convert.checkpoint.provenance import prompts_digest
from ...convert.open_model import OpenModel, open_model
from ...convert.recipe.recipe import Recipe
from ...convert.recipe.tolerance import OWN_PROMPTS, on_policy, prompts_file
from ..compared_models import candidates_of, open_models
from ..generation import Options
from ..result_cache import Store
from ..settings import EvalSettings
from ..tasks.candidate import LazyModel
from .comparison import SEEDS, TEMPERATURE, Writer, judged_texts
from .differences import error, mean
from .prompts import Asked, Prompt, read, token_rows

SETTINGS = EvalSettings(generation=True)  # as `mhconvert eval --generation` measures
LEAST_NEW_TOKENS = 16


@dataclass(frozen=True)
class Given:
    """The prompts of a tolerance on generation, which are read once for all its trials.

    Attributes:
        source: the name of their file; OWN_PROMPTS for our own.
        digest: as `provenance.prompts_digest` has it.
    """

    prompts: list[Prompt]
    source: str
    digest: str


def check(recipe: Recipe) -> Given | None:
    """The prompts of a recipe with a tolerance on generation; None for one without.

    Raises:
        MhconvertError: The donor cannot be asked: the file is bad, its template refuses one, it lacks an embedding for
            a token, or it reads too few tokens. No weights are read.
    """
    if not on_policy(recipe.tolerance):
        return None
    file = prompts_file(recipe.prompts)
    given = Given(read(file), file.name if file else OWN_PROMPTS, prompts_digest(file))
    opened = open_model(recipe.model, device=recipe.device, trust_remote_code=recipe.trust_remote_code)
    opened.require_tokenizer()
    _asked(opened, given)
    return given


def _asked(opened: OpenModel, given: Given) -> Asked:
    """The prompts, and texts of as many tokens as `mhconvert eval` asks for, or as the model reads behind them."""
    longest, most = max(map(len, token_rows(opened, given.prompts))), SETTINGS.max_new_tokens
    room = most if opened.longest is None else opened.longest - longest
    if room < LEAST_NEW_TOKENS:
        raise MhconvertError(
            f"{opened.reference} reads at most {opened.longest} tokens, and the longest prompt of a tolerance on "
            f"generation has {longest}: no room to write; use a tolerance on held-out text, such as kl=0.05"
        )
    return Asked(given.prompts, given.source, min(most, room))


def measure(
    folder: Path, donor: str, recipe: Recipe, *, given: Given, kept: Path, on_progress: Listener
) -> dict[str, Any]:
    """How far the model in `folder` is from its donor where it writes: kl, kl_stderr over prompts, in nats a token, as
    `mhconvert eval --generation` has them; prompts, digest, count, max_new_tokens, dtype.

    Args:
        folder: of a converted model; a report or a record it need not have.
        donor: its reference.
        recipe: device, and whether code of the donor may run.
        given: as `check` has read them.
        kept: a folder for texts and readings, which are not made again.
        on_progress: called with the texts that are written, and then read.
    """
    device, trusted = recipe.device, recipe.trust_remote_code
    opened = open_models([str(folder)], donor, True, device, trusted, lambda _: None)
    asked = _asked(opened[0], given)
    own = [token_rows(each, asked.prompts) for each in opened]

    def tell(name: str, done: int, total: int) -> None:
        on_progress(Progress("search", done, total, name.partition(": ")[2]))

    reader, writer = (
        Writer(LazyModel(each, torch.float32), rows, Store(kept), False, tell)
        for each, rows in zip(candidates_of(opened, SETTINGS), own, strict=True)
    )
    texts = writer.texts(Options(asked.max_new_tokens, temperature=TEMPERATURE, seed=SEEDS[0]))
    means = [sum(each["kl"]) / len(each["kl"]) for each in judged_texts(writer, reader, texts)]
    return {
        "kl": mean(means),
        "kl_stderr": error(means),
        "prompts": asked.source,
        "digest": given.digest,
        "count": len(asked.prompts),
        "max_new_tokens": asked.max_new_tokens,
        "dtype": "float32",
    }
