"""The run for a GPU machine, on a CPU: its steps fail and overrun alone, and the inputs travel in pieces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.donors import TEXT, make_donor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_pack  # noqa: E402
import gpu_run  # noqa: E402
import gpu_smoke  # noqa: E402
from gpu_asked import SIZES, Asked  # noqa: E402
from gpu_healing import heal, launched  # noqa: E402


def test_a_step_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    donor, text = make_donor(tmp_path / "donor"), tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    words = ["--out", str(tmp_path / "out"), "--device", "cpu", "--minutes", "4", "--donor", str(donor)]
    words += ["--text", str(text), "--calibration", str(tmp_path / "none.txt"), "--steps", "convert,bench"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu_run.py"), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    report = json.loads((tmp_path / "out/gpu.json").read_text(encoding="utf-8"))
    steps = report["steps"]
    assert done.returncode == 1
    assert {name: step["status"] for name, step in steps.items()} == {"convert": "failed", "bench": "done"}
    assert "none.txt" in steps["convert"]["last_lines"][-1]
    assert "none.txt" in steps["convert"]["found"]["moh"]["error"]  # the last conversion was tried too
    rows = {name: found["rows"] for name, found in steps["bench"]["found"].items()}
    assert rows["mla, coded"][0]["cache_ratio"] == pytest.approx(0.125 / 2, rel=0.2)  # of elements of 32 bits
    assert report["versions"]["torch"]


def test_healing_takes_the_tokens_that_fit(tmp_path: Path) -> None:
    donor, text = str(make_donor(tmp_path / "donor")), tmp_path / "text.txt"
    text.write_text(TEXT * 80, encoding="utf-8")
    record = tmp_path / "record.json"
    texts = [str(text)]
    asked = Asked(donor, donor, texts, texts, None, "cpu", 0.0, str(tmp_path), str(record))
    heal(asked, "mla, 16 bits")
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["trial"]["trained_tokens"] == SIZES["cpu"]["trial"]
    assert found["healing"]["trained_tokens"] == SIZES["cpu"]["batch"]  # no time was left: one step
    assert found["before"]["donor"]["kl"] == 0 < found["before"]["converted"]["kl"]
    assert found["after"]["healed"]["perplexity"] > 1


def test_workers_do_not_outlive_their_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher in place of torch's, which starts a worker in another session and does not end."""
    launcher = tmp_path / "torch/distributed"
    launcher.mkdir(parents=True)
    for package in (launcher, launcher.parent):
        (package / "__init__.py").touch()
    (launcher / "run.py").write_text(
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "worker = subprocess.Popen(sleep, start_new_session=True)\n"
        f"open({str(tmp_path / 'worker')!r}, 'w').write(str(worker.pid))\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = Asked("d", "d", [], ["t"], None, "cpu", 60.0, str(tmp_path), str(tmp_path / "record.json"))
    with pytest.raises(subprocess.TimeoutExpired):
        launched(asked, "ddp", 3.0)
    assert not is_running(int((tmp_path / "worker").read_text(encoding="utf-8")))


def sleeping_step(root: Path) -> Path:
    """A copy of the run whose steps sleep, and start one in another session that sleeps too; returns its gpu_run.py."""
    folder = root / "benchmarks"
    folder.mkdir()
    (folder / "gpu_steps.py").write_text(
        "import json, os, subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "process = subprocess.Popen(sleep, start_new_session=True)\n"
        "record = json.loads(sys.argv[2])['record']\n"
        "with open(record + '.new', 'w') as opened:\n"
        "    json.dump({'processes': [os.getpid(), process.pid]}, opened)\n"
        "os.replace(record + '.new', record)\n"
        "print('slow', flush=True)\n"
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    for name in ("gpu_run.py", "gpu_processes.py"):
        shutil.copy(ROOT / "benchmarks" / name, folder)
    return folder / "gpu_run.py"


def is_running(process: int) -> bool:
    """One that has ended and whose parent has not asked for its status has no command line."""
    file = Path(f"/proc/{process}/cmdline")
    return file.is_file() and bool(file.read_bytes())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_running_step_and_then_the_scratch(number: signal.Signals, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["--out", str(tmp_path / "out"), "--device", "cpu", "--donor", "d", "--text", "t"]
    words += ["--calibration", "c", "--steps", "smoke"]
    run = subprocess.Popen(
        [sys.executable, str(sleeping_step(tmp_path)), *words], env=os.environ | {"TMPDIR": str(scratch)}
    )
    until = time.monotonic() + 30
    while not (records := list(scratch.glob("*/smoke.json"))) and time.monotonic() < until:
        time.sleep(0.05)
    processes = json.loads(records[0].read_text(encoding="utf-8"))["processes"]
    assert all(map(is_running, processes))
    run.send_signal(number)
    assert run.wait(30) == 128 + number
    assert not any(map(is_running, processes))
    assert not list(scratch.iterdir())


def test_a_step_that_overruns_is_ended_with_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeping_step(tmp_path)
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    inputs = gpu_run.Inputs("donor", "donor", [], [], None)
    step = gpu_run.run("smoke", "cpu", inputs, gpu_run.LEAST_SECONDS, tmp_path, dict(os.environ))
    assert (step["status"], step["last_lines"]) == ("overran", ["slow"])
    assert not any(map(is_running, step["found"]["processes"]))
    assert gpu_run.run("smoke", "cpu", inputs, 0.0, tmp_path, {})["status"].startswith("left out")


def test_inputs_travel_in_pieces(tmp_path: Path) -> None:
    text, donor = tmp_path / "text.txt", make_donor(tmp_path / "stored")
    text.write_bytes(os.urandom(3000))
    linked = tmp_path / "tiny"  # as a download of the Hub lies: a folder of links
    linked.mkdir()
    for file in donor.iterdir():
        (linked / file.name).symlink_to(file)
    donor = linked
    trips = gpu_pack.packed({"text": [text], "donor": [donor]}, tmp_path / "packed", 100_000)
    assert trips > 1
    assert all(file.stat().st_size <= 100_000 for file in (tmp_path / "packed").rglob("*") if file.is_file())
    found = gpu_run.unpacked(tmp_path / "packed", tmp_path)
    assert (found / "text/text.txt").read_bytes() == text.read_bytes()
    assert not any(file.is_symlink() for file in found.rglob("*"))
    asked = gpu_run.arguments(["--out", str(tmp_path), "--calibration", str(text)])
    assert gpu_run.chosen(asked, found).donor == str(found / "donor/tiny")
    asked = gpu_run.arguments(["--out", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit, match="run make gpu-inputs"):
        gpu_run.chosen(asked, tmp_path / "nothing")


def test_pieces_that_are_missing_or_of_another_pack_are_refused(tmp_path: Path) -> None:
    text, packed = tmp_path / "text.txt", tmp_path / "packed"
    text.write_bytes(os.urandom(3000))
    assert gpu_pack.packed({"text": [text]}, packed, 1000) > 2
    pieces = sorted(packed.rglob(f"{gpu_run.ARCHIVE}.*"))
    whole = pieces[1].read_bytes()
    pieces[1].unlink()
    with pytest.raises(
        SystemExit, match=f"{len(pieces) - 1} pieces of an archive of {len(pieces)}, without 1"
    ):
        gpu_run.unpacked(packed, tmp_path)
    pieces[1].write_bytes(whole)
    (packed / f"{gpu_run.ARCHIVE}.000-of-002").write_bytes(whole)
    with pytest.raises(SystemExit, match="pieces of several archives"):
        gpu_run.unpacked(packed, tmp_path)


def test_make_refuses_inputs_without_data() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MHCONVERT_DATA"}
    command = ["make", "-n", "gpu-inputs", "PYTHON=true"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    check = next(line for line in shown.stdout.splitlines() if "gpu-inputs: say where" in line)
    done = subprocess.run(["sh", "-c", check.lstrip("@")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "DATA=FOLDER" in done.stdout


def test_figures_agree_within_their_tolerance() -> None:
    assert gpu_smoke.agree(100.05, 100.0, gpu_smoke.ONE_MODEL)
    assert not gpu_smoke.agree(101.0, 100.0, gpu_smoke.ONE_MODEL)
    assert gpu_smoke.agree("the same", "the same", gpu_smoke.SAME)
    assert not gpu_smoke.agree("a text", "another", gpu_smoke.SAME)
    assert not gpu_smoke.agree(None, None, gpu_smoke.SAME)  # both failed
    assert not gpu_smoke.agree(float("nan"), float("nan"), gpu_smoke.ONE_RECIPE)


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_run.arguments(["--out", "x", "--steps", "smoke,smok"])
    assert "there is no step smok; there are smoke, convert" in capsys.readouterr().err
