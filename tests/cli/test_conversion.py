"""`mhconvert DONOR --to mla` as people run it: the JSON contract, the folder, refusals, Ctrl-C and --resume."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest

from tests.conftest import Cli, Interrupted, Main
from tests.donors import make_donor

LAYERS = 24


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("conversion") / "tiny", layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"{n} boats came home past the town; {n * n} were counted.\n" for n in range(400)),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def words(donor: Path, text: Path) -> list[str]:
    """A conversion of the tiny donor, without -o."""
    options = "--calibration-tokens 1024 --sequence-length 64 --device cpu --fit-steps 4"
    return [str(donor), "--to", "mla", "--kv-bits", "16", "--calibration", str(text), *options.split()]


@pytest.fixture(scope="module")
def converted(cli: Cli, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "whole"
    done = cli(*words, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def weights(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def test_the_json_contract(converted: tuple[Path, dict]) -> None:
    out, report = converted
    assert Path(report["output"]).resolve() == out.resolve()
    assert report["method"] == "mla"
    assert report["kv_bytes_per_token"] == {"donor": LAYERS * 64 * 4, "converted": LAYERS * 32 * 4}
    assert report["perplexity"]["donor"] > 1
    assert report["perplexity"]["converted"] > 1
    assert report["kl"] >= 0
    assert 0 <= report["top1_agreement"] <= 1
    assert [layer["index"] for layer in report["layers"]] == list(range(LAYERS))
    assert all(0 <= layer["relative_error"] < 1 for layer in report["layers"])
    stages = dict(report["stage_seconds"])
    assert 0 < stages.pop("layers: fit") < stages["layers"]
    assert set(stages) == {"donor", "survey", "layers", "verify"}
    assert 0.9 * report["seconds"] < sum(stages.values()) < 1.01 * report["seconds"]
    assert report["peak_rss_bytes"] > 50 * 2**20


def test_the_folder_is_whole(converted: tuple[Path, dict]) -> None:
    out, report = converted
    held = {path.name for path in out.iterdir()}
    for name in ("config.json", "tokenizer.json", "mhconvert.json", "report.json", "README.md", "LICENSE"):
        assert name in held
    assert any(name.startswith("modeling_") for name in held)
    assert not out.with_name(out.name + ".partial").exists()
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    assert "measured" in (out / "README.md").read_text(encoding="utf-8")


def test_inspect_generate_and_eval_take_the_result(
    main: Main, capsys: pytest.CaptureFixture[str], converted: tuple[Path, dict], text: Path
) -> None:
    out, report = converted
    assert main("inspect", out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["converted_by"] == "mla"
    assert facts["kv"]["bytes_per_token"] == report["kv_bytes_per_token"]["converted"]
    assert main("generate", out, "7 boats", "--max-new-tokens", 4, "--device", "cpu", "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written["kv_bytes_per_token"] == report["kv_bytes_per_token"]["converted"]
    assert (
        main(
            "eval",
            out,
            "--text",
            text,
            "--sequence-length",
            64,
            "--sequences",
            2,
            "--device",
            "cpu",
            "--json",
        )
        == 0
    )
    measured = json.loads(capsys.readouterr().out)
    assert measured["texts"][0]["models"][1]["kl"] > 0
    assert measured["texts"][0]["tokens"] == 2 * 63
    assert [model["role"] for model in measured["models"]] == ["donor", "converted"]


def test_an_existing_folder_is_refused(
    main: Main, capsys: pytest.CaptureFixture[str], converted: tuple[Path, dict], words: list[str]
) -> None:
    before = weights(converted[0])
    assert main(*words, "-o", converted[0]) == 1
    assert "--force" in capsys.readouterr().err
    assert weights(converted[0]) == before


def test_dry_run_writes_nothing(
    main: Main, capsys: pytest.CaptureFixture[str], words: list[str], tmp_path: Path
) -> None:
    assert main(*words, "-o", tmp_path / "out", "--dry-run", "--json", "--kv-budget", "0.25") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kv_bytes_per_token"]["converted"] <= LAYERS * 16 * 4
    assert plan["output_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert main(*words, "-o", tmp_path / "out", "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kv-budget 0.001", "kv_budget"),
        ("--calibration absent.txt", "absent.txt"),
        ("--calibration-tokens 10000000", "ask for fewer with --calibration-tokens"),
        ("--device cuda:99", "cuda:99"),
    ],
)
def test_faults_leave_nothing(
    main: Main,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    tmp_path: Path,
    options: str,
    message: str,
) -> None:
    given = words[:3] + words[5:] if options.startswith("--calibration ") else words
    assert main(*given, "-o", tmp_path / "out", "--quiet", *options.split()) == 1
    captured = capsys.readouterr()
    assert message in captured.err.replace(",", "")
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("by", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_then_resume_gives_the_same_bytes(
    here: Cli,
    interrupted: Interrupted,
    converted: tuple[Path, dict],
    words: list[str],
    tmp_path: Path,
    by: int,
    code: int,
    said: str,
) -> None:
    out = tmp_path / "again"
    found, rest = interrupted("layers 3/", *words, "-o", out, by=by)
    assert found == code
    assert f"mhconvert: {said}; the same command with --resume" in rest
    assert "Traceback" not in rest
    assert not out.exists()
    resumed = here(*words, "-o", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert weights(out) == weights(converted[0])
