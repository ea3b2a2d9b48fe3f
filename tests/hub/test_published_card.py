"""The card as it goes to the Hub: base model, licence, evaluation, the repository's name; the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhconvert.errors import CheckpointError
from mhconvert.eval.report.model_card import model_card
from mhconvert.hub.published_card import published_card

REPO = "me/tiny-mla"
REPORT = {
    "output": "some/where/tiny-mla",
    "method": "mla",
    "donor": "org/tiny",
    "hub_id": "org/tiny",
    "licence": "apache-2.0",
    "kv_bytes_per_token": {"donor": 4096, "converted": 1280},
    "versions": {"mhconvert": "0.1.0"},
}
EVALUATION = {
    "models": [{"reference": "org/tiny", "role": "donor"}, {"reference": "here", "role": "converted"}],
    "texts": [
        {
            "text": "wiki.test.raw",
            "sequences": 16,
            "sequence_length": 1024,
            "models": [{"perplexity": 20.0}, {"perplexity": 25.0, "kl": 0.125, "top1_agreement": 0.75}],
        }
    ],
}


def head_of(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A converted checkpoint as far as its card goes."""
    place = tmp_path / "tiny-mla"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"auto_map": {}}))
    (place / "README.md").write_text(model_card(REPORT))
    return place


def test_without_an_evaluation_only_the_name_changes(folder: Path) -> None:
    card = published_card(folder, REPO)
    own = (folder / "README.md").read_text()
    assert head_of(card) == head_of(own)
    assert card.split("---\n")[2].strip() == own.split("---\n")[2].strip().replace('"tiny-mla"', f'"{REPO}"')
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card


def test_the_evaluation_is_in_the_index_and_in_a_table(folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    card = published_card(folder, REPO)
    head = head_of(card)
    assert (head["base_model"], head["base_model_relation"], head["license"]) == (
        "org/tiny",
        "finetune",
        "apache-2.0",
    )
    (index,) = head["model-index"]
    assert index["name"] == "tiny-mla"
    (result,) = index["results"]
    assert result["task"] == {"type": "text-generation"}
    assert result["dataset"] == {
        "name": "wiki.test.raw",
        "type": "wiki.test.raw",
        "args": {"sequences": 16, "sequence_length": 1024},
    }
    values = [(metric["type"], metric["value"]) for metric in result["metrics"]]
    assert values == [("perplexity", 25.0), ("kl", 0.125), ("top1_agreement", 0.75)]
    assert "| perplexity, wiki.test.raw | 20 | 25 | × 1.250 |" in card
    assert card.index("## Measured") < card.index("## Evaluation") < card.index("## Use")
    assert "Measured with `mhconvert eval`. wiki.test.raw: 16 rows of 1,024 tokens." in card


def test_texts_of_one_file_name_are_told_apart_in_the_card(folder: Path) -> None:
    texts = [EVALUATION["texts"][0] | {"text": name} for name in ("a/x.txt", "b/x.txt", "a/y.txt")]
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"texts": texts}))
    results = head_of(published_card(folder, REPO))["model-index"][0]["results"]
    assert [result["dataset"]["name"] for result in results] == ["a/x.txt", "b/x.txt", "y.txt"]


def test_another_kv_cache_is_said_with_the_figures(folder: Path) -> None:
    donor, own = EVALUATION["models"]
    models = [donor | {"kv_cache_dtype": "auto"}, own | {"kv_cache_dtype": "int4"}]
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"models": models}))
    card = published_card(folder, REPO)
    (result,) = head_of(card)["model-index"][0]["results"]
    assert result["dataset"]["args"]["kv_cache_dtype"] == "int4"
    assert "This model was measured with a KV cache of dtype int4. wiki.test.raw: 16 rows" in card


def test_a_card_that_has_been_published_is_brought_up_to_date(folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "README.md").write_text(published_card(folder, REPO))
    assert published_card(folder, REPO) == (folder / "README.md").read_text()
    later = json.loads(json.dumps(EVALUATION).replace("25.0", "24.0"))
    (folder / "evaluation.json").write_text(json.dumps(later))
    card = published_card(folder, REPO)
    assert card.count("## Evaluation") == 1
    assert head_of(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 24.0
    assert "| 20 | 24 | × 1.200 |" in card
    assert "× 1.250" not in card


def test_what_somebody_wrote_stays(folder: Path) -> None:
    file = folder / "README.md"
    file.write_text(
        "---\nlicense: mit\nlanguage: [en, de]\ntags: [mine]\n---\n\n# My model\n\nHand-written.\n"
    )
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    card = published_card(folder, REPO, "v2")
    head = head_of(card)
    assert (head["license"], head["language"], head["tags"]) == ("mit", ["en", "de"], ["mine", "mhconvert"])
    assert "base_model" not in head
    assert "Hand-written." in card
    assert f'from_pretrained("{REPO}", revision="v2", trust_remote_code=True)' in card


def test_a_base_model_on_this_machine_is_not_claimed(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    base = tmp_path / "base"
    base.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (folder / "README.md").write_text(
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- base_model:adapter:{base}\n- lora\n---\n# x\n"
    )
    assert head_of(published_card(folder, REPO)) == {"library_name": "peft", "tags": ["lora", "mhconvert"]}
    (folder / "mhconvert.json").write_text(json.dumps({"donor": {"hub_id": "org/base"}}))
    head = head_of(published_card(folder, REPO))
    assert (head["base_model"], head["base_model_relation"]) == ("org/base", "adapter")


def test_an_adapter_says_how_the_repository_loads(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text(
        '---\nbase_model: org/base\n---\nPeftModel.from_pretrained(model, "THIS_FOLDER")'
    )
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    card = published_card(folder, REPO, "v2")
    assert f'PeftModel.from_pretrained(model, "{REPO}", revision="v2")' in card
    assert head_of(card)["base_model_relation"] == "adapter"
    assert head_of(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 25.0
    assert "| perplexity, wiki.test.raw | 20 | 25 | × 1.250 |" in card


def test_without_a_card_one_is_made(folder: Path) -> None:
    (folder / "README.md").unlink()
    card = published_card(folder, REPO)
    assert head_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mhconvert"],
    }
    assert "# tiny-mla" in card
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card


@pytest.mark.parametrize("head", ["a: [", "- a", "model-index: 3"])
def test_front_matter_that_is_none(folder: Path, head: str) -> None:
    (folder / "README.md").write_text(f"---\n{head}\n---\n# x\n")
    with pytest.raises(CheckpointError, match=r"the front matter of .*README\.md is not valid"):
        published_card(folder, REPO)
