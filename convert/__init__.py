"""The conversion pass and the methods. Open `pipeline.py` first.

The module can be called: `mhconvert.convert(recipe)`.
"""

from mhconvert.callable_module import make_callable

make_callable(__name__, "mhconvert.api")
