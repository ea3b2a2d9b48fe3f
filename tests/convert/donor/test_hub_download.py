"""The real huggingface_hub against a stand-in server: what is fetched, when, and the words of each fault."""

import json

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

from mhconvert.convert.checkpoint.fingerprint import of_folder
from mhconvert.convert.donor import hub_download
from mhconvert.convert.donor.donor import open_donor
from mhconvert.errors import CheckpointError, UnsupportedError
from tests.convert.donor.stand_in_hub import COMMIT, stand_in_hub
from tests.donors import make_donor

TINY = "tiny/Tiny-Llama"


def use_endpoint(monkeypatch, endpoint: str) -> None:
    # huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with stand_in_hub() as running:
        use_endpoint(monkeypatch, running.endpoint)
        yield running


@pytest.fixture
def published(server, tmp_path):
    folder = make_donor(tmp_path / "published", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"a second copy")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    server.repos[TINY] = folder
    return folder


def test_weights_are_fetched_when_they_are_needed_and_nothing_else_is(server, published):
    donor = open_donor(TINY)
    first = server.downloads()
    assert {"config.json", "tokenizer.json", "LICENSE", "README.md", "generation_config.json"} <= set(first)
    assert not [name for name in first if "safetensors" in name or name.endswith(".bin")]
    assert (donor.name, donor.hub_id, donor.licence) == ("tiny-llama", TINY, "mit")
    local = open_donor(str(published))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(donor.source.read(name), local.source.read(name))
    later = server.downloads()[len(first) :]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(later) == [*shards, "model.safetensors.index.json"]


@pytest.mark.parametrize(
    "place", ["model.safetensors-0000{}-of-00002.safetensors", "weights [fp32]/part{}.safetensors"]
)
def test_shards_are_fetched_by_the_names_in_the_index(server, published, place):
    index = published / "model.safetensors.index.json"
    text = index.read_text()
    shards = [place.format(number) for number in (1, 2)]
    for number, shard in enumerate(shards, 1):
        (published / shard).parent.mkdir(exist_ok=True)
        (published / f"model-0000{number}-of-00002.safetensors").rename(published / shard)
        text = text.replace(f"model-0000{number}-of-00002.safetensors", shard)
    index.write_text(text)
    donor, local = open_donor(TINY), open_donor(str(published))
    assert torch.equal(donor.source.read("model.norm.weight"), local.source.read("model.norm.weight"))
    assert sorted(name for name in server.downloads() if name.endswith(".safetensors")) == shards
    assert hub_download.unavailable(TINY) is None
    before, shard = of_folder(published), published / shards[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert of_folder(published) != before


def test_one_file_of_weights_is_preferred_to_shards_as_in_transformers(server, published):
    make_donor(published)
    assert open_donor(TINY).source.names()
    assert [name for name in server.downloads() if name.endswith(".safetensors")] == ["model.safetensors"]


def test_additional_chat_templates_are_fetched(server, published):
    template = published / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    template.write_text("{{ tools }}")
    assert (
        open_donor(TINY).folder / "additional_chat_templates" / "tool_use.jinja"
    ).read_text() == "{{ tools }}"


def test_the_demo_donor_comes_from_the_hub_where_it_can(server, published):
    server.repos["HuggingFaceTB/SmolLM2-135M-Instruct"] = published
    donor = open_donor("smollm2-135m")
    assert (donor.name, donor.hub_id) == ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert donor.notice is None
    assert donor.source.names()


def test_a_revision_can_be_named(server, published):
    donor = open_donor(f"{TINY}@{COMMIT}")
    assert (donor.name, donor.hub_id) == ("tiny-llama", TINY)
    with pytest.raises(CheckpointError, match="tiny/Tiny-Llama has no revision 'v9' on the Hub"):
        open_donor(f"{TINY}@v9")


def test_a_cached_model_needs_no_hub(server, published, monkeypatch):
    _ = open_donor(TINY).source
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    assert open_donor(TINY).source.names()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_download.unavailable(TINY) is None


def test_not_on_the_hub(server):
    with pytest.raises(CheckpointError, match="tiny/nothing is not on the Hub") as error:
        open_donor("tiny/nothing")
    assert "'hf auth login' or set HF_TOKEN" in str(error.value)


def test_gated(server):
    server.refused["meta-llama/Llama-3.2-1B"] = (403, "GatedRepo")
    with pytest.raises(CheckpointError) as error:
        open_donor("llama3.2-1b")
    assert str(error.value) == (
        f"meta-llama/Llama-3.2-1B is gated: accept its terms at {server.endpoint}/meta-llama/Llama-3.2-1B, "
        "then run 'hf auth login' or set HF_TOKEN"
    )


def test_hub_that_fails(server):
    server.refused["tiny/broken"] = (500, "")
    with pytest.raises(CheckpointError, match=r"tiny/broken cannot be downloaded: .*500") as error:
        open_donor("tiny/broken")
    assert "\n" not in str(error.value)


def test_hub_that_cannot_be_reached(server, monkeypatch):
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(
        CheckpointError, match=r"127\.0\.0\.1:1 cannot be reached and the local cache lacks it; check"
    ):
        open_donor("tiny/anything")


def test_offline(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match="is not in the local cache and HF_HUB_OFFLINE is set; unset it"
    ):
        open_donor("tiny/anything")
    assert server.requests == []


def test_pickles_only(server, published):
    for file in published.glob("*.safetensors*"):
        file.unlink()
    donor = open_donor(TINY)
    with pytest.raises(
        CheckpointError, match=r"on the Hub holds pickled weights only \(pytorch_model\.bin\)"
    ):
        _ = donor.source


def test_repository_with_gguf_files_only(server, published):
    for file in published.iterdir():
        file.unlink()
    (published / "tiny.Q8_0.gguf").touch()
    with pytest.raises(CheckpointError, match=r"to use its GGUF, give that file itself: tiny\.Q8_0\.gguf"):
        open_donor(TINY)


def test_repository_that_is_no_model(server, published):
    for file in published.iterdir():
        file.unlink()
    (published / "README.md").touch()
    with pytest.raises(CheckpointError, match=r"tiny/Tiny-Llama on the Hub has no config\.json"):
        open_donor(TINY)


def test_a_cache_that_holds_a_part_is_not_enough(server, published, monkeypatch):
    hf_hub_download(TINY, "tokenizer.json")
    assert hub_download.unavailable(TINY) is None
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    assert (hub_download.unavailable(TINY) or "").startswith("the Hub cannot be reached")
    with pytest.raises(CheckpointError, match="cannot be reached and the local cache lacks it"):
        open_donor(TINY)


def test_an_unsupported_family_is_not_downloaded(server, published):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (published / "config.json").write_text(json.dumps(config))
    donor = open_donor(TINY)
    with pytest.raises(UnsupportedError, match="model type 'gpt2' is not supported"):
        _ = donor.source
    assert not [name for name in server.downloads() if name.endswith(".safetensors")]


def test_availability(server, published, monkeypatch):
    assert hub_download.unavailable(TINY) is None
    assert hub_download.unavailable("tiny/nothing") == "the Hub refuses it (RepositoryNotFoundError)"
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    assert (hub_download.unavailable(TINY) or "").startswith("the Hub cannot be reached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_download.unavailable(TINY) == "HF_HUB_OFFLINE is set and it is not in the local cache"


def test_availability_does_not_hang(server, monkeypatch):
    monkeypatch.setattr(hub_download, "PROBE_SECONDS", -0.9)
    monkeypatch.setattr(hub_download, "get_hf_file_metadata", lambda *_, **__: __import__("time").sleep(30))
    assert hub_download.unavailable(TINY) == "the Hub does not answer"
