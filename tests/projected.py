"""Texts and models that tests of projectors share."""

import torch
from peft import LoraConfig

from peft_locft import LocFTConfig


TEXTS = [
    "The capital of Peru is Lima. Peru is",
    "Kenya",
    "What is the capital of Norway? Oslo is the capital of Norway.",
]
CONFIGS = {
    "locft": LocFTConfig(layers=[1, 2], target_modules=["mlp.down_proj", "self_attn.o_proj"]),
    "lora": LoraConfig(r=4, target_modules=["down_proj", "o_proj"], layers_to_transform=[1, 2]),
}


def randomise(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1


def logits(model, tokenizer, text="The capital of Cuba is Havana"):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits
