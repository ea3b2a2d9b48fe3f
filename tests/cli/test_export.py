"""`mhconvert export` and `mhconvert verify` as a person runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mhconvert.convert.export import same_outputs
from mhconvert.errors import ProofError
from tests.conftest import Cli, Main
from tests.donors import make_checkpoint, make_donor


@pytest.fixture(scope="module")
def portable(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    donor = make_donor(place / "donor", head_dim=64, hidden=96)
    words = ("--to", "mla", "--profile", "portable", "--kv-lora-rank", 96, "--qk-rope-head-dim", 64)
    text = place / "text.txt"
    text.write_text("The river ran slowly past the town, and the boats came home. " * 40, encoding="utf-8")
    more = ("--effort", "quick", "--calibration", text, "--calibration-tokens", 256, "--sequence-length", 32)
    done = cli(donor, *words, *more, "--device", "cpu", "-o", place / "tiny-mla", "--quiet", "--no-verify")
    assert done.returncode == 0, done.stderr
    return place / "tiny-mla"


def test_auto_takes_deepseek_and_says_why(cli: Cli, here: Cli, portable: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = here("export", portable, "--to", "auto", "-o", out, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["to"] == "deepseek_v3"
    assert not out.exists()
    done = cli("export", portable, "--to", "auto", "-o", out)
    assert done.returncode == 0, done.stderr
    for part in ("--to deepseek_v3: it is exact", "the same", "SGLang", "KV cache a token"):
        assert part in done.stdout
    checked = cli("verify", out, "--json")
    found = json.loads(checked.stdout)
    assert found["model_class"] == "DeepseekV3ForCausalLM"
    assert found["relative_difference"] < 1e-4
    assert found["greedy_equal"]
    text = portable.parent / "text.txt"
    judged = here("eval", out, "--against", portable, "--text", text, "--sequence-length", 32, "--json")
    first, second = json.loads(judged.stdout)["texts"][0]["models"]
    assert second["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5)
    assert second["kl"] < 1e-6
    again = here("export", out, "--to", "auto")
    assert again.returncode == 1
    assert "is an export already" in again.stderr


def test_auto_for_llama_cpp_is_a_file(cli: Cli, here: Cli, portable: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    words = ("export", portable, "--to", "auto", "--for", "llama.cpp", "--kind", "f32", "-o", file)
    planned = json.loads(here(*words, "--dry-run", "--json").stdout)
    assert (planned["to"], planned["architecture"], file.exists()) == ("gguf", "deepseek2", False)
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    assert "--to gguf: it is exact, and what llama.cpp reads" in done.stdout
    assert file.read_bytes()[:4] == b"GGUF"
    folder = here("export", portable, "--to", "auto", "--for", "llama.cpp", "-o", tmp_path / "folder")
    assert folder.returncode == 1
    assert "does not end in .gguf" in folder.stderr
    dtype = here(*words, "--dtype", "bfloat16", "--dry-run")
    assert dtype.returncode == 1
    assert "--dtype does not apply" in dtype.stderr


def test_a_plan_and_a_conversion_say_which_engines_remain(here: Cli, portable: Path, tmp_path: Path) -> None:
    words = ("--to", "mla", "--profile", "portable", "--kv-budget", 0.75, "--dry-run", "-o", tmp_path / "no")
    planned = here(portable.parent / "donor", *words)
    assert planned.returncode == 0, planned.stderr
    said = "vLLM 0.32 takes latent rows of 320, 512 or 576 elements and not a row of 192 elements"
    assert said in planned.stdout
    assert "`export --pad-row 320` widens it with zeros, more than the donor's own 256" in planned.stdout
    report = json.loads((portable / "report.json").read_text())
    assert "not a row of 160 elements" in report["notice"]
    assert "not a row of 160 elements" in (portable / "README.md").read_text()


def test_an_engine_is_asked_for_and_a_row_padded_for_it(
    main: Main, capsys: pytest.CaptureFixture[str], portable: Path, tmp_path: Path
) -> None:
    """vLLM takes no row of 96 + 64 elements; SGLang takes DeepSeek-V3's class and not the one of our own."""
    out = tmp_path / "out"
    assert main("export", portable, "--to", "auto", "--for", "vllm", "-o", out, "--quiet") == 1
    said = capsys.readouterr().err
    assert "vllm does not take this export: vLLM 0.32 on GPUs: its latent caches take" in said
    assert "96 + 64 = 160; --pad-row 320 widens it with zeros" in said
    assert main("export", portable, "--to", "own", "--for", "sglang", "-o", out, "--quiet") == 1
    assert "sglang does not take this export" in capsys.readouterr().err
    assert not out.exists()
    assert main("export", portable, "--to", "own", "-o", tmp_path / "small") == 0
    assert "opening the donor · vLLM 0.32 will refuse it: its latent caches take" in capsys.readouterr().err
    words = ("export", portable, "--to", "auto", "--for", "vllm", "--pad-row", 576, "-o", out)
    assert main(*words) == 0
    said, told = capsys.readouterr()
    assert "will refuse it" not in told
    assert "row 160 → 576, by zeros" in said
    assert "vLLM 0.32 on CPUs" in said
    assert json.loads((out / "config.json").read_text())["kv_lora_rank"] == 512


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("llama", "was made by mla, and llama holds what --to dha makes"),
        ("lora", "was made by mla, and lora holds an adapter of --to hydra"),
    ],
)
def test_a_form_of_another_method(
    main: Main, capsys: pytest.CaptureFixture[str], portable: Path, to: str, message: str
) -> None:
    assert main("export", portable, "--to", to, "--quiet") == 1
    assert message in capsys.readouterr().err


def test_what_has_nothing_to_export(
    main: Main, capsys: pytest.CaptureFixture[str], portable: Path, tmp_path: Path
) -> None:
    donor = portable.parent / "donor"
    assert main("export", donor, "--to", "auto", "--quiet") == 1
    assert "is no checkpoint that mhconvert converted; an export begins with one" in capsys.readouterr().err
    assert main("export", f"{donor}-", "--to", "auto", "--quiet") == 1
    assert f"there is no folder {donor}-" in capsys.readouterr().err
    assert main("export", portable, "--to", "vllm", "--quiet") == 2
    capsys.readouterr()
    quality = make_checkpoint(tmp_path / "quality")
    assert main("export", quality, "--to", "auto", "--quiet", "-o", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "no form holds" in said
    assert "--profile portable" in said
    assert not (tmp_path / "out").exists()


def test_decoupled_heads_of_equal_groups(here: Cli, portable: Path, tmp_path: Path) -> None:
    """Two KV heads in one layer and one in the other go to nemotron-nas; two in both are a Llama from the start."""
    donor = make_donor(tmp_path / "donor", heads=4, kv_heads=4)
    words = ("--to", "dha", "--effort", "quick", "--calibration", portable.parent / "text.txt")
    more = ("--calibration-tokens", 256, "--sequence-length", 32, "--device", "cpu", "--quiet", "--no-verify")
    for name, heads in (("uneven", [2, 1]), ("even", [2, 2])):
        plan = tmp_path / f"{name}.json"
        maps = {2: [0, 0, 1, 1], 1: [0, 0, 0, 0]}
        plan.write_text(json.dumps({"layers": [{"k_map": maps[n], "v_map": maps[n]} for n in heads]}))
        made = here(donor, *words, *more, "--plan", plan, "-o", tmp_path / name)
        assert made.returncode == 0, made.stderr
    done = here("export", tmp_path / "uneven", "--to", "auto", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["to"], report["architecture"]) == ("nemotron-nas", "DeciLMForCausalLM")
    assert "llama" in report["why"]
    assert report["verified"]["relative_logit_error"] < 1e-5
    assert report["verified"]["cache"]["elements_per_token"] == (2 + 1) * 2 * 16
    stock = here("export", tmp_path / "even", "--to", "auto", "-o", tmp_path / "no")
    assert stock.returncode == 1
    assert "is of its donor's own class already: engines load it as it is" in stock.stderr


def test_routed_heads_have_their_own_class_alone(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "routed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "moh_llama"}))
    assert main("export", folder, "--to", "auto", "--quiet") == 1
    assert "routes its heads, which no stock class does" in capsys.readouterr().err


def test_a_coded_checkpoint_verifies_and_is_not_exported(here: Cli, portable: Path, tmp_path: Path) -> None:
    place, out = portable.parent, tmp_path / "coded"
    words = ("--to", "mla", "--kv-budget", 0.25, "--effort", "quick", "--calibration", place / "text.txt")
    more = ("--calibration-tokens", 256, "--sequence-length", 32, "--device", "cpu", "--quiet", "--no-verify")
    done = here(place / "donor", *words, *more, "-o", out)
    assert done.returncode == 0, done.stderr
    checked = here("verify", out, "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["relative_difference"] < 1e-4
    refused = here("export", out, "--to", "auto", "-o", tmp_path / "no")
    assert refused.returncode == 1
    assert "coded latents" in refused.stderr


def test_verify_knows_changed_files(here: Cli, portable: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(portable, place)
    (place / "README.md").write_text("A card of one's own.")
    assert here("verify", place).returncode == 0
    for name in ("tokenizer_config.json", "generation_config.json", "model.safetensors"):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(
            whole[:-1] + bytes([whole[-1] ^ 1]) if name.startswith("model") else whole + b" "
        )
        refused = here("verify", place)
        assert refused.returncode == 1
        assert f"{place / name} was changed after mhconvert wrote it" in refused.stderr
        (place / name).unlink()
        assert "holds no weights" if name.startswith("model") else "is gone" in here("verify", place).stderr
        (place / name).write_bytes(whole)


@pytest.mark.parametrize(
    ("to", "words", "message"),
    [
        ("own", ("--kind", "f16"), "--kind does not apply to an export to own"),
        ("gguf", ("--dtype", "bfloat16"), "--dtype does not apply to an export to gguf"),
        ("auto", ("--duplicate",), "--duplicate does not apply to an export to auto"),
        ("deepseek_v3", ("--base", "x"), "--base does not apply to an export to deepseek_v3"),
        ("own", ("-o", "{portable}/out"), "which is only read; choose another folder with -o"),
        ("gguf", ("-o", "{portable}/out.gguf"), "which is only read; choose another folder with -o"),
    ],
)
def test_what_would_be_ignored_or_lie_inside_is_refused(
    here: Cli, portable: Path, tmp_path: Path, to: str, words: tuple[str, ...], message: str
) -> None:
    before = sorted(portable.rglob("*"))
    place = () if "-o" in words else ("-o", tmp_path / "out.gguf")
    done = here("export", portable, "--to", to, *(w.format(portable=portable) for w in words), *place)
    assert done.returncode == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert sorted(portable.rglob("*")) == before


def test_a_cache_is_of_its_size(portable: Path) -> None:
    """More and less are refused; less is right where a sliding window is full."""
    held = {"elements_per_token": 100.0, "tokens": 30}
    same_outputs.require_cache(portable, held, 100, "x")
    for elements in (99, 101):
        with pytest.raises(ProofError, match=f"x: it caches 100 elements a token instead of {elements}"):
            same_outputs.require_cache(portable, held, elements, "x")


def test_verify_against_another_model(main: Main, capsys: pytest.CaptureFixture[str], portable: Path) -> None:
    donor = portable.parent / "donor"
    assert main("verify", portable, "--against", donor, "--json") == 0
    assert json.loads(capsys.readouterr().out)["relative_difference"] > 0.01
    assert main("verify", portable, "--against", donor, "--tolerance", 0.001) == 1
    assert "standard deviations, and 0.001 is allowed" in capsys.readouterr().err
    assert main("verify", donor) == 1
    assert "name a model with --against" in capsys.readouterr().err
    (donor / "modeling_own.py").write_text("raise SystemExit('this was run')")
    assert main("verify", donor, "--against", portable) == 1
    assert (
        "modeling_own.py is code that no version of mhconvert up to this one ships" in capsys.readouterr().err
    )
    (donor / "modeling_own.py").write_text("# changed, and trusted")
    assert main("verify", donor, "--against", portable, "--trust-remote-code") == 0
    (donor / "modeling_own.py").unlink()
    capsys.readouterr()
    config = (donor / "config.json").read_text()
    (donor / "config.json").write_text(
        json.dumps(json.loads(config) | {"auto_map": {"AutoConfig": "a/b--c.D"}})
    )
    assert main("verify", donor, "--against", portable) == 1
    assert "config.json names code outside of its folder (a/b--c.D)" in capsys.readouterr().err
    (donor / "config.json").write_text(config)
