"""What the package knows of MLA without importing it."""

from ..method_info import Form, MethodInfo

EXPORT = "mhconvert.convert.export.mla"
INFO = MethodInfo(
    name="mla",
    package="mhconvert.convert.methods.mla",
    label="MLA",
    help="latent attention",
    kind="layers",
    tag="multi-head-latent-attention",
    shrinks_cache=True,
    caches_key_scales=True,
    sizes=(
        ("latent width", "kv_lora_rank"),
        ("rotary key width", "qk_rope_head_dim"),
        ("key width without RoPE", "qk_nope_head_dim"),
        ("bytes of a code", "kv_code_bytes"),
    ),
    forms=(
        Form("deepseek_v3", f"{EXPORT}.to_deepseek_v3"),
        Form("youtu", f"{EXPORT}.to_deepseek_v3"),
        Form("own", f"{EXPORT}.to_own"),
        Form("gguf", f"{EXPORT}.to_gguf", automatic=False, engine="llama.cpp"),
    ),
    exported_from="what --to mla --profile portable makes",
)
