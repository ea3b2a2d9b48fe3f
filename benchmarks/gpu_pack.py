"""What benchmarks/gpu_run.py reads, packed to travel to a machine without network. `make gpu-inputs` runs it, or

    PYTHONPATH=. python benchmarks/gpu_pack.py gpu_inputs --donor smollm2-135m --small FOLDER --text FILE \\
      --calibration FILE … [--data FOLDER] [--wheels FOLDER]

One archive is cut into pieces of what a trip carries beside the repository: gpu_inputs/1, gpu_inputs/2, …
On the machine the pieces are put beside each other again.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
import tempfile
from pathlib import Path

from gpu_run import ARCHIVE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="to write; what is in it is deleted")
    parser.add_argument("--donor", required=True, help="alias, folder or .gguf file")
    parser.add_argument("--small", type=Path, required=True, help="folder of a tiny donor")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="evaluation text")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, help="folder with the local evaluation sets")
    parser.add_argument("--wheels", type=Path, help="folder of the packages that the machine may lack")
    parser.add_argument("--trip", type=int, default=56, metavar="MIB", help="that are carried at once")
    asked = parser.parse_args()
    parts = {
        "donor": [model_files(asked.donor)],
        "small": [asked.small],
        "text": asked.text,
        "calibration": asked.calibration,
        "data": sorted(asked.data.glob("*")) if asked.data else [],
        "wheels": sorted(asked.wheels.glob("*.whl")) if asked.wheels else [],
    }
    trips = packed(parts, asked.folder, asked.trip << 20)
    print(f"{trips} trips of at most {asked.trip} MiB are in {asked.folder}")


def model_files(reference: str) -> Path:
    """The donor's folder or GGUF file, downloaded if necessary."""
    from mhconvert.convert.donor.donor import open_donor

    return open_donor(reference).model_files()


def packed(parts: dict[str, list[Path]], folder: Path, most: int) -> int:
    """Write `parts`, by the folder that they are to lie in, as pieces of one archive; returns the number of trips.

    Args:
        most: bytes of a trip.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / ARCHIVE
        with tarfile.open(archive, "w:xz", dereference=True) as opened:
            for name, paths in parts.items():
                for path in paths:
                    opened.add(path.resolve(), f"{name}/{path.name}")
        with archive.open("rb") as whole:
            trips = -(-archive.stat().st_size // most)
            for number in range(trips):
                place = folder / str(number + 1)
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{ARCHIVE}.{number:03}-of-{trips:03}").write_bytes(whole.read(most))
    return trips


if __name__ == "__main__":
    main()
