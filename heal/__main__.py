"""`accelerate launch -m mhconvert.heal CKPT …`, the older form of `-m mhconvert heal CKPT …`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "heal")
    runpy.run_module("mhconvert", run_name="__main__", alter_sys=True)
