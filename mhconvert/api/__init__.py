"""The public functions, one for each command that makes or measures a model; donors and recipes are data.

They compose the pass with healing, evaluation and the Hub, and import torch when they are called.
"""

from mhconvert.api.conversion import convert, curve, plan
from mhconvert.api.derived import export, merge, push, serving, verify
from mhconvert.api.healing import heal
from mhconvert.api.measurement import bench, evaluate, generate, inspect

__all__ = [
    "bench",
    "convert",
    "curve",
    "evaluate",
    "export",
    "generate",
    "heal",
    "inspect",
    "merge",
    "plan",
    "push",
    "serving",
    "verify",
]
