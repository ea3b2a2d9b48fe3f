"""What the package knows of hybrids without importing the method."""

from ..method_info import ATTENTION_CHECKS, MethodInfo

INFO = MethodInfo(
    name="hybrid",
    package="mhconvert.convert.methods.hybrid_mla",
    label="Hybrid",
    help="some layers linear, with a state of fixed size; coded latents in the others",
    kind="layers",
    tag="linear-attention",
    checks=(*ATTENTION_CHECKS, "own_windows"),
    exact=False,
    shrinks_cache=True,
    layer_kind="linear",
    sizes=(
        ("bytes of a code", "kv_code_bytes"),
        ("latent width", "kv_lora_rank"),
        ("bytes of a state", "state_bytes"),
    ),
    totals=("states",),
    no_forms="has no other form: bailing_hybrid, kimi_linear, granitemoehybrid and nemotron_h hold no coded latents "
    "beside their linear layers (docs/methods/hybrid.md says what else each lacks)",
)
