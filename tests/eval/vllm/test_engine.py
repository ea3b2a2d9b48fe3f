"""Tasks in vLLM's process give what transformers gives; what stands in for vLLM computes with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.open_model import of_model, open_model
from mhconvert.errors import MhconvertError
from mhconvert.eval.settings import EvalSettings
from mhconvert.eval.tasks.candidate import Candidate
from mhconvert.eval.tasks.language_model import language_model
from mhconvert.eval.vllm.engine import Engine, EngineError, installed
from tests.conftest import Cli
from tests.donors import make_checkpoint, make_donor
from tests.eval.vllm.stand_in import VERSION, make_python


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_python(tmp_path_factory.mktemp("vllm")))


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("donor") / "tiny", layers=2, kv_heads=2)


def _model(folder: Path, **options: Any) -> Any:
    opened = open_model(str(folder), device="cpu")
    settings = EvalSettings(suite="quick", dtype="float32", **options)
    return language_model(Candidate(opened, of_model(opened), settings))


def test_scores_and_continuations_are_those_of_transformers(python: str, donor: Path) -> None:
    """Rows longer than the limit, windows of a long text, stop words, and a request without a context among them."""
    pairs = [
        ("The river ran", " slowly past the town"),
        ("", "Water boils"),
        ("at 100 degrees " * 30, "at sea level"),
    ]
    asked = {"until": ["e"], "max_gen_toks": 12}
    ours, theirs = (
        _model(donor, max_length=64, **more) for more in ({}, {"backend": "vllm", "python": python})
    )
    for kind, requests in {
        "loglikelihood": pairs,
        "loglikelihood_rolling": [("The boats came home. " * 40,), ("Nobody",)],
        "generate_until": [("The river ran", dict(asked)), ("Water " * 60, dict(asked))],
    }.items():
        instances = [Instance(kind, {}, arguments, index) for index, arguments in enumerate(requests)]
        a, b = (getattr(model, kind)(instances, disable_tqdm=True) for model in (ours, theirs))
        if kind == "generate_until":
            assert a == b
        elif kind == "loglikelihood":
            assert [each[1] for each in a] == [each[1] for each in b]
            assert [each[0] for each in a] == pytest.approx([each[0] for each in b], rel=1e-4)
        else:
            assert a == pytest.approx(b, rel=1e-4)
    theirs.engine.close()


def test_what_a_row_cannot_hold_is_refused(python: str, donor: Path) -> None:
    model = _model(donor, max_length=24, backend="vllm", python=python)
    long = Instance("loglikelihood", {}, ("a", " river" * 40), 0)
    with pytest.raises(MhconvertError, match=r"a text of \d+ tokens is asked for, and rows have 25"):
        model.loglikelihood([long])
    asked = Instance("generate_until", {}, ("a", {"until": ["."]}), 0)
    with pytest.raises(
        MhconvertError, match="asks for 256 new tokens, and rows have 24; give a larger --max-length"
    ):
        model.generate_until([asked])
    model.engine.close()


def test_code_in_a_folder_needs_trust(python: str, tmp_path: Path) -> None:
    """An export's record does not make it trusted; only code that mhconvert ships is run without the flag."""
    folder = make_donor(tmp_path / "tiny", layers=2, kv_heads=2)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("print('ran')\n")
    (folder / "mhconvert.json").write_text(json.dumps({"exported": {"to": "own", "method": "mla"}}))
    with pytest.raises(MhconvertError, match=r"evil\.py"):
        _model(folder, max_length=64, backend="vllm", python=python)


def test_an_engine_says_what_it_is_and_ends(python: str, donor: Path) -> None:
    with Engine(donor, python=python, dtype="float32", max_model_len=64) as engine:
        assert engine.about == {"version": VERSION, "device": "cpu", "cache_bytes_per_token": 128}
        process = engine._process
        with pytest.raises(EngineError, match="does not take .*: AssertionError: the row is too long"):
            engine.score([[1] * 64])
    assert process.poll() is not None
    assert installed(python)["vllm"] == VERSION


def test_a_table_of_both_backends(here: Cli, python: str, donor: Path) -> None:
    words = (
        "eval",
        donor,
        "--suite",
        "quick",
        "--limit",
        4,
        "--dtype",
        "float32",
        "--max-length",
        64,
        "--json",
    )
    ours, theirs = (
        json.loads(here(*words, *more).stdout) for more in ((), ("--backend", "vllm", "--python", python))
    )
    assert theirs["versions"]["vllm"] == VERSION
    assert "vllm" not in ours["versions"]
    a, b = ([m["value"] for r in each["tasks"][0]["metrics"] for m in r["models"]] for each in (ours, theirs))
    assert a == pytest.approx(b, rel=1e-4)


def test_a_donor_that_vllm_refuses_is_left_out_and_said(
    here: Cli, python: str, donor: Path, tmp_path: Path
) -> None:
    refused = make_donor(tmp_path / "refused", layers=2, kv_heads=2, seed=1)
    asked = ("--suite", "quick", "--limit", 2, "--backend", "vllm", "--python", python)
    done = here("eval", donor, "--against", refused, *asked)
    assert done.returncode == 0, done.stderr
    assert (
        f"{refused} is left out: vllm does not take {refused}: ValueError: Model architectures" in done.stdout
    )
    alone = here("eval", refused, *asked)
    assert (alone.returncode, alone.stdout) == (1, "")
    assert "['Odd'] are not supported" in alone.stderr


def test_a_donor_with_stored_results_is_not_loaded_again(
    here: Cli, python: str, donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_donor(tmp_path / "other", layers=2, kv_heads=2, seed=2)
    loaded: list[str] = []
    start = Engine.__init__

    def counted(self: Engine, model: Path | str, **more: Any) -> None:
        loaded.append(str(model))
        start(self, model, **more)

    monkeypatch.setattr(Engine, "__init__", counted)
    asked = ("--suite", "quick", "--limit", 3, "--max-length", 64, "--backend", "vllm", "--python", python)
    first, second, fresh = (
        here("eval", other, "--against", donor, *asked, *more) for more in ((), (), ("--fresh",))
    )
    assert [done.returncode for done in (first, second, fresh)] == [0, 0, 0]
    assert loaded == [str(donor), str(other)] * 2


@pytest.mark.parametrize(
    ("method", "settings", "way_out"),
    [("mla", None, "mhconvert export {} --to auto"), ("moh", MoHSettings(active=0.5), "use --backend hf")],
)
def test_our_own_class_is_refused_with_the_way_out(
    here: Cli, python: str, tmp_path: Path, method: str, settings: Any, way_out: str
) -> None:
    folder = make_checkpoint(tmp_path / "tiny", method, settings)
    done = here("eval", folder, "--suite", "quick", "--backend", "vllm", "--python", python, "--limit", 2)
    assert done.returncode == 1
    assert f"has mhconvert's own class of {method}, which vllm does not load" in done.stderr
    assert way_out.format(folder) in done.stderr


def test_scores_that_are_nan_are_refused(here: Cli, python: str, tmp_path: Path) -> None:
    broken = make_donor(tmp_path / "broken", layers=2, kv_heads=2)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    done = here("eval", broken, "--suite", "quick", "--backend", "vllm", "--python", python, "--limit", 2)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{broken} gives scores that are NaN in vllm; evaluate it with --dtype float32" in done.stderr


def test_an_environment_without_vllm_is_named(here: Cli, donor: Path, tmp_path: Path) -> None:
    words = ("eval", donor, "--suite", "quick", "--backend", "vllm", "--python")
    missing = here(*words, tmp_path / "no-python")
    assert f"--python {tmp_path / 'no-python'} cannot be run: No such file or directory" in missing.stderr
    lacking = tmp_path / "python"
    lacking.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    lacking.chmod(0o755)
    assert f"not installed for {lacking}; name the Python of an environment" in here(*words, lacking).stderr
