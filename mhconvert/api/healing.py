"""A converted checkpoint that is trained to predict as its donor does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.progress import Listener


def heal(
    checkpoint: str,
    settings: HealSettings,
    *,
    output: str | None = None,
    resume: bool = False,
    force: bool = False,
    verify: bool = True,
    tensorboard: Path | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Train a converted checkpoint to predict as its donor does.

    Args:
        checkpoint: a folder that `convert` wrote.
        settings: of the training.
        output: the folder; None: ./<checkpoint>-healed.
        resume: continue an interrupted run of the same settings in `OUT.partial`.
        force: replace an existing output folder.
        verify: reload the result in a bare process.
        tensorboard: a folder for a TensorBoard log.
        trust_remote_code: let a donor run its own code.
        on_progress: called with the progress.

    Returns:
        The report, also `report.json` in the folder: perplexity {donor, converted}, kl and top1_agreement on the
        held-out rows after healing, `before` with the same before it, and `healing`: settings, teacher, steps,
        trained_tokens, tokens_per_second, seconds and more. `metrics.jsonl` in the folder has every step.

    Raises:
        MhconvertError: What a user can correct. An output folder that exists afterwards is whole.
    """
    from mhconvert.eval.fidelity import Fidelity
    from mhconvert.eval.report import curve_plot
    from mhconvert.eval.report.model_card import write_report
    from mhconvert.heal import run
    from mhconvert.heal.open_models import Run

    def finish(folder: Path, report: dict[str, Any]) -> None:
        if settings.tokens:
            report["healing"]["plot"] = curve_plot.write_healing(folder)
        write_report(folder, report)

    place = Path(output) if output else Path(f"{Path(checkpoint).resolve().name}-healed")
    asked = Run(checkpoint, settings, place, resume, force, verify, tensorboard, trust_remote_code)
    return run.run(asked, measure=Fidelity, finish=finish, on_progress=on_progress)
