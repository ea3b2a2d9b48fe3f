"""What the package knows of MoH without importing it."""

from ..method_info import MethodInfo

INFO = MethodInfo(
    name="moh",
    package="mhconvert.convert.methods.moh",
    label="MoH",
    help="some heads a token",
    kind="layers",
    tag="mixture-of-heads",
    sizes=(("heads of a token", "active_heads"), ("heads of every token", "shared_heads")),
    totals=("active_heads", "kv_heads_read", "attention_flops"),
    no_forms="routes its heads, which no stock class does: it is served by its own class alone, with "
    "trust_remote_code, as the folder is",
)
