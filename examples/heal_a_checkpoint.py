"""Train a converted checkpoint to predict as its donor does."""

from __future__ import annotations

import argparse

import mhconvert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--data", nargs="+", default=["self"], help="files, globs, dataset names, or self")
    parser.add_argument("--length", type=int, default=None, help="tokens of a row")
    args = parser.parse_args()

    settings = mhconvert.HealSettings(
        tokens=args.tokens,
        data=dict.fromkeys(args.data, 1.0),
        sequence_length=args.length,
        train="lora",
        loss={"kl": 1.0},
    )
    report = mhconvert.heal(args.checkpoint, settings, output=args.output)
    print(f"KL {report['before']['kl']:.4f} → {report['kl']:.4f} after {report['healing']['steps']} steps")


if __name__ == "__main__":
    main()
