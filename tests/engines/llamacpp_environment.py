"""Makes an environment with llama.cpp for CPUs: `python llamacpp_environment.py FOLDER`.

xllamacpp's wheel holds llama.cpp with its own server, built; FOLDER/bin/llama-server starts that.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

XLLAMACPP = "2026.10.11549"  # ends in llama.cpp's build


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    subprocess.run([str(python), "-m", "pip", "--quiet", "install", f"xllamacpp=={XLLAMACPP}"], check=True)
    server = folder / "bin/llama-server"
    program = Path(__file__).absolute().with_name("llama_server_program.py")
    server.write_text(f'#!/bin/sh\nexec "{python}" "{program}" "$@"\n', encoding="utf-8")
    server.chmod(0o755)


if __name__ == "__main__":
    main()
