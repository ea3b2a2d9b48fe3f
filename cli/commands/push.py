"""`mhconvert push CKPT USER/REPO`: a checkpoint or an adapter onto the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ...eval.report.units import size
from ..options import common
from ..output import Flags, execute
from ..progress import progress

Pushed = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A folder that mhconvert wrote, or a saved adapter.")
]
Repo = Annotated[
    str,
    typer.Argument(metavar="USER/REPO", help="Where it goes; made if it is not there. REPO alone: yours."),
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private.")]
Revision = Annotated[
    str | None, typer.Option(metavar="BRANCH", help="Branch to write, made if it is not there; main.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the folder and list what would be sent.")]
Message = Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit; Upload CKPT.")]


def command(
    folder: Pushed,
    repo: Repo,
    private: Private = False,
    revision: Revision = None,
    dry_run: DryRun = False,
    message: Message = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Publish a checkpoint or an adapter on the Hugging Face Hub: all of it in one commit, or nothing.

    The token is that of `hf auth login`, or HF_TOKEN. The model card gets the figures of evaluation.json.
    """

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        with progress(quiet) as listener:
            return api.push(
                folder,
                repo,
                private=private,
                revision=revision,
                dry_run=dry_run,
                message=message,
                on_progress=listener,
            )

    execute(
        Flags(json, quiet, debug),
        work,
        _show_address if quiet else _show,
        interrupted="interrupted; push again to go on, what has arrived is not sent twice",
    )


def _show_address(result: dict[str, Any], console: Any) -> None:
    console.out(result["url"], highlight=False)


def _show(result: dict[str, Any], console: Any) -> None:
    from rich.table import Column, Table

    table = Table(Column("file"), Column("", justify="right"))
    for file in result["files"]:
        table.add_row(file["path"], size(file["bytes"]))
    console.print(table)
    for title, names in (("not published", result["left_out"]), ("removed there", result["removed"])):
        if names:
            console.out(f"{title}: {', '.join(names)}", highlight=False)
    for note in result["notes"]:
        console.out(f"note: {note}", highlight=False)
    visible = "private" if result["private"] else "public"
    total = f"{len(result['files'])} files, {size(result['bytes'])}"
    if result["dry_run"]:
        console.out(f"{total} would go to {result['url']}; nothing was sent", highlight=False)
        return
    console.out(f"{result['url']} ({visible}): {total}, commit {result['commit']}", highlight=False)
