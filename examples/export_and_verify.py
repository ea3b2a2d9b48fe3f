"""Convert with one size for all layers, export to a stock architecture, and compare the logits of both."""

from __future__ import annotations

import argparse

import mhconvert
from mhconvert.convert.methods.mla.settings import MLASettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("checkpoint", help="folder of the converted model")
    parser.add_argument("export", help="folder of the export")
    parser.add_argument("--kv-budget", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=None, help="calibration tokens")
    parser.add_argument("--length", type=int, default=None, help="tokens of a calibration row")
    args = parser.parse_args()

    recipe = mhconvert.Recipe(
        model=args.model,
        method="mla",
        settings=MLASettings(kv_budget=args.kv_budget, profile="portable"),
        output=args.checkpoint,
        effort="quick",
        calibration=mhconvert.Calibration(tokens=args.tokens, sequence_length=args.length),
    )
    mhconvert.convert(recipe)
    exported = mhconvert.export(args.checkpoint, "auto", args.export)
    print(f"exported as {exported['to']}: {exported['why']}")

    found = mhconvert.verify(args.export)
    print(f"logits differ by {found['relative_difference']:.1e} standard deviations")
    print(f"greedy text equal: {found['greedy_equal']}")


if __name__ == "__main__":
    main()
