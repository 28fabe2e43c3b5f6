"""LoRA (arXiv:2106.09685), and QLoRA (arXiv:2305.14314) over a base in NF4."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dtrain.config.methods import Lora
from dtrain.methods.adapter import AdapterMethod


class LoraMethod(AdapterMethod[Lora]):
    """Two matrices of rank r added to each adapted linear layer."""

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        assert tensor.dim() == 2 and ("lora_A" in name or "lora_B" in name), name
        if "lora_A" in name:  # as in PEFT; B stays zero
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
