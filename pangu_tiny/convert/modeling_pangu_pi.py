"""LLaMA with the modules of PanGu-π (arXiv 2312.17276), for `transformers`.

export-hf of pangu_tiny puts this file beside the weights; `transformers` runs it where it is told
trust_remote_code=True. Apache License 2.0.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention


class PanguPiConfig(LlamaConfig):
    """That of LLaMA, and:

    series_terms: terms of the series activation; 1 is SiLU alone.
    shortcut_ratio: hidden_size over the bottleneck of the augmented shortcut; 0 is none.
    """

    model_type = "pangu_pi"
    series_terms: int = 1
    shortcut_ratio: int = 0

    def validate_architecture(self):
        """Heads need not divide the width: head_dim says how large they are."""


class SeriesSiLU(nn.Module):
    """Σᵢ SiLU(aᵢ ⊙ x + bᵢ), per channel."""

    def __init__(self, terms, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(terms, channels))
        self.bias = nn.Parameter(torch.zeros(terms, channels))

    def forward(self, x):
        return sum(
            nn.functional.silu(x * scale + bias)
            for scale, bias in zip(self.scale, self.bias, strict=True)
        )


class AugmentedShortcut(nn.Module):
    """B·GELU(A·x), beside attention."""

    def __init__(self, width, bottleneck):
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, width, bias=False)

    def forward(self, x):
        return self.up(nn.functional.gelu(self.down(x), approximate="tanh"))


class PanguPiAttention(LlamaAttention):
    """What it reads is normed; the shortcut reads the same."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.shortcut = AugmentedShortcut(width, width // config.shortcut_ratio)

    def forward(self, hidden_states, *args, **kwargs):
        mixed, *others = super().forward(hidden_states, *args, **kwargs)
        return mixed + self.shortcut(hidden_states), *others


class PanguPiForCausalLM(LlamaForCausalLM):
    config_class = PanguPiConfig

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            if config.shortcut_ratio:
                layer.self_attn = PanguPiAttention(config, index)
            if config.series_terms > 1:
                layer.mlp.act_fn = SeriesSiLU(config.series_terms, config.intermediate_size)
        self.post_init()
