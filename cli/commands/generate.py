"""`mhconvert generate`: text from a converted checkpoint or a donor."""

from __future__ import annotations

from typing import Annotated, Any, TextIO

import typer

from ..options import common
from ..options.from_settings import settings_options, values_of
from ..options.ignored import refuse_ignored
from ..output import Flags, calm_transformers, execute

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Tokens to generate at most.")]
Chat = Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message in the chat template.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of sampling.  [default: 0]")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0: greedy; above: sampled.")]


@settings_options(common.KV_CACHE, common.LONG_CONTEXT)
def command(
    checkpoint: common.Checkpoint,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 64,
    chat: Chat = False,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    device: common.Device = None,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    **options: Any,
) -> None:
    """Continue PROMPT, greedily by default. The prompt and what follows it go to stdout."""

    if not temperature:
        refuse_ignored({"seed": seed}, ("seed",), "is of sampling: give --temperature, or leave it out")

    if options["long_context"] != "longheads":
        refuse_ignored(options, ("chunk_size", "chunks"), "is of --long-context longheads: leave it out")

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
            seed=seed or 0,
            **values_of(common.KV_CACHE, options),
            **values_of(common.LONG_CONTEXT, options),
            device=device,
            trust_remote_code=trust_remote_code,
            on_text=None if json else write,
        )

    execute(Flags(json, quiet, debug), work, show)


def show(_: dict[str, Any], console: Any) -> None:
    """End the line of the text, which is on stdout already."""
    console.print()
