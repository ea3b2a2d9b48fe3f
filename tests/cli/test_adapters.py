"""`--to hydra`, `merge` and `export` as people run them: JSON, tables, faults and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import Cli, Interrupted, Main
from tests.convert.methods.hydra.adapted import adapted, relative, tokens
from tests.donors import make_donor

OPTIONS = "--to hydra --r-par 8 --r-seq 8 --targets o_proj,down_proj"


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("adapters") / "tiny")


@pytest.fixture(scope="module")
def trained(donor: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that peft wrote, and the model that was saved."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model = adapted(AutoModelForCausalLM.from_pretrained(donor), task_type="CAUSAL_LM")
    model.save_pretrained(folder)
    return folder, model


def test_from_donor_to_checkpoint(cli: Cli, donor: Path, tmp_path: Path) -> None:
    """The three commands in processes of their own, each with one JSON object on stdout."""
    adapter, plain, lora = tmp_path / "adapter", tmp_path / "plain", tmp_path / "lora"
    done = cli(donor, *OPTIONS.split(), "-o", adapter, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["modules"] == [
        f"model.layers.{index}.{name}" for index in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert report["parameters"]["trainable"] == 2 * (8 * (64 + 64) + 8 * 2 * 64 + 8 * (128 + 64) + 8 * 2 * 64)
    assert report["parameters"]["share"] == report["parameters"]["trainable"] / report["parameters"]["base"]
    assert Path(report["output"]) == adapter
    for words, out in ((("merge", adapter), plain), (("export", adapter, "--to", "lora"), lora)):
        done = cli(*words, "-o", out, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["output"] == str(out)
    expected = load_file(donor / "model.safetensors")
    found = load_file(plain / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # the adapter is the identity
    assert json.loads((lora / "adapter_config.json").read_text())["r"] == 16


def test_the_table_has_modules_and_parameters(
    main: Main, capsys: pytest.CaptureFixture[str], donor: Path, tmp_path: Path
) -> None:
    assert main(donor, *OPTIONS.split(), "-o", tmp_path / "out") == 0
    out = capsys.readouterr().out
    for words in (
        "model.layers.*.self_attn.o_proj",
        "2 modules",
        "9,216",
        "9.75 % of 94,528",
        "r_par 8, r_seq 8, scale 1",
    ):
        assert words in out
    assert main("merge", tmp_path / "out", "-o", tmp_path / "merged") == 0
    assert "model.layers.*.mlp.down_proj" in capsys.readouterr().out
    assert main("export", tmp_path / "out", "--to", "lora", "-o", tmp_path / "lora") == 0
    assert "(LoRA)" in capsys.readouterr().out


def test_quiet_is_the_folder_alone(
    main: Main,
    capsys: pytest.CaptureFixture[str],
    donor: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, folder in (
        ((donor, "--to", "hydra"), "tiny-hydra"),
        (("merge", "tiny-hydra"), "tiny-hydra-merged"),
        (("export", "tiny-hydra", "--to", "lora"), "tiny-hydra-lora"),
    ):
        assert main(*words, "--quiet") == 0
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == (f"{folder}\n", "")
        assert (tmp_path / folder / "mhconvert.json").is_file()


def test_dry_run_writes_nothing(
    main: Main, capsys: pytest.CaptureFixture[str], donor: Path, tmp_path: Path
) -> None:
    words = (donor, *OPTIONS.split(), "-o", tmp_path / "out", "--dry-run")
    assert main(*words) == 0
    out = capsys.readouterr().out
    assert "nothing was written" in out
    assert "model.layers.*.mlp.down_proj" in out
    assert main(*words, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["modules"]) == 4
    assert list(tmp_path.iterdir()) == []


def test_every_option_reaches_the_adapter(main: Main, donor: Path, tmp_path: Path) -> None:
    options = "--to hydra --r-par 3 --r-seq 0 --targets q_proj --scale 0.5 --dropout 0.1 --seed 7 --quiet"
    assert main(donor, *options.split(), "-o", tmp_path / "seven") == 0
    config = json.loads((tmp_path / "seven" / "adapter_config.json").read_text())
    expected = {"r_par": 3, "r_seq": 0, "target_modules": ["q_proj"], "scale": 0.5, "dropout": 0.1}
    assert {key: config[key] for key in expected} == expected
    assert main(donor, *options.replace("7", "8").split(), "-o", tmp_path / "eight") == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("seven", "eight")]
    assert weights[0] != weights[1]


def test_every_linear_module_but_the_head(main: Main, donor: Path, tmp_path: Path) -> None:
    assert main(donor, "--to", "hydra", "--targets", "all-linear", "-o", tmp_path / "all", "-q") == 0
    stored = load_file(tmp_path / "all" / "adapter_model.safetensors")
    assert len({name.rpartition(".")[0] for name in stored}) == 2 * 7
    assert not any("lm_head" in name for name in stored)
    assert main("merge", tmp_path / "all", "-o", tmp_path / "merged", "-q") == 0
    assert main(donor, "--to", "hydra", "--targets", "all-linear,o_proj", "-o", tmp_path / "no", "-q") == 1


def test_merge_options(main: Main, trained: tuple[Path, Any], donor: Path, tmp_path: Path) -> None:
    folder, model = trained
    options = "--dtype bfloat16 --max-shard-size 100KB --quiet"
    assert main("merge", folder, "-o", tmp_path / "out", "--base", donor, *options.split()) == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(merged(tokens()).logits, model(tokens()).logits) < 0.05
    assert main("merge", folder, "-o", tmp_path / "out", "--quiet") == 1
    assert main("merge", folder, "-o", tmp_path / "out", "--quiet", "--force") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_eval_and_generate_take_an_adapter(
    main: Main, capsys: pytest.CaptureFixture[str], trained: tuple[Path, Any], donor: Path, tmp_path: Path
) -> None:
    folder, _ = trained
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} boats came home past the town.\n" for n in range(60)))
    words = ("--text", text, "--sequence-length", 32, "--sequences", 2, "--device", "cpu", "--json")
    assert main("eval", folder, *words) == 0
    measured = json.loads(capsys.readouterr().out)
    assert [model["reference"] for model in measured["models"]] == [str(donor), str(folder)]
    assert [model["role"] for model in measured["models"]] == ["donor", "adapter"]
    divergence = measured["texts"][0]["models"][1]["kl"]
    assert divergence > 1e-3
    assert measured["cache"][0] == measured["cache"][1]
    assert main("merge", folder, "-o", tmp_path / "out", "--quiet") == 0
    capsys.readouterr()
    assert main("eval", tmp_path / "out", *words) == 0  # against its base, which mhconvert.json names
    merged = json.loads(capsys.readouterr().out)
    assert merged["models"][0]["reference"] == str(donor)
    assert merged["texts"][0]["models"][1]["kl"] == pytest.approx(divergence, rel=1e-4)
    assert main("generate", folder, "7 boats", "--max-new-tokens", 6, "--device", "cpu", "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert (
        main("generate", tmp_path / "out", "7 boats", "--max-new-tokens", 6, "--device", "cpu", "--json") == 0
    )
    assert json.loads(capsys.readouterr().out)["text"] == written["text"]


def test_inspect_says_what_an_adapter_would_be(
    main: Main,
    capsys: pytest.CaptureFixture[str],
    donor: Path,
    trained: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-hydra").mkdir()  # where a new adapter would go; inspecting is no reason to look there
    (tmp_path / "tiny-hydra" / "mine.txt").touch()
    assert main("inspect", donor) == 0
    assert "hydra: applies; 9,216 trainable parameters" in capsys.readouterr().out
    assert main("inspect", trained[0]) == 1
    assert (
        f"is an adapter, not a model; make one of it: mhconvert merge {trained[0]}" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny --to hydra --kv-budget 0.5", "--kv-budget does not apply to hydra"),
        ("tiny --to hydra --profile portable", "--profile does not apply to hydra"),
        ("tiny --to hydra --tolerance kl=0.1", "--tolerance does not apply to hydra"),
        ("tiny --to hydra --calibration a.txt", "--calibration does not apply to hydra"),
        ("tiny --to hydra --effort quick", "--effort does not apply to hydra"),
        ("tiny --to hydra --fit-steps 0", "--fit-steps does not apply to hydra"),
        ("tiny --to hydra --dtype bfloat16", "--dtype does not apply to hydra"),
        ("tiny --to hydra --no-verify", "--no-verify does not apply to hydra"),
        ("tiny --to hydra --resume", "--resume does not apply to hydra"),
        ("tiny --to hydra --targets o_proj,,down_proj", "has an empty name"),
        ("tiny --to hydra --r-par many", "--r-par"),
        ("tiny --to mla --r-par 8", "--r-par does not apply to mla"),
        ("tiny --to mla --targets o_proj", "--targets does not apply to mla"),
        ("curve tiny --to hydra", "'hydra' is not a method that changes the KV cache; choose one of mla"),
        ("export tiny", "--to"),
        ("export tiny --to vllm", "vllm"),
        ("merge", "ADAPTER"),
        ("merg tiny", "did you mean 'mhconvert merge'?"),
    ],
)
def test_wrong_usage(main: Main, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(*words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--r-par 0 --r-seq 0",
            "r_par=0 and r_seq=0 leave nothing to train; give at least one of them a rank",
        ),
        ("--r-par -1", "r_par=-1 is not a rank"),
        ("--targets o_proj,dwn_proj", "'dwn_proj' match nothing in LlamaForCausalLM: the nearest names"),
        ("--targets lm_head", "'lm_head' is tied to the input embedding"),
        ("--targets embed_tokens", "'model.embed_tokens' is a Embedding"),
        ("--dropout 1", "dropout=1.0 is outside [0, 1)"),
        ("--r-par 99999999999", "r_par=99999999999 is not a rank: a whole number from 0 to 65536"),
    ],
)
def test_faults_are_one_line_and_leave_nothing(
    main: Main, capsys: pytest.CaptureFixture[str], donor: Path, tmp_path: Path, options: str, message: str
) -> None:
    assert main(donor, "--to", "hydra", *options.split(), "-o", tmp_path / "out", "--quiet") == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_faults_of_adapters_are_one_line_too(
    main: Main, capsys: pytest.CaptureFixture[str], trained: tuple[Path, Any], donor: Path, tmp_path: Path
) -> None:
    other = make_donor(tmp_path / "other", hidden=32)
    for words, message in (
        (("merge", donor), "is a model, not an adapter"),
        (("merge", "absent"), "has no adapter_config.json"),
        (("merge", trained[0], "--base", other), "the adapter was trained on a model of another shape"),
        (("export", trained[0], "--to", "lora", "--base", other), "trained on a model of another shape"),
    ):
        assert main(*words, "-o", tmp_path / "out", "--quiet") == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.splitlines()) == 1
    assert main("merge", trained[0], "--max-shard-size", "big", "-o", tmp_path / "out", "--quiet") == 2
    assert "is not a size" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_ctrl_c_leaves_nothing(here: Cli, interrupted: Interrupted, tmp_path: Path) -> None:
    big = make_donor(tmp_path / "big", layers=60)
    adapter = tmp_path / "adapter"
    assert here(big, "--to", "hydra", "-o", adapter, "-q").returncode == 0
    code, rest = interrupted("merging 1/", "merge", adapter, "-o", tmp_path / "out")
    assert code == 130
    assert "Traceback" not in rest
    assert {path.name for path in tmp_path.iterdir()} == {"big", "adapter"}
