"""A whole run as one file: convert, heal, evaluate, export, push. Open `stages.py` first.

The module can be called: `mhconvert.run(recipe)`.
"""

from mhconvert.callable_module import make_callable

make_callable(__name__, "mhconvert.run.run_recipe")
