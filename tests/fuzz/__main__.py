"""`make fuzz`: damaged inputs of every kind in turn for an hour; counts by kind, and the edits of what was found."""

from __future__ import annotations

import argparse
import json
import random
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .edits import Edit
from .kinds import KINDS, attempt

ROUND = 20  # inputs of one kind before it is another's turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder of what was found")
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    counts: dict[str, Counter[str]] = {name: Counter() for name in asked.kinds}
    end, turn = time.monotonic() + 60 * asked.minutes, 0
    while time.monotonic() < end:
        for name in asked.kinds:
            _round(name, asked.seed + turn, counts[name], asked.found)
        turn += 1
        print(_table(counts), flush=True)
    return int(any(count["faults"] for count in counts.values()))


def _round(name: str, number: int, count: Counter[str], found: Path) -> None:
    @seed(number)
    @settings(
        max_examples=ROUND,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(KINDS[name].edits, min_size=1, max_size=3))
    def tried(edits: list[Edit]) -> None:
        count["tries"] += 1
        try:
            count[attempt(name, edits)] += 1
        except Exception:
            count["faults"] += 1
            found.mkdir(exist_ok=True)
            file = found / f"{name}-{number}-{count['tries']}.json"
            file.write_text(
                json.dumps({"edits": edits, "verdict": "refused", "said": traceback.format_exc()})
            )

    tried()


def _table(counts: dict[str, Counter[str]]) -> str:
    columns = ("tries", "refused", "accepted", "faults")
    lines = [f"{'kind':12}" + "".join(f"{column:>10}" for column in columns)]
    lines += [f"{name:12}" + "".join(f"{count[c]:>10}" for c in columns) for name, count in counts.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
