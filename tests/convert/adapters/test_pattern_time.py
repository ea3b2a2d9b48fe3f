"""An adapter's expressions match in bounded time, or are refused by their field; ordinary ones pass."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from mhconvert.convert.adapters import pattern_time
from mhconvert.convert.adapters.pattern_time import require_quick
from mhconvert.errors import AdapterError
from tests.conftest import Main

Saved = Callable[..., tuple[Path, Any]]
NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in range(8)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.3.down_proj", "input_layernorm")
]
SLOW = [
    r"(\w+\.?)+!",
    r"(.*)*!",
    r"(\w|.)*!",
    r"(?=(\w+\.?)+!)x",
    r"(.*.){20}!",
    r"((\w*\.)*\w*)*!",
    ".*" * 30 + "!",
]
# As unsloth, peft's documentation and people write them.
ORDINARY = [
    r".*\.(q_proj|v_proj)$",
    r"model\.layers\.(0|1[0-9]|2)\.self_attn\.(q|k|v|o)_proj",
    r"^(?!.*visual).*(?:gate|up|down)_proj$",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|o_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|o_proj|down_proj)))",
]


def config(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields)


def stated(field: str, pattern: str) -> SimpleNamespace:
    """A config with `pattern` where the field has expressions."""
    return config(**{field: {pattern: 4} if field.endswith("_pattern") and field[0] != "l" else [pattern]})


FIELDS = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern")


@pytest.mark.parametrize("pattern", SLOW)
def test_an_expression_that_backtracks(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(pattern_time, "SECONDS", 0.5)
    begun = time.monotonic()
    shown = re.escape(pattern[:60])
    words = rf"a/adapter_config\.json: target_modules '{shown}' takes longer than 0\.5 s to match"
    with pytest.raises(AdapterError, match=words):
        require_quick(config(target_modules=pattern), Path("a"), NAMES)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("field", FIELDS)
def test_the_field_is_named(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setattr(pattern_time, "SECONDS", 1.0)
    require_quick(stated(field, "q_proj"), Path("a"), NAMES)
    with pytest.raises(AdapterError, match=rf"{field} '\(\.\*\)\*!\w*' takes longer"):
        require_quick(stated(field, "(.*)*!x"), Path("a"), NAMES)
    with pytest.raises(
        AdapterError, match=rf"a/adapter_config\.json: {field} 'x\(\?i\)y' cannot be used: .*flags"
    ):
        require_quick(stated(field, "x(?i)y"), Path("a"), NAMES)
    with pytest.raises(AdapterError, match=rf"{field}=7 is neither a name nor a list of names"):
        require_quick(config(**{field: 7}), Path("a"), NAMES)


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_expressions_pass(pattern: str) -> None:
    require_quick(LoraConfig(target_modules=pattern, rank_pattern={pattern: 4}), Path("a"), NAMES * 200)


def test_the_forms_are_those_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str]] = []
    for how in ("match", "fullmatch"):
        real = getattr(re, how)

        def recorded(expression: str, name: str, *flags: Any, how: str = how, real: Any = real) -> Any:
            tried.append((how, expression))
            return real(expression, name, *flags)

        monkeypatch.setattr(re, how, recorded)
    expected = []
    for chosen in (
        LoraConfig(
            target_modules=".*q_proj",
            exclude_modules="x.*",
            rank_pattern={"a.*": 1},
            alpha_pattern={"b.*": 1},
        ),
        LoraConfig(
            target_modules=["q_proj"], modules_to_save=["m+"], layers_pattern=["l.*"], layers_to_transform=[0]
        ),
    ):
        check_target_module_exists(chosen, NAMES[0])
        get_pattern_key(list(chosen.rank_pattern), NAMES[0])
        get_pattern_key(list(chosen.alpha_pattern), NAMES[0])
        expected += [entry[2:] for entry in pattern_time._expressions(chosen, Path("a"))]
    assert set(tried) == set(expected)


def test_names_alone_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern_time, "subprocess", None)
    require_quick(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), Path("a"), NAMES)


def test_an_adapter_is_refused_before_anything_is_written(
    main: Main,
    saved: Saved,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pattern_time, "SECONDS", 0.5)
    folder, _ = saved()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": SLOW[0]}))
    for words in (
        ("merge", folder),
        ("export", folder, "--to", "lora"),
        ("eval", folder, "--text", __file__, "--sequences", 2, "--sequence-length", 16),
    ):
        assert main(*words, *(("-o", tmp_path / "out") if words[0] != "eval" else ())) == 1
        assert "target_modules '(\\w+\\.?)+!' takes longer" in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
