"""`accelerate launch -m mhconvert.heal CKPT …`: the command `mhconvert heal`, in several processes."""

from __future__ import annotations

import os
import sys

from mhconvert.cli.main import main

if __name__ == "__main__":
    sys.argv[1:] = ["heal", *sys.argv[1:]]
    if int(os.environ.get("RANK", "0")):  # the first process speaks for all
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main()
