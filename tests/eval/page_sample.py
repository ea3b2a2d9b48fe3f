"""An evaluation as `mhconvert eval` writes it: a donor, two conversions and one of them healed."""

from __future__ import annotations

from typing import Any

RECIPE = "model: tiny\nmethod: mla\nsettings:\n  kv_budget: 0.5\n# <b>bold</b> & more\n"


def model(name: str, role: str, method: str | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "reference": f"models/{name}",
        "role": role,
        "method": method,
        "fingerprint": "9f2c4d1e",
        "dtype": "float32",
    }


def measured(value: float, stderr: float, difference: float | None, noise: bool | None) -> dict[str, Any]:
    return {
        "value": value,
        "stderr": stderr,
        "difference": difference,
        "difference_stderr": None if difference is None else stderr / 2,
        "within_noise": noise,
    }


def metric(
    name: str, models: list[dict[str, Any]], higher: bool = True, primary: bool = True
) -> dict[str, Any]:
    return {"metric": name, "higher_is_better": higher, "primary": primary, "models": models}


def task(name: str, *metrics: dict[str, Any], local: str | None = None) -> dict[str, Any]:
    common = {"version": 1.0, "num_fewshot": 0, "samples": 500, "local": local}
    return {"task": name, **common, "metrics": list(metrics)}


def probed(found: list[list[float]], nll: list[list[float]]) -> dict[str, Any]:
    cells = [cell for row in found for cell in row]
    costs = [cell for row in nll for cell in row]
    return {
        "recalled": found,
        "nll": nll,
        "share": sum(cells) / len(cells),
        "share_stderr": 0.04,
        "mean_nll": sum(costs) / len(costs),
        "cells": len(cells),
        "absent": {"recalled": 0.0, "nll": 3.02},
    }


NAMES = ("distinct_2", "distinct_4", "longest_loop", "loops", "ends", "tokens", "format")


def written(kl: float, tokens: int | None, words: str, *notes: str) -> dict[str, Any]:
    """The figures of a converted model's texts, of which `kl` more loop than of the donor's."""
    figures = {name: measured(0.25 + kl, 0.02, kl, kl < 0.05) for name in NAMES}
    return {
        "greedy": figures,
        "sampled": figures | {"nats": measured(1.0 + kl, 0.02, kl, kl < 0.05)},
        "kl": kl,
        "kl_stderr": kl / 8,
        "kl_by": {"kind": {"story": kl, "json": 2 * kl}, "language": {}},
        "perplexity": 4.5,
        "length_ratio": 1.1,
        "divergence": {"tokens": tokens, "equal": 0.1, "log_prob": -1.5},
        "drift_tokens": tokens,
        "verdict": words.split()[0],
        "words": words,
        "notes": list(notes),
        "texts": [{"text": "A river runs & sings", "same_characters": 13, "same_tokens": tokens}],
    }


GENERATION: dict[str, Any] = {
    "prompts": "own",
    "count": 40,
    "max_new_tokens": 128,
    "temperature": 1.0,
    "seeds": [0, 1],
    "dtype": "float32",
    "asked": ["What does a river do?"],
    "models": [
        {
            "greedy": {name: {"value": 0.25} for name in NAMES},
            "sampled": {name: {"value": 0.25, "another_seed": 0.01} for name in (*NAMES, "nats")},
            "perplexity": 4.0,
            "texts": [{"text": "A river runs to the sea"}],
        },
        written(0.01, None, "writes as its donor does"),
        written(1.25, 3, "loops in 80 % of its texts", "drifts after about 3 tokens", "repeats itself more"),
        written(0.5, 7, "drifts after about 7 tokens"),
    ],
}

RESULT: dict[str, Any] = {
    "models": [
        model("smollm2-135m", "donor"),
        model("mla-half", "converted", "mla"),
        model("mla-eighth", "converted", "mla"),
        model("mla-eighth-healed", "healed", "mla"),
    ],
    "texts": [
        {
            "text": name,
            "sequences": 16,
            "sequence_length": 1024,
            "tokens": 16368,
            "models": [
                {"perplexity": base * times, "kl": kl, "top1_agreement": agreement}
                for times, kl, agreement in (
                    (1, 0.0, 1.0),
                    (1.024, 0.052, 0.867),
                    (8.1, 1.94, 0.41),
                    (2.2, 0.71, 0.6),
                )
            ],
        }
        for name, base in (("wiki.test.raw", 22.75), ("books.txt", 30.5))
    ],
    "cache": [{"kv_elements_per_token": n} for n in (11520, 5760, 1440, 1440)],
    "tasks": [
        task(
            "hellaswag",
            metric(
                "acc_norm",
                [
                    measured(0.43, 0.022, None, None),
                    measured(0.426, 0.022, -0.004, True),
                    measured(0.281, 0.02, -0.149, False),
                    measured(0.352, 0.021, -0.078, False),
                ],
            ),
            metric(
                "acc",
                [measured(0.36 - n / 50, 0.021, -n / 50 if n else None, n < 2) for n in range(4)],
                primary=False,
            ),
            local="hellaswag_val.jsonl",
        ),
        task(
            "wikitext",
            metric(
                "word_perplexity",
                [
                    measured(31.25, 0.9, None, None),
                    measured(32.5, 0.9, 1.25, False),
                    measured(250.0, 8.0, 218.75, False),
                    measured(70.5, 2.0, 39.25, False),
                ],
                higher=False,
            ),
        ),
        task(
            "arc_easy", metric("acc", [measured(0.55, 0.02, 0.021 if n else None, n != 1) for n in range(4)])
        ),
    ],
    "average": {
        "tasks": ["hellaswag", "arc_easy"],
        "models": [
            measured(0.49, 0.014, None, None),
            measured(0.486, 0.014, -0.004, True),
            measured(0.4, 0.014, -0.09, False),
            measured(0.44, 0.014, -0.05, False),
        ],
    },
    "retrieval": {
        "lengths": [256, 1024],
        "depths": [0.0, 0.25, 0.5, 0.75, 1.0],
        "trials": 2,
        "left_out": [16384],
        "models": [
            probed([[1.0] * 5, [1.0, 1.0, 0.5, 1.0, 1.0]], [[0.2] * 5, [0.1, 0.2, 0.3, 0.2, 0.1]]),
            probed([[1.0] * 5] * 2, [[0.24] * 5] * 2),
            probed([[0.0] * 5] * 2, [[3.4] * 5] * 2),
            probed([[1.0, 0.5, 0.5, 0.0, 1.0], [0.0] * 5], [[0.9] * 5, [2.1] * 5]),
        ],
    },
    "generation": GENERATION,
    "settings": {
        "suite": "quick",
        "limit": 500,
        "chat_template": False,
        "batch_size": 8,
        "backend": "transformers",
        "device": "cpu",
    },
    "versions": {"mhconvert": "0.1.0", "torch": "2.13.0"},
    "seconds": 312.3,
}


def report(scale: float, converted: float) -> dict[str, Any]:
    """What the page reads of `report.json`; `healing` and `bench` are added where a test needs them."""
    return {
        "method": "mla",
        "kv_bytes_per_token": {"donor": 46080.0, "converted": converted},
        "parameters": {"donor": 134_515_008, "converted": 147_046_464},
        "layers": [{"index": n, "relative_error": scale * (1 + n % 7) * (n + 2)} for n in range(30)],
    }


BENCH = {
    "batch": 8,
    "dtype": "float32",
    "device": "cpu",
    "rows": [
        {
            "context": 2048,
            "donor": {"decode_tokens_per_s": 41.25},
            "converted": {"decode_tokens_per_s": 66.0},
            "ratio": 1.6,
        }
    ],
}
HEALING = {
    "settings": {"teacher": None, "layer_tokens": 0},
    "steps": 400,
    "trained_tokens": 3_276_800,
    "tokens_per_second": 910.0,
    "seconds": 3600.0,
    "teacher": "smollm2-135m",
}
REPORTS = [
    report(0.0003, 23040.0) | {"bench": BENCH},
    report(0.003, 5760.0),
    report(0.003, 5760.0) | {"healing": HEALING},
]

KINDS = [  # layers of a report, of several kinds
    {"kind": "full", "kv_share": 1.0, "window": None, "costs": {"windowed": 0.25, "linear": 1.5}},
    {"kind": "windowed", "kv_share": 0.125, "window": 1024, "costs": {"windowed": 0.0625, "linear": 0.5}},
    {"kind": "linear", "kv_share": 0.03125, "costs": {"linear": 0.01}},
]
