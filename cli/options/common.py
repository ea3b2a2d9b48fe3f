"""Options and arguments that several commands have. What a settings class declares is in `from_settings`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from ...convert.methods.registry import CACHE_METHODS, METHOD_NAMES, METHODS, info, settings_class
from ...convert.recipe.recipe import Calibration, Recipe
from ...convert.recipe.steps import methods_of
from ...convert.recipe.torch_device import known_device
from ...convert.recipe.written_weights import shard_size
from ...eval.settings import EvalSettings
from .from_settings import Group, readable
from .grouped_help import NAMES


def _described(methods: Collection[str]) -> str:
    """Return the methods with a line on each: "mla: latent attention; dha: …"."""
    return "; ".join(f"{name}: {info(name).help}" for name in methods)


def one_of(names: Collection[str], kind: str) -> Callable[[Any], Any]:
    """Return a check that a word is among `names`; its error calls them `kind`. See `GroupedCommand` for no word."""

    def check(name: str | None) -> str | None:
        if name is not None and name not in names:
            raise typer.BadParameter(f"'{name}' is not {kind}; choose one of {', '.join(names)}")
        return name

    check.__dict__[NAMES] = names
    return check


def chain_of(names: Collection[str]) -> Callable[[Any], Any]:
    """Return a check that a word is one of `names`, or several with a plus between them."""
    known = one_of(names, "a method")

    def check(chain: str | None) -> str | None:
        for name in methods_of(chain) if chain is not None else ():
            known(name)
        return chain

    check.__dict__[NAMES] = names
    return check


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show warnings, logs and the traceback of an error.")]
Device = Annotated[
    str | None,
    typer.Option(
        callback=readable(known_device),
        metavar="DEVICE",
        help="Torch device; CUDA if present, else the CPU.",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes inside the model folder.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of every random choice.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
ForceFile = Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip the reload in a bare process (it holds the whole model).")
]
MaxShardSize = Annotated[
    str,
    typer.Option(
        callback=readable(shard_size), metavar="SIZE", help="Size of one safetensors file, at most."
    ),
]

Donor = Annotated[
    str, typer.Argument(metavar="DONOR", help="Alias, org/name[@revision], folder, or .gguf file.")
]
Model = Annotated[
    str, typer.Argument(metavar="DONOR_OR_CKPT", help="A donor, or a folder that mhconvert wrote.")
]
Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A folder that mhconvert wrote, or a donor.")]
Against = Annotated[
    str | None,
    typer.Option(metavar="DONOR", help="The model to compare with; the one that CKPT was made from."),
]
Base = Annotated[
    str | None, typer.Option(metavar="DONOR", help="The adapter's base model; the one that it names.")
]
Method = Annotated[
    str,
    typer.Option(
        "--to",
        callback=chain_of(METHOD_NAMES),
        metavar="METHOD",
        help=f"{_described(METHOD_NAMES)}. A chain: dha+moh converts by dha, and the result by moh.",
    ),
]
Then = Annotated[
    str | None,
    typer.Option(
        "--then",
        callback=chain_of(METHOD_NAMES),
        metavar="METHOD",
        help="What follows --to: --to mla --then hydra puts an adapter for OUT into OUT-hydra.",
    ),
]
AnyMethod = Annotated[
    str | None,
    typer.Option(
        "--to",
        callback=one_of(METHODS, "a method that rewrites layers"),
        metavar="METHOD",
        help="With --random, the conversion to time: mla (the default), dha, or moh, whose --kv-budget is its share of "
        "active heads.",
    ),
]
CacheMethod = Annotated[
    str,
    typer.Option(
        "--to",
        callback=one_of(CACHE_METHODS, "a method that changes the KV cache"),
        metavar="METHOD",
        help=f"{_described(CACHE_METHODS)}.",
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; ./DONOR-METHOD.")
]

CALIBRATION = Group("Calibration", Calibration, layers=True)
TOLERANCE = Group("Conversion", Recipe, ("tolerance", "prompts"), layers=True, cache=True)
KV_CACHE = Group("KV cache", EvalSettings, ("kv_cache_dtype",))
LONG_CONTEXT = Group(
    "Texts beyond the trained length", EvalSettings, ("long_context", "chunk_size", "chunks")
)
ANY_METHOD = Group("Every method", Recipe, ("seed", "trust_remote_code"))


def method_groups(names: Collection[str], only: Collection[str] | None = None) -> list[Group]:
    """Return one group of options for each method; `only` restricts them to fields of these names."""
    return [Group(f"Options of {name}", settings_class(name), only, method=name) for name in names]


def recipe_group(heading: str, *fields: str) -> Group:
    """Return a group of a recipe's options that every method which rewrites layers has."""
    return Group(heading, Recipe, fields, layers=True)


def readable_overrides(texts: list[str] | None) -> list[str] | None:
    """Return the overrides of a recipe. Raises BadParameter for one that is not key=value in YAML."""
    from ...run.overrides import parsed

    for text in texts or ():
        readable(parsed)(text)
    return texts


def written(path: Path | None) -> Any:
    """Return the path as text, as the library takes it; None stays None."""
    return None if path is None else str(path)
