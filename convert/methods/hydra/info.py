"""What the package knows of Hydra without importing it."""

from ..method_info import MODEL_CHECKS, Form, MethodInfo

INFO = MethodInfo(
    name="hydra",
    package="mhconvert.convert.methods.hydra",
    label="Hydra",
    help="an untrained adapter beside DONOR",
    kind="adapter",
    tag="hydra",
    checks=MODEL_CHECKS,
    forms=(Form("lora", "mhconvert.convert.export.to_lora"),),
    exported_from="an adapter of --to hydra",
)
