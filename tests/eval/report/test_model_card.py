"""report.json is strict JSON; the card carries the measured numbers, and front matter that the Hub reads."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhconvert.convert.checkpoint import fingerprint
from mhconvert.errors import CheckpointError
from mhconvert.eval.report.model_card import CARD, REPORT, model_card, write_report
from mhconvert.eval.report.model_index import read_evaluation
from tests.eval.page_sample import KINDS

FULL = {
    "output": "some/where/tiny-mla",
    "method": "mla",
    "donor": "tiny",
    "hub_id": "org/tiny",
    "licence": "apache-2.0",
    "notice": "taken from somewhere else",
    "perplexity": {"donor": 20.0, "converted": 25.0},
    "kl": 0.25,
    "top1_agreement": 0.75,
    "kv_bytes_per_token": {"donor": 4096, "converted": 1280},
    "parameters": {"donor": 1000, "converted": 990},
    "layers": [{"index": 0, "relative_error": math.nan}],
    "seconds": 61.0,
    "peak_rss_bytes": 3 * 2**30,
    "sample": {"prompt": "Once [upon]", "converted": " a time [/b]"},
    "calibration": {"source": "self", "tokens": 4096},
    "verified": {"largest_logit_difference": 0.0},
    "versions": {"mhconvert": "0.1.0"},
}


def test_report_is_strict_json(tmp_path: Path) -> None:
    write_report(tmp_path, FULL)
    report = json.loads((tmp_path / REPORT).read_text(), parse_constant=pytest.fail)
    assert report["layers"] == [{"index": 0, "relative_error": None}]
    assert report["perplexity"] == FULL["perplexity"]


def test_card_front_matter_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("terms")
    write_report(tmp_path, FULL)
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/tiny"
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "transformers"
    assert "mla" in head["tags"]
    assert "| perplexity | 20 | 25 | × 1.250 |" in card
    assert "| KV cache a token | 4 KiB | 1.25 KiB | 31.2 % of the donor's, measured |" in card
    assert "carried over in LICENSE" in card
    assert 'from_pretrained("tiny-mla", trust_remote_code=True)' in card
    assert "sampled from the base model itself" in card


def test_missing_facts_are_not_mentioned() -> None:
    card = model_card({"output": "x", "method": "mla", "donor": "folder"})
    assert "None" not in card
    assert "attention rewritten as MLA by" in card


def head_of(card: str) -> dict[str, Any]:
    """The front matter."""
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_relation_tags_and_reduction() -> None:
    card = model_card(FULL)
    head = head_of(card)
    assert (head["base_model"], head["base_model_relation"]) == ("org/tiny", "finetune")
    assert head["tags"] == ["mhconvert", "mla", "multi-head-latent-attention", "kv-cache"]
    assert "model-index" not in head
    words = "Its KV cache holds 1.25 KiB a token, 31.2 % of the base model's 4 KiB, measured on the cache"
    assert words in card


def test_without_a_base_on_the_hub_none_is_claimed() -> None:
    card = model_card(FULL | {"hub_id": None, "donor": "/home/me/models/tiny", "donor_name": "tiny"})
    assert not {"base_model", "base_model_relation"} & head_of(card).keys()
    assert "tiny with its attention rewritten" in card
    assert "/home/me" not in card


def test_a_cache_that_stays_is_not_called_smaller() -> None:
    card = model_card(FULL | {"method": "moh", "kv_bytes_per_token": {"donor": 4096, "converted": 4096}})
    assert head_of(card)["tags"] == ["mhconvert", "moh", "mixture-of-heads"]
    assert "Its KV cache is as large as the base model's: 4 KiB a token." in card


@pytest.mark.parametrize(
    ("stated", "licence"),
    [('["mit", "apache-2.0"]', ["mit", "apache-2.0"]), ("llama3.2", "llama3.2"), ("yes: no", "yes: no")],
)
def test_any_licence_is_valid_front_matter(stated: str, licence: Any) -> None:
    assert head_of(model_card(FULL | {"licence": stated}))["license"] == licence


def evaluation(folder: Path) -> dict[str, Any]:
    """What `mhconvert eval` writes about a donor, the model in `folder`, and a third one behind it."""
    names = [
        ("tiny", "org/tiny", "donor"),
        ("tiny-mla", str(folder), "converted"),
        ("x", "elsewhere", "healed"),
    ]
    return {
        "models": [{"name": n, "reference": r, "role": role, "method": "mla"} for n, r, role in names],
        "texts": [
            {
                "text": "some/wiki.test.raw",
                "sequences": 16,
                "sequence_length": 1024,
                "tokens": 16368,
                "models": [
                    {"perplexity": 20.0, "kl": 0.0, "top1_agreement": 1.0},
                    {"perplexity": 25.0, "kl": 0.125, "top1_agreement": 0.75},
                    {"perplexity": 99.0, "kl": 9.0, "top1_agreement": 0.1},
                ],
            }
        ],
        "tasks": [
            {
                "task": "hellaswag",
                "version": 1.0,
                "num_fewshot": 0,
                "samples": 500,
                "local": None,
                "metrics": [
                    {
                        "metric": "acc_norm",
                        "higher_is_better": True,
                        "primary": True,
                        "models": [
                            {"value": 0.43, "stderr": 0.022},
                            {
                                "value": 0.41,
                                "stderr": 0.021,
                                "difference": -0.02,
                                "difference_stderr": 0.03,
                                "within_noise": True,
                            },
                            {"value": 0.1, "stderr": 0.01},
                        ],
                    }
                ],
            }
        ],
        "retrieval": {
            "lengths": [512, 4096],
            "depths": [0, 50],
            "models": [{"share": 1.0}, {"share": 0.75}, {"share": 0.0}],
        },
    }


def test_evaluation_of_the_model_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(tmp_path)))
    found = read_evaluation(tmp_path)
    assert found is not None
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in found.results] == [
        ("wiki.test.raw", "perplexity", 25.0),
        ("wiki.test.raw", "kl", 0.125),
        ("wiki.test.raw", "top1_agreement", 0.75),
        ("hellaswag", "acc_norm", 0.41),
        ("retrieval", "recall", 0.75),
    ]
    assert found.results[0].dataset_args == {"sequences": 16, "sequence_length": 1024, "tokens": 16368}
    assert found.results[3].dataset_args == {"version": 1.0, "num_fewshot": 0, "samples": 500}
    assert found.rows == [
        ("perplexity, wiki.test.raw", "20", "25", "× 1.250"),
        ("KL from the base model, wiki.test.raw", "0", "0.125", "nats a token"),
        ("top-1 agreement, wiki.test.raw", "100 %", "75 %", ""),
        ("hellaswag, acc_norm ↑", "0.43 ± 0.022", "0.41 ± 0.021", "-0.02 ± 0.03, within noise"),
        ("retrieval, 512 to 4,096 tokens", "100 %", "75 %", "of places, recalled"),
    ]
    assert found.settings == [
        "wiki.test.raw: 16 rows of 1,024 tokens.",
        "hellaswag: 0-shot, 500 questions.",
    ]


def test_the_mean_and_the_worst_of_several_texts(tmp_path: Path) -> None:
    content = evaluation(tmp_path)
    content["texts"].append(content["texts"][0] | {"text": "fiction"})
    worse = [{"text": "fiction", "ratio": 1.4, "others": 1.1}]
    this = {"ratio": 1.25, "kl": 0.2, "worst": "fiction", "worst_ratio": 1.4, "worse": worse}
    content["over_texts"] = [{}, this, this | {"worst_ratio": None}]
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    found = read_evaluation(tmp_path)
    assert found is not None
    assert ("perplexity, mean of 2 texts", "", "", "× 1.250") in found.rows
    assert ("perplexity, worst text, fiction", "", "", "× 1.400") in found.rows
    assert any(text.startswith("Fiction is much worse than the other texts") for text in found.settings)


def test_means_over_tasks_and_apart_from_them(tmp_path: Path) -> None:
    content = evaluation(tmp_path)
    models = content["tasks"][0]["metrics"][0]["models"]
    content["average"] = {"tasks": ["hellaswag", "piqa"], "models": models}
    content["apart"] = [{"name": "MMLU", "tasks": ["mmlu"], "models": models}]
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    found = read_evaluation(tmp_path)
    assert found is not None
    figures = ("0.43 ± 0.022", "0.41 ± 0.021", "-0.02 ± 0.03, within noise")
    assert ("mean of 2 tasks", *figures) in found.rows
    assert ("MMLU, apart: mean of 1 task", *figures) in found.rows


def test_evaluation_of_a_folder_that_has_moved_is_that_of_the_last_model(tmp_path: Path) -> None:
    moved = evaluation(tmp_path / "where it was")
    (tmp_path / "evaluation.json").write_text(json.dumps(moved))
    found = read_evaluation(tmp_path)
    assert found is not None
    assert found.results[0].metric_value == 99.0


def test_an_evaluation_of_other_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = evaluation(tmp_path / "where it was")
    for number, model in enumerate(found["models"]):
        model["fingerprint"] = fingerprint.of_folder(tmp_path) if number == 1 else str(number)
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    read = read_evaluation(tmp_path)
    assert read is not None
    assert read.results[0].metric_value == 25.0  # though the folder has moved, and is not the last one
    (tmp_path / "model.safetensors").write_bytes(b"healed")
    with pytest.raises(CheckpointError, match="measures other files than"):
        read_evaluation(tmp_path)


def test_parts_of_an_evaluation_may_be_missing(tmp_path: Path) -> None:
    whole = evaluation(tmp_path)
    alone = {
        "models": whole["models"][1:2],
        "texts": [whole["texts"][0] | {"models": [{"perplexity": 25.0}]}],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(alone | {"retrieval": None}))
    found = read_evaluation(tmp_path)
    assert found is not None
    assert found.rows == [("perplexity, wiki.test.raw", "", "25", "")]
    (tmp_path / "evaluation.json").unlink()
    assert read_evaluation(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("{}", "it names no models"),
        ('{"models": [{"reference": "a"}], "texts": [{"text": "t", "models": []}]}', "IndexError"),
        ('{"models": [{"reference": "a"}], "tasks": [{"task": "t"}]}', "KeyError: 'metrics'"),
        ('{"models": ["a"]}', "AttributeError"),
        ('{"models": [{}], "texts": [{"text": "t", "models": [{"perplexity": "low"}]}]}', "TypeError"),
    ],
)
def test_a_broken_evaluation_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"evaluation\.json") as error:
        read_evaluation(tmp_path)
    assert words in str(error.value)


def test_names_show_as_they_are_and_steer_nothing() -> None:
    evil = 'x\n---\nlicense: mit\n# "](http://a.b) <script> `|\x1b[31m'
    card = model_card(FULL | {"output": evil, "donor": evil, "hub_id": None, "calibration": {"source": evil}})
    assert head_of(card)["license"] == "apache-2.0"
    body = card.split("---\n", 2)[2]
    shown = r'x --- license: mit # "\](http://a.b) \<script\> \`\| \[31m'
    assert f"\n{shown} with its attention" in body
    assert f"tokens of: {shown}." in body
    assert "\x1b" not in body
    code = body.split("```python\n")[1].split("```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [Path(evil).name] * 2


def test_the_card_draws_layers_of_several_kinds() -> None:
    card = model_card(FULL | {"layers": KINDS})
    assert "`█▄▁ (█ full, ▄ windowed, ▁ linear)`" in card
    assert "| layer | kind | window | KV cache | price, windowed | price, linear |" in card
    assert "| 0 | full |  | 100 % | 0.25 | 1.5 |" in card
    assert "## Layers" not in model_card(FULL)
