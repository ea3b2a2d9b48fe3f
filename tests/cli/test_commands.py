"""Words to library calls, and library results to stdout, stderr and exit codes. The library itself is replaced."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mhconvert import api
from mhconvert.cli.main import arguments
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import MhconvertError
from mhconvert.progress import Progress
from tests.conftest import Main

REPORT = {
    "output": "out",
    "method": "mla",
    "donor": "tiny",
    "perplexity": {"donor": 20.0, "converted": 25.0},
    "kl": float("inf"),
    "top1_agreement": 0.75,
    "kv_bytes_per_token": {"donor": 4096, "converted": 2048},
    "layers": [{"index": 0, "relative_error": 0.1}],
    "seconds": 2.0,
    "peak_rss_bytes": 2**30,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, dict[str, Any]]]:
    """The conversions asked for; each one reports two layers, chats on stdout, and gives REPORT."""
    seen: list[tuple[Recipe, dict[str, Any]]] = []

    def convert(recipe: Recipe, **options: Any) -> dict[str, Any]:
        seen.append((recipe, options))
        print("a library chats")
        for done in (1, 2):
            options["on_progress"](Progress("layers", done, 2, error=0.125))
        return REPORT

    monkeypatch.setattr(api, "convert", convert)
    return seen


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], []),
        (["--help"], ["--help"]),
        (["--version"], ["--version"]),
        (["inspect", "x"], ["inspect", "x"]),
        (["smollm2-135m", "--to", "mla"], ["convert", "smollm2-135m", "--to", "mla"]),
        (["--to", "mla", "./eval"], ["convert", "--to", "mla", "./eval"]),
        (["x", "--help"], ["convert", "x", "--help"]),
    ],
)
def test_a_word_that_is_no_subcommand_is_a_donor(words: list[str], expected: list[str]) -> None:
    assert arguments(words) == expected


def test_defaults(main: Main, calls: list) -> None:
    assert main("tiny", "--to", "mla") == 0
    recipe, options = calls[0]
    assert recipe == Recipe(model="tiny", method="mla")
    assert recipe.settings.kv_bits == "auto"
    assert (options["resume"], options["force"]) == (False, False)


def test_every_option_reaches_the_recipe(main: Main, calls: list) -> None:
    words = (
        "tiny --to mla -o out --kv-lora-rank 24 --qk-rope-head-dim 8 --profile portable --effort quick --fit-steps 3"
        " --calibration a.txt --calibration b*.jsonl --calibration-tokens 99 --sequence-length 64 --seed 5"
        " --dtype bfloat16 --device cpu --max-shard-size 1GB --no-verify --resume --force --trust-remote-code"
    )
    assert main(*words.split()) == 0
    recipe, options = calls[0]
    plain = recipe.to_dict()
    assert plain.pop("calibration") == {
        "sources": ["a.txt", "b*.jsonl"],
        "tokens": 99,
        "sequence_length": 64,
        "held_out": 4,
    }
    settings = plain.pop("settings")
    assert {key: settings[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "profile")} == {
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "profile": "portable",
    }
    assert settings["kv_bits"] == "16"
    assert plain == {
        "model": "tiny",
        "method": "mla",
        "output": "out",
        "tolerance": None,
        "effort": "quick",
        "fit_steps": 3,
        "seed": 5,
        "dtype": "bfloat16",
        "device": "cpu",
        "max_shard_size": "1GB",
        "verify": False,
        "trust_remote_code": True,
        "heal": None,
    }
    assert (options["resume"], options["force"]) == (True, True)


def test_json_is_one_object_and_all_else_is_on_stderr(
    main: Main, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("tiny", "--to", "mla", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out, parse_constant=pytest.fail) == REPORT | {"kl": None}
    assert "a library chats" in captured.err
    assert "layers 2/2 · relative error 0.1250" in captured.err


def test_table(main: Main, calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("tiny", "--to", "mla") == 0
    captured = capsys.readouterr()
    assert "× 1.250" in captured.out
    assert "a library chats" not in captured.out


def test_quiet_is_the_folder_alone(main: Main, calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("tiny", "--to", "mla", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == "out\n"
    assert captured.err == "a library chats\n"


def test_dry_run_plans(
    main: Main, monkeypatch: pytest.MonkeyPatch, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {
        "donor": "tiny",
        "output": "tiny-mla",
        "method": "mla",
        "dtype": "bfloat16",
        "kv_elements_per_token": {"donor": 2048, "converted": 512},
        "kv_bytes_per_token": {"donor": 4096, "converted": 1024},
        "layers": [{"index": 0, "kv_lora_rank": 24, "qk_rope_head_dim": 8}],
    }
    asked: list[bool] = []

    def planned(recipe: Recipe, *, survey: bool, on_progress: Any) -> dict[str, Any]:
        asked.append(survey)
        return plan

    monkeypatch.setattr(api, "plan", planned)
    assert main("tiny", "--to", "mla", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "4 KiB → 1 KiB" in out
    assert "25 %" in out
    assert "nothing was written" in out
    assert main("tiny", "--to", "mla", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == plan
    assert main("tiny", "--to", "mla", "--dry-run", "--survey", "--quiet") == 0
    assert asked == [False, False, True]
    assert calls == []


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def convert(*_: Any, **__: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(api, "convert", convert)


def test_a_fault_is_one_line(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, MhconvertError("kv_budget=2 is\noutside (0, 1]"))
    assert main("tiny", "--to", "mla") == 1
    captured = capsys.readouterr()
    assert captured.err == "mhconvert: kv_budget=2 is outside (0, 1]\n"
    assert captured.out == ""
    assert main("tiny", "--to", "mla", "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"error": "kv_budget=2 is outside (0, 1]"}


def test_a_surprise_is_one_line_too(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, RuntimeError("shapes differ"))
    assert main("tiny", "--to", "mla") == 1
    assert capsys.readouterr().err == (
        "mhconvert: 'tiny --to mla' failed: RuntimeError: shapes differ; --debug shows where: please report it with "
        "that\n"
    )
    assert main("tiny", "--to", "mla", "--debug") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_names_do_not_steer_the_terminal(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In tables, progress and errors; and what looks like markup is shown as it is."""
    name = "evil\x1b[2J\x9b1m\u202e[red]\ud800[/blue]"
    shown = r"evil\x1b[2J\x9b1m\u202e[red]\ud800[/blue]"

    def convert(_: Recipe, **options: Any) -> dict[str, Any]:
        options["on_progress"](Progress("donor", 0, 1, name))
        return REPORT | {"donor": name, "output": name, "sample": {"prompt": name, "converted": name}}

    monkeypatch.setattr(api, "convert", convert)
    assert main("tiny", "--to", "mla") == 0
    captured = capsys.readouterr()
    assert f"{shown} → " in captured.out
    assert f"opening the donor · {shown}\n" == captured.err
    failing(monkeypatch, MhconvertError(f"{name} is broken"))
    assert main("tiny", "--to", "mla") == 1
    captured = capsys.readouterr()
    assert captured.err == f"mhconvert: {shown} is broken\n"
    assert not {"\x1b", "\x9b", "\u202e"} & set(captured.out + captured.err)


def test_ctrl_c_tells_how_to_go_on(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main("tiny", "--to", "mla") == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny", "--to"),
        ("tiny --to moa", "'moa' is not a method; choose one of"),
        ("tiny --to moa --help", "'moa' is not a method; choose one of"),
        ("curve tiny --to=moh -h", "'moh' is not a method that changes the KV cache; choose one of"),
        ("tiny --to moh --tolerance kl=0.1", "--tolerance does not apply to moh"),
        ("tiny --to mla --tolerance kl=0.1 --prompts x", "--prompts is of --tolerance generation=NATS"),
        ("tiny --to mla --prompts x", "--prompts is of --tolerance generation=NATS"),
        (
            "tiny --to mla --effort huge",
            "Error: Invalid value for '--effort': 'huge' is not one of quick, default, high\n",
        ),
        (
            "tiny --to mla --kv-budget much",
            "Error: Invalid value for '--kv-budget': 'much' is not a number\n",
        ),
        ("tiny --to mla --kv-budget 0.3 --kv-lora-rank 8 --qk-rope-head-dim 8", "but not both"),
        ("tiny more --to mla", "more"),
        ("tiny --to mla --no-such-option", "no-such-option"),
        ("inspct tiny", "did you mean 'mhconvert inspect'?"),
        ("eval", "CKPT"),
        ("eval tiny --suite everything", "everything"),
        (
            "eval tiny --limit many --suite quick",
            "Invalid value for '--limit': 'many' is not a whole number\n",
        ),
        ("eval tiny --limit 1.5 --suite quick", "Invalid value for '--limit': '1.5' is not a whole number\n"),
        ("eval tiny --tasks ,", "tasks ',' has no name of a task"),
        ("export tiny", "Missing option '--to'. Choose one of auto, deepseek_v3, youtu, own, gguf, llama,"),
        (
            "tiny --effort quick",
            "Missing option '--to'. Choose one of mla, dha, moh, swa, mla+swa, hybrid, hydra",
        ),
        ("tiny --to mla --heal much", "tokens 'much' is not a number of tokens such as 200k or 20M"),
        ("tiny --to mla --tolerance kl=much", "tolerance 'kl=much' has no number"),
        ("tiny --to mla --max-shard-size abc", "max_shard_size 'abc' is not a size such as 5GB"),
        ("merge tiny --max-shard-size abc", "max_shard_size 'abc' is not a size such as 5GB"),
        ("tiny --to mla --device abc", "device 'abc' cannot be used: it is none of torch's; choose one"),
        (
            "eval tiny --suite quick --device abc",
            "device 'abc' cannot be used: it is none of torch's; choose one",
        ),
        ("run smollm2-135m-mla --set heal", "--set heal is not key=value; for example heal.tokens=1B"),
        ("recipes validate smollm2-135m-mla --set heal.tokens=", "--set heal.tokens= has no value"),
        ("tiny --to mla --tolerance kl", "tolerance 'kl' is none of kl=NATS, ppl=RATIO and generation=NATS"),
        ("tiny --to moh --active many", "'many' is neither a share of heads nor a list"),
    ],
)
def test_wrong_usage(main: Main, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(*words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_folder_named_almost_as_a_subcommand_is_a_donor(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("donor") == 2
    assert "did you mean 'mhconvert donors'?" in capsys.readouterr().err
    Path("donor").mkdir()
    assert main("donor") == 2
    assert (
        "Missing option '--to'. Choose one of mla, dha, moh, swa, mla+swa, hybrid, hydra"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval tiny --limit 0 --suite quick", "limit=0 is too small; use at least 1"),
        ("eval tiny --sequences 0 --text a.txt", "sequences=0 is too small; use at least 1"),
        ("heal tiny --tokens 1k --rank 0", "rank=0 is too small; use at least 1"),
        ("heal tiny --tokens 1k --lr 7", "lr=7.0 is not between 0 and 1"),
        ("heal tiny --tokens 0", "there is nothing to do; say how many tokens to heal on, for example 20M"),
        ("tiny --to mla --heal 0", "there is nothing to do; say how many tokens to heal on, for example 20M"),
        (
            "tiny --to mla --kv-budget 2",
            "kv_budget=2.0 is outside (0, 1]; it is a share of the donor's KV cache",
        ),
        ("tiny --to mla --sequence-length 0", "sequence_length=0 is too short; use at least 8"),
        ("tiny --to mla --calibration-tokens 0", "tokens=0 does not fill a row; use at least 8"),
        ("tiny --to mla --heal 1e400", "tokens=1e400 is not a whole number of tokens"),
        ("tiny --to mla --heal 1.5", "tokens=1.5 is not a whole number of tokens"),
        ("heal tiny --tokens 5 --batch-tokens 1e999", "batch_tokens=1e999 is not a whole number of tokens"),
        (
            "tiny --to mla --tolerance ppl=0.5",
            "tolerance 'ppl=0.5' is out of reach: ppl must be a number above 1, which is what the donor itself has",
        ),
        (
            "tiny --to mla --tolerance kl=inf",
            "tolerance 'kl=inf' is out of reach: kl must be a number above 0, which is what the donor itself has",
        ),
        ("run smollm2-135m-mla --set seed=-1", "--set seed=-1: seed=-1 is not between 0 and 4294967295"),
        ("heal tiny --tokens 5 --batch-tokens 0", "batch_tokens=0 is too small; use at least 1"),
        ("tiny --to dha --min-heads 0", "min_heads=0 is not a number of heads from 1"),
        ("tiny --to mla --fit-steps -1", "fit_steps=-1 is negative; 0 means the closed form alone"),
    ],
)
def test_a_value_out_of_range_is_a_fault_in_our_words(
    main: Main, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert main(*words.split()) == 1
    assert capsys.readouterr().err == f"mhconvert: {message}\n"


def test_a_tolerance_of_the_command_line_is_in_its_one_spelling(main: Main, calls: list) -> None:
    assert main("tiny", "--to", "mla", "--tolerance", "kl=1") == 0
    assert calls[0][0].tolerance == "kl=1.0"


def test_help_of_an_adapter_has_no_options_of_a_pass(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    def flags(method: str) -> set[str]:
        assert main("tiny", "--to", method, "--help") == 0
        return {word.rstrip(",") for word in capsys.readouterr().out.split() if word.startswith("--")}

    of_a_pass = {"--heal", "--resume", "--survey", "--effort", "--calibration"}
    assert of_a_pass <= flags("mla")
    assert not of_a_pass & flags("hydra")
    assert {"--r-par", "--seed", "--force", "--dry-run"} <= flags("hydra")


def test_help_of_a_method_has_no_word_of_options_that_it_lacks(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for method in ("mla", "dha", "moh"):
        assert main("tiny", "--to", method, "--help") == 0
        shown[method] = " ".join(capsys.readouterr().out.split())
    assert {name for name, text in shown.items() if "--tolerance" in text} == {"mla", "dha"}
    assert {name for name, text in shown.items() if "--plan" in text} == {"mla", "dha"}
    assert "divide the budget over its layers; with --json a file for --plan." in shown["dha"]
    assert "divide the budget over its layers." in shown["moh"]
    assert "auto: the cache is coded;" in shown["mla"]
    assert "[default: auto]" in shown["mla"]


def test_bad_settings_are_a_fault_with_the_range(
    main: Main, calls: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("tiny", "--to", "mla", "--kv-budget", "1.5") == 1
    assert "kv_budget=1.5 is outside (0, 1]" in capsys.readouterr().err
    assert calls == []


def test_version_and_help_import_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import sys, runpy\n"
        "sys.argv = ['mhconvert', '--help']\n"
        "try: runpy.run_module('mhconvert.cli.main', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub', 'pydantic'} & sys.modules.keys()))\n"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)  # processor time: a busy machine does not count
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.strip().endswith("[]")
    assert "DONOR --to METHOD" in done.stdout
    assert min(seconds) < 0.5


def test_donors_are_listed(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("donors") == 0
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in capsys.readouterr().out
    assert main("donors", "--json") == 0
    assert (
        json.loads(capsys.readouterr().out)["donors"]["smollm2-135m"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def test_version(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    import mhconvert

    assert main("--version") == 0
    assert capsys.readouterr().out == f"mhconvert {mhconvert.__version__}\n"


def test_stray_writers_of_file_descriptor_1(tmp_path: Path) -> None:
    """C code and child processes write past sys.stdout; the one JSON object still stands alone."""
    script = tmp_path / "stray.py"
    script.write_text(
        "import os\n"
        "from mhconvert.cli.output import Flags, execute\n"
        "def work(stdout):\n"
        "    os.system('echo a child process'); os.write(1, b'from C\\n'); print('from Python')\n"
        "    return {'answer': 1}\n"
        "try: execute(Flags(json=True), work, None)\n"
        "except Exception as exit: raise SystemExit(exit.exit_code)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"answer": 1}
    for words in ("a child process", "from C", "from Python"):
        assert words in done.stderr
