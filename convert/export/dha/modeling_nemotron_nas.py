"""A Llama whose layers have numbers of KV heads of their own, as plain transformers runs it (nemotron-nas).

Engines have classes of their own for it and read the configuration alone. This file is shipped inside exported
checkpoints: it imports transformers and its siblings only.
"""

import copy

from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .configuration_nemotron_nas import DeciLMConfig


class DeciLMModel(LlamaModel):
    """Llama's decoder; each layer is made by its own block's configuration."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig):
        super().__init__(config)
        for index, block in enumerate(config.block_configs):
            own = copy.copy(config)
            own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
            layer = LlamaDecoderLayer(own, index)
            layer.self_attn.config = config  # which says what kind of kernel is used
            self.layers[index] = layer
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    """The same with its language-model head."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig):
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()
