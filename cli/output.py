"""How every command ends: one result on stdout, everything else on stderr, one line for an error, an exit code.

0 done · 1 a fault that the message explains, also a value out of bounds · 2 wrong usage: an option that there is not,
a value that cannot be read, options that exclude each other · 130 Ctrl-C · 143 SIGTERM.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

import typer

from mhconvert.errors import MhconvertError

from .plain_text import one_line, plain_values
from .process_faults import Terminated, sigterm_raises

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Flags:
    """The flags that all commands have."""

    json: bool = False
    quiet: bool = False
    debug: bool = False


Work = Callable[[TextIO], dict[str, Any]]
Show = Callable[[dict[str, Any], Any], None]
Faults = Callable[[dict[str, Any]], list[str]]


def _none(_: dict[str, Any]) -> list[str]:
    return []


def execute(
    flags: Flags, work: Work, show: Show, *, interrupted: str = "interrupted", faults: Faults = _none
) -> NoReturn:
    """Run `work(stdout)`, show its result, exit.

    Within `work`, only the stream it is given reaches stdout. `show(result, console)` prints for people. faults: of
    several things that a result tells, what is wrong with some of them, a line each (exit 1).
    """
    _calm(flags)
    try:
        with sigterm_raises(), _guarded_stdout() as stdout:
            result = work(stdout)
        _print(flags, result, show)
        found = faults(result)
    except Terminated as error:
        _fail(flags, interrupted.replace("interrupted", "terminated", 1), error, 143)
    except KeyboardInterrupt as error:
        _fail(flags, interrupted, error, 130)
    except MhconvertError as error:
        _fail(flags, str(error), error, 1)
    except BrokenPipeError:  # the reader of stdout has gone; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(1) from None
    except Exception as error:
        _fail(flags, _unforeseen(error, flags.debug), error, 1)
    for fault in found:
        print(f"mhconvert: {one_line(fault)}", file=sys.stderr, flush=True)
    raise typer.Exit(1 if found else 0)


def shown(quiet: bool, show: Show) -> Show:
    """Return `show`, or with `quiet` a function that prints the output folder alone."""

    def folder(report: dict[str, Any], console: Any) -> None:
        console.out(report["output"], highlight=False)

    return folder if quiet else show


def show_report(report: dict[str, Any], console: Any) -> None:
    """Print a conversion's or a healing's table, a sample and how to load the folder."""
    from ..eval.report.conversion_tables import show

    show(report, console)


def _print(flags: Flags, result: dict[str, Any], show: Show) -> None:
    if not result:  # of several processes the first has it
        return
    if flags.json:
        from ..eval.report.conversion_tables import json_safe

        print(_json(json_safe(result)), flush=True)
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    show(plain_values(result), console)
    sys.stdout.flush()


def _unforeseen(error: Exception, debug: bool) -> str:
    """What is known of an error that nobody has put into words: the command, the step, what is left, what to do."""
    from ..convert.storage.disk_space import out_of_space

    words = out_of_space(error)
    if words is None and isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"  # the system's own words of a file are enough
    words = words or f"{type(error).__name__}: {error}"
    told = "; ".join([words, *getattr(error, "__notes__", [])])
    hint = "" if debug else "; --debug shows where: please report it with that"
    return f"'{shlex.join(sys.argv[1:])}' failed: {told}{hint}"


def _fail(flags: Flags, message: str, error: BaseException, code: int) -> NoReturn:
    if flags.debug:
        traceback.print_exception(error)
    message = one_line(message)
    print(f"mhconvert: {message}", file=sys.stderr, flush=True)
    if flags.json:
        print(_json({"error": message}), flush=True)
    raise typer.Exit(code)


def _json(value: dict[str, Any]) -> str:
    """One line of JSON, escaped where stdout cannot show every character."""
    shown = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    return json.dumps(value, ensure_ascii=not shown, allow_nan=False)


@contextmanager
def _guarded_stdout() -> Iterator[TextIO]:
    """Yield the real stdout, while everything else that writes to it (Python, C, child processes) reaches stderr."""
    real, copy = sys.stdout, None
    real.flush()
    try:
        if real.fileno() == 1:
            copy = os.dup(1)
            os.dup2(2, 1)
    except io.UnsupportedOperation:  # a stream in memory
        pass
    sys.stdout = sys.stderr
    try:
        if copy is None:
            yield real
        else:
            with os.fdopen(os.dup(copy), "w", encoding=real.encoding, errors=real.errors) as stream:
                yield stream
    finally:
        sys.stdout = real
        if copy is not None:
            os.dup2(copy, 1)
            os.close(copy)


def _calm(flags: Flags) -> None:
    """Silence the libraries' warnings and progress bars unless --debug is given; called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if flags.quiet or flags.json or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(
        level=logging.DEBUG if flags.debug else logging.ERROR, stream=sys.stderr, format=LOG_FORMAT
    )
    if flags.debug:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def calm_harness(debug: bool) -> None:
    """Silence the progress bars and logs of lm-eval and datasets; called before they are imported."""
    if not debug:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")


def calm_transformers() -> None:
    """Silence transformers' progress bars; it must be imported first, so commands that load models call this."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
