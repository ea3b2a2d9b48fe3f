"""What is damaged, how, and what a user then does with it."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.donors import TEXT, make_donor, make_gguf

from .edits import Edit, apply, byte_edits, document_edits

SECONDS = 120  # that no command takes on these inputs
UNKNOWN = "please report it"  # in the message of an exception that nobody foresaw
CALIBRATION = ("--calibration-tokens", 256, "--sequence-length", 64, "--effort", "quick", "--no-verify")


@dataclass(frozen=True)
class Kind:
    """One kind of damaged input.

    build: writes the whole input into a folder. edits: what is done to it. words: the commands that read it, given
    that folder and the OUT that they may write.
    """

    build: Callable[[Path], None]
    edits: st.SearchStrategy[Edit]
    words: Callable[[Path, Path], list[tuple[Any, ...]]]


def _donor(folder: Path) -> None:
    make_donor(folder, hidden=32, vocab=300, shards=2)
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")


def _gguf(folder: Path) -> None:
    folder.mkdir()
    make_gguf(folder / "donor.gguf", hidden=32, vocab=300)
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")


def _adapter(folder: Path) -> None:
    make_donor(folder / "donor", hidden=32, vocab=300)
    model = AutoModelForCausalLM.from_pretrained(folder / "donor")
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapter.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")


def _converted(folder: Path) -> None:
    make_donor(folder.with_name("donor"), hidden=32, vocab=300)
    (folder.with_name("donor") / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    words = (folder.with_name("donor"), "--to", "dha", "--kv-budget", 0.75, "-o", folder, *CALIBRATION)
    assert run(*words, "--calibration", folder.with_name("donor") / "text.txt")[0] == 0


def _recipe(folder: Path) -> None:
    _donor(folder)
    text = (
        f"model: {folder}\nmethod: mla\noutput: {folder / 'out'}\nsettings: {{kv_budget: 0.5}}\neffort: quick\n"
        "calibration: {sources: [self], tokens: 256, sequence_length: 64, held_out: 2}\n"
        "heal: {tokens: 128, data: {self: 1}, sequence_length: 64}\n"
        "eval: {suite: quick, limit: 2}\nexport: {to: auto}\n"
    )
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def _convert(donor: str, method: str = "mla") -> Callable[[Path, Path], list[tuple[Any, ...]]]:
    def words(folder: Path, out: Path) -> list[tuple[Any, ...]]:
        text = ("--calibration", folder / "text.txt", *CALIBRATION)
        size = ("--active", 0.75) if method == "moh" else ("--kv-budget", 0.75)
        return [("inspect", folder / donor), (folder / donor, "--to", method, *size, "-o", out, *text)]

    return words


DONOR_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
KINDS = {
    "config": Kind(_donor, document_edits("config.json"), _convert(".")),
    "tokenizer": Kind(_donor, document_edits("tokenizer.json", *DONOR_FILES), _convert(".", "moh")),
    "safetensors": Kind(
        _donor,
        document_edits(*SHARDS, "model.safetensors.index.json") | byte_edits(*SHARDS),
        _convert(".", "dha"),
    ),
    "gguf": Kind(_gguf, byte_edits("donor.gguf", within=6000), _convert("donor.gguf")),
    "text": Kind(_donor, byte_edits("text.txt"), _convert(".")),
    "recipe": Kind(
        _recipe,
        document_edits("recipe.yaml") | byte_edits("recipe.yaml"),
        lambda folder, out: [
            ("recipes", "validate", folder / "recipe.yaml"),
            ("run", folder / "recipe.yaml", "--dry-run"),
        ],
    ),
    "adapter": Kind(
        _adapter,
        document_edits("adapter_config.json", "adapter_model.safetensors"),
        lambda folder, out: [("merge", folder, "-o", out)],
    ),
    "checkpoint": Kind(
        _converted,
        document_edits("config.json", "mhconvert.json", "model.safetensors"),
        lambda folder, out: [
            ("inspect", folder),
            ("export", folder, "--to", "llama", "--duplicate", "-o", out),
        ],
    ),
}


def attempt(name: str, edits: list[Edit]) -> str:
    """Damage an input by `edits` and use it: "accepted" or "refused".

    Raises:
        AssertionError: for what no input may cause: an exception without words, a traceback, time without end, a
            changed input, an OUT of a command that failed.
    """
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "in", Path(place) / "out"
        shutil.copytree(_pristine(name), folder)
        if name in ("recipe", "adapter"):
            _move(folder, _pristine(name))
        apply(folder, edits)
        before = _content(folder)
        verdict = "accepted"
        for words in kind.words(folder, out):
            code, said = run(*words)
            what = f"{' '.join(map(str, words))} after {edits}: {said}"
            assert code in (0, 1, 2), what
            assert "Traceback" not in said, what
            assert UNKNOWN not in said, what
            assert code != 1 or "mhconvert: " in said, what
            assert not (code and out.exists()), what
            verdict = "refused" if code else verdict
        assert _content(folder) == before, edits
        return verdict


def run(*words: Any) -> tuple[int, str]:
    """`mhconvert WORD ...` in this process: its exit code and what it said on stderr."""
    from mhconvert.cli.main import main

    said = io.StringIO()
    argv, sys.argv = sys.argv, ["mhconvert", *map(str, words)]
    try:
        with _time_limit(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as end:
        return int(end.code or 0), said.getvalue()
    finally:
        sys.argv = argv
    return 0, said.getvalue()


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@cache
def _pristine(name: str) -> Path:
    place = Path(tempfile.mkdtemp(prefix="mhconvert-fuzz-")) / "whole"
    KINDS[name].build(place)
    return place


def _move(folder: Path, origin: Path) -> None:
    """Let the copy name its own folder where the original did."""
    for file in (folder / "recipe.yaml", folder / "adapter_config.json"):
        if file.exists():
            file.write_text(file.read_text().replace(str(origin), str(folder)))


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
