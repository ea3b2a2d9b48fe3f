"""What the package knows of coded latents with windows without importing the method."""

from ..method_info import MethodInfo
from ..swa.info import INFO as WINDOWS

INFO = MethodInfo(
    name="mla+swa",
    package="mhconvert.convert.methods.mla_swa",
    label="MLA + SWA",
    help="coded latents, in some layers of recent tokens alone",
    kind="layers",
    tag="multi-head-latent-attention",
    shrinks_cache=True,
    layer_kind="windowed",
    row_tokens=WINDOWS.row_tokens,
    telling_row=WINDOWS.telling_row,
    sizes=(
        ("bytes of a code", "kv_code_bytes"),
        ("latent width", "kv_lora_rank"),
        ("tokens that a layer caches at the context", "cached_tokens"),
    ),
    totals=("windows",),
    no_forms="has no other form: no engine reads codes",
)
