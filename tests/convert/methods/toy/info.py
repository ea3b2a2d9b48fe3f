"""What the package knows of the method without importing it."""

from mhconvert.convert.methods.registry import MethodInfo

INFO = MethodInfo(
    name="gqa",
    package="tests.convert.methods.toy",
    label="GQA",
    help="neighbouring K and V heads averaged",
    kind="layers",
    tag="grouped-query-attention",
    shrinks_cache=True,
    sizes=(("KV heads", "num_key_value_heads"),),
)
