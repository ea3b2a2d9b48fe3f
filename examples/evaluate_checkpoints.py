"""Perplexity, KL divergence and agreement of several checkpoints beside their donor, on a text."""

from __future__ import annotations

import argparse
from pathlib import Path

import mhconvert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    args = parser.parse_args()

    settings = mhconvert.EvalSettings(
        text=(args.text,), sequences=args.sequences, sequence_length=args.length
    )
    result = mhconvert.evaluate(args.checkpoints, settings)
    for text in result["texts"]:
        for model, row in zip(result["models"], text["models"], strict=True):
            kl = f"  KL {row['kl']:.4f}" if row.get("kl") is not None else ""
            print(f"{model['name']:<30}  perplexity {row['perplexity']:10.3f}{kl}")


if __name__ == "__main__":
    main()
