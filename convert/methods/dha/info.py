"""What the package knows of DHA without importing it."""

from ..method_info import ATTENTION_CHECKS, Form, MethodInfo

EXPORT = "mhconvert.convert.export.dha"
INFO = MethodInfo(
    name="dha",
    package="mhconvert.convert.methods.dha",
    label="DHA",
    help="fewer K and V heads",
    kind="layers",
    tag="decoupled-head-attention",
    checks=ATTENTION_CHECKS,
    shrinks_cache=True,
    sizes=(("K and V heads", "kv_heads"), ("K heads", "k_heads"), ("V heads", "v_heads")),
    totals=("equal_heads_cost",),
    forms=(Form("llama", f"{EXPORT}.to_llama"), Form("nemotron-nas", f"{EXPORT}.to_nemotron_nas")),
    exported_from="what --to dha makes",
)
