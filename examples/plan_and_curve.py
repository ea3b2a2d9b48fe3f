"""What a conversion would need, and its quality at several KV budgets. Writes nothing."""

from __future__ import annotations

import argparse

import mhconvert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.1875, 0.125])
    parser.add_argument("--tokens", type=int, default=None, help="calibration tokens")
    parser.add_argument("--length", type=int, default=None, help="tokens of a calibration row")
    args = parser.parse_args()

    recipe = mhconvert.Recipe(
        model=args.model,
        method="mla",
        effort="quick",  # the closed form alone: no fit at any budget
        calibration=mhconvert.Calibration(tokens=args.tokens, sequence_length=args.length),
    )
    plan = mhconvert.plan(recipe)
    print(f"{plan['family']}: {plan['kv_bytes_per_token']['converted']} bytes of cache a token")
    print(f"needs {plan['disk_needed_bytes'] / 2**30:.2f} GiB of disk")
    print(f"needs {plan['memory_needed_bytes'] / 2**30:.2f} GiB of memory")

    curve = mhconvert.curve(recipe, args.budgets)
    for point in curve["points"]:
        print(
            f"{point['kv_budget']:6.1%}  KL {point['kl']:.4f}  perplexity × {point['perplexity_ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
