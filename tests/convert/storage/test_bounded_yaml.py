"""YAML and JSON of others: aliases do not unfold without bound, and what is nested too deeply is said in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.storage.bounded_yaml import UNFOLDED, load_yaml
from mhconvert.errors import CheckpointError
from tests.conftest import Main
from tests.donors import make_donor

DEEP = 100_000


def bomb(levels: int, width: int = 9) -> str:
    """YAML that stands for width ** levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels + 1)]
    return "\n".join(lines)


@settings(deadline=None)
@given(st.integers(0, 8), st.integers(1, 9))
def test_aliases_unfold_up_to_a_bound(levels: int, width: int) -> None:
    text = bomb(levels, width)
    sizes = [2]  # nodes of each line's list
    for _ in range(levels):
        sizes.append(1 + width * sizes[-1])
    written = 2 + 2 * len(sizes)  # the mapping, its keys, its lists, and x
    if 1 + len(sizes) + sum(sizes) > written + UNFOLDED:
        with pytest.raises(yaml.YAMLError, match="its aliases unfold to too many values"):
            load_yaml(text)
    else:
        assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]", "its aliases unfold to too many values"),
        ("a: &a {x: 1}\nb: " + "{<<: [*a, *a], c: " * 2000 + "1" + "}" * 2000, "nested too deeply"),
        ("[" * 2000, "it is nested too deeply"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ('a: 1\nb: "\\ud800"', "character 1 is .ud800, half of a character"),
        ('"\\udc00\\ud800": 1', "character 1 is .udc00, half of a character"),
    ],
)
def test_what_has_no_value(text: str, words: str) -> None:
    with pytest.raises(yaml.YAMLError, match=words):
        load_yaml(text)


def test_a_pair_of_escapes_is_one_character() -> None:
    assert load_yaml('{"\\ud83d\\ude00": "a\\ud83d\\ude00b"}') == {"\U0001f600": "a\U0001f600b"}


def test_a_long_text_without_aliases_is_fine() -> None:
    assert len(load_yaml("\n".join(f"- {{n: {n}}}" for n in range(UNFOLDED // 2)))) == UNFOLDED // 2


@pytest.mark.parametrize("text", [bomb(9), "a: &a [*a]", "license: 2026-13-45", "license: " + "[" * 1200])
def test_front_matter_that_cannot_be_read_states_no_licence(tmp_path: Path, text: str) -> None:
    donor = make_donor(tmp_path / "donor")
    (donor / "README.md").write_text(f"---\n{text}\nlicense: &l [*a9]\n---\n# Model\n")
    assert open_donor(str(donor)).licence is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"model: x\n{bomb(9)}\n", "recipe.yaml cannot be read: its aliases unfold to too many values"),
        ("model: " + "[" * 2000, "recipe.yaml cannot be read: it is nested too deeply"),
        (
            'model: x\noutput: "a\\ud800"\n',
            "recipe.yaml, line 2 cannot be read: character 2 is \\ud800, half",
        ),
    ],
)
def test_a_recipe(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main("run", recipe) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_json_that_is_nested_too_deeply(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    donor = make_donor(tmp_path / "donor")
    if name.endswith("index.json"):
        (donor / "model.safetensors").unlink()
    (donor / name).write_text('{"a": ' + "[" * DEEP)
    assert main(donor, "--to", "mla", "-o", tmp_path / "out") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name} cannot be read: its JSON is nested too deeply" in said
    assert list(tmp_path.iterdir()) == [donor]


def test_a_safetensors_header_that_is_nested_too_deeply(tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "donor")
    header = b'{"a": ' + b"[" * DEEP
    (donor / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is not a valid safetensors file \(nested too deeply"
    ):
        open_donor(str(donor))
