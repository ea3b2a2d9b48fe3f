"""The configuration of a Llama whose layers have numbers of KV heads of their own, as engines read it (nemotron-nas).

Engines read `config.block_configs[i].attention.n_heads_in_group` as attributes, and no release of transformers knows
the type. This file is shipped inside exported checkpoints: it imports transformers and its siblings only.
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict):
    """A part of a block's configuration: a dictionary whose entries are attributes too."""

    def __init__(self, entries: dict[str, Any]):
        super().__init__({key: Block(e) if isinstance(e, dict) else e for key, e in entries.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __deepcopy__(self, memo: Any) -> "Block":
        return Block(self)


class DeciLMConfig(LlamaConfig):
    """Llama's fields, and for each layer {"attention": {"n_heads_in_group": query heads that read one KV head, …},
    "ffn": {"ffn_mult": its width as engines compute it, …}}."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **settings: Any):
        super().__init__(**settings)
        self.block_configs = [Block(block) for block in block_configs or []]
