"""References that mean nothing are refused by name, with the way out."""

import pytest

from mhconvert.convert.donor.donor import open_donor
from mhconvert.errors import CheckpointError, UnsupportedError
from tests.donors import make_gguf


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("smollm2-135", "unknown donor 'smollm2-135': did you mean smollm2-135m"),
        ("xyzzy", "unknown donor 'xyzzy': 'mhconvert donors' lists the names; a Hub id (org/name), a folder"),
        ("", "unknown donor ''"),
        ("./nowhere", "'./nowhere' is no folder, no .gguf file and no Hub id"),
        ("a/b/c", "'a/b/c' is no folder, no .gguf file and no Hub id"),
        ("nowhere.gguf", "file nowhere.gguf does not exist"),
        ("models/nowhere.gguf", "file models/nowhere.gguf does not exist"),
    ],
)
def test_references_that_mean_nothing(reference, words):
    with pytest.raises(CheckpointError) as error:
        open_donor(reference)
    assert words in str(error.value)


def test_a_folder_that_is_unfinished(tmp_path):
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"half is unfinished, there is only .*half\.partial"):
        open_donor(str(tmp_path / "half"))


def test_a_file_that_is_no_gguf(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(
        CheckpointError, match=r"is a file but not a \.gguf; give the folder that holds config\.json"
    ):
        open_donor(str(file))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no config.json: not a model folder"),
        ({"adapter_config.json": "{}"}, "is an adapter, not a model; make one of it: mhconvert merge "),
        ({"q.gguf": ""}, "has no config.json; to use its GGUF give the file itself"),
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"config.json": "[]"}, "config.json does not hold a JSON object"),
        ({"config.json": "{}"}, "names no model_type"),
        ({"config.json": '{"model_type": "llama", "attention_bias": "no"}'}, "is not a valid llama config"),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as error:
        open_donor(str(tmp_path))
    assert words in str(error.value)


def test_a_converted_folder_opens_by_our_own_class(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "mla_llama", "auto_map": {"AutoConfig": "evil.Config"}}'
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('code from the folder ran')")
    assert type(open_donor(str(tmp_path), trust_remote_code=True).config).__name__ == "MLALlamaConfig"


def test_model_types_unknown_to_transformers(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "my_llm", "auto_map": {"AutoConfig": "evil.Config"}}'
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('code from the donor ran')")
    with pytest.raises(
        UnsupportedError, match=r"model type 'my_llm' .* the supported ones are arcee, .*llama, .*mistral"
    ):
        open_donor(str(tmp_path), trust_remote_code=True)


def test_a_gguf_file_is_known_by_its_suffix_in_any_case(tmp_path):
    file = make_gguf(tmp_path / "TINY.GGUF")
    assert (
        open_donor(str(file)).source.names()
        == open_donor(str(make_gguf(tmp_path / "tiny.gguf"))).source.names()
    )
    with pytest.raises(CheckpointError, match=r"to use its GGUF give the file itself: .*TINY\.GGUF"):
        open_donor(str(tmp_path))
