"""What a user may choose about the calibration text: a part of a recipe, and options of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mhconvert.errors import CalibrationError

from ..validation.option import Names, Option, Takes, default
from ..validation.settings import Settings

SHORTEST_ROW = 8  # tokens


def one_source(text: str) -> tuple[str, ...]:
    """Return the source as a tuple of one."""
    return (text,)


@dataclass(frozen=True)
class Calibration(Settings):
    """Text that the statistics and the layer-local fit see."""

    fault = CalibrationError

    sources: Annotated[
        Takes[tuple[str, ...], Names],
        Option(
            "Text to calibrate on: files (text, JSON lines or Parquet with `text` or a conversation, quoted globs) or "
            "datasets, may be repeated; self: sampled from the donor, as many rows as of one other source.",
            "FILE|DATASET|self",
            parse=one_source,
            also=str,
            flag="--calibration",
            repeat=True,
        ),
    ] = default(("self",))
    tokens: Annotated[
        int | None,
        Option(
            "Calibration tokens in all.",
            "N",
            ge=SHORTEST_ROW,
            range_hint=f"does not fill a row; use at least {SHORTEST_ROW}",
            flag="--calibration-tokens",
            default="by source, device and effort",
        ),
    ] = None
    sequence_length: Annotated[
        int | None,
        Option(
            "Tokens in a calibration row.",
            "N",
            ge=SHORTEST_ROW,
            range_hint=f"is too short; use at least {SHORTEST_ROW}",
            default="512, with swa and mla+swa 4096, or twice a wider window; at most what the donor reads",
        ),
    ] = None
    held_out: Annotated[
        int,
        Option(
            "Rows kept out of statistics and fit, on which fidelity is measured: as many of each source.",
            "ROWS",
            ge=2,
            range_hint="rows measure nothing; use at least 2",
        ),
    ] = 4

    def check(self) -> None:
        """Raise CalibrationError where there is no text, and for `self` named twice."""
        if not self.sources:
            raise CalibrationError("sources is empty; name files, datasets, or self")
        if self.sources.count("self") > 1:
            raise CalibrationError("sources has self more than once; name it once")
