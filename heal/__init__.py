"""Fine-tuning of converted models, layer by layer or end to end. `run.py` is the entry point.

The module is callable: `mhconvert.heal(checkpoint, settings)`.
"""

from mhconvert.callable_module import make_callable

make_callable(__name__, "mhconvert.api")
