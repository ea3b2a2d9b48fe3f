"""`mhconvert generate`: text from a converted checkpoint or a donor."""

from __future__ import annotations

from typing import Any, TextIO

from ..options import common
from ..options import conversion as o
from ..output import Flags, calm_transformers, execute


def command(
    checkpoint: o.Checkpoint,
    prompt: o.Prompt,
    max_new_tokens: o.MaxNewTokens = 64,
    chat: o.Chat = False,
    temperature: o.Temperature = 0.0,
    seed: common.Seed = 0,
    device: common.Device = None,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Continue PROMPT, greedily by default. The prompt and what follows it go to stdout."""

    def work(stdout: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()

        def write(text: str) -> None:
            print(text, end="", file=stdout, flush=True)

        return api.generate(
            checkpoint,
            prompt,
            max_new_tokens=max_new_tokens,
            chat=chat,
            temperature=temperature,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            on_text=None if json else write,
        )

    execute(Flags(json, quiet, debug), work, show)


def show(_: dict[str, Any], console: Any) -> None:
    """The text is on stdout already; end its line."""
    console.print()
