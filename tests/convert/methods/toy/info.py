"""What the package knows of the method without importing it."""

from mhconvert.convert.methods.registry import ATTENTION_CHECKS, MethodInfo

INFO = MethodInfo(
    name="gqa",
    package="tests.convert.methods.toy",
    label="GQA",
    help="neighbouring K and V heads averaged",
    kind="layers",
    tag="grouped-query-attention",
    checks=(*ATTENTION_CHECKS, "normed_keys"),
    shrinks_cache=True,
    sizes=(("KV heads", "num_key_value_heads"),),
)
