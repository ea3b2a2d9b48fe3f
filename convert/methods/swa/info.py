"""What the package knows of windowed layers without importing the method."""

from typing import Any

from ..method_info import MethodInfo


def telling_row(config: Any, settings: Any) -> int:
    """Twice the window: half of the tokens of a row then lack some of the text."""
    from .window_plan import asked_window, every_layer_windowed

    return 2 * every_layer_windowed(config, asked_window(config, settings), settings.context).window


INFO = MethodInfo(
    name="swa",
    package="mhconvert.convert.methods.swa",
    label="SWA",
    help="some layers see a window of recent tokens",
    kind="layers",
    tag="sliding-window-attention",
    shrinks_cache=True,
    layer_kind="windowed",
    row_tokens=4096,
    telling_row=telling_row,
    sizes=(("tokens that a layer caches at the context", "cached_tokens"),),
    totals=("windows",),
    no_forms="has no other form: with sinks learnt or none its folder is what engines load, and no engine keeps the "
    "first tokens of --sinks first",
)
