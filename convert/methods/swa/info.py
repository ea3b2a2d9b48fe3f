"""What the package knows of windowed layers without importing the method."""

from ..method_info import ATTENTION_CHECKS, MethodInfo

INFO = MethodInfo(
    name="swa",
    package="mhconvert.convert.methods.swa",
    label="SWA",
    help="some layers see a window of recent tokens",
    kind="layers",
    tag="sliding-window-attention",
    checks=(*ATTENTION_CHECKS, "window_class"),
    shrinks_cache=True,
    row_tokens=4096,
    sizes=(("tokens that a layer caches at the context", "cached_tokens"),),
    totals=("windows",),
    no_forms="is a stock class of transformers already: the folder is what engines load",
)
