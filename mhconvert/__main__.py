"""`python -m mhconvert …`, also in several processes: `accelerate launch -m mhconvert heal CKPT …`."""

from __future__ import annotations

import os

from mhconvert.cli.main import main

if __name__ == "__main__":
    if int(os.environ.get("RANK", "0")):  # the first process prints for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main()
