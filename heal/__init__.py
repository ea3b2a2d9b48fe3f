"""Training that repairs a converted model, layer-local or end to end. Open `run.py` first.

The module can be called: `mhconvert.heal(checkpoint, settings)`.
"""

from mhconvert.callable_module import make_callable

make_callable(__name__, "mhconvert.api")
