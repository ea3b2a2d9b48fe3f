"""Peak memory belongs to one layer, the streams and the embedding, not to the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.donors import make_donor

PROGRAM = """
import json, sys, mhconvert
donor, text, out = sys.argv[1:]
part = mhconvert.Calibration((text,), tokens=512, sequence_length=64, held_out=2)
plain = {"calibration": part, "effort": "quick", "verify": False, "device": "cpu"}
recipe = mhconvert.Recipe(donor, "mla", mhconvert.MLASettings(kv_bits="16"), output=out, **plain)
print(json.dumps(mhconvert.convert(recipe)["peak_rss_bytes"]))
"""


def test_the_peak_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} boats came home; {n * n} were counted.\n" for n in range(300)))
    peaks = {}
    for layers in (8, 64):
        shape = {"layers": layers, "hidden": 256, "heads": 4, "kv_heads": 2}
        donor = make_donor(tmp_path / f"donor-{layers}", **shape)
        words = [sys.executable, "-c", PROGRAM, str(donor), str(text), str(tmp_path / f"out-{layers}")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks[layers] = json.loads(done.stdout)
        size = (donor / "model.safetensors").stat().st_size
    assert size > 0.25 * peaks[8]  # the larger donor could not hide in what the interpreter needs
    assert peaks[64] < 1.1 * peaks[8]
