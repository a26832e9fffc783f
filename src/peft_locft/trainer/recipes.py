"""Settings that belong together: LocFT-BF as published, the one that holds in other words and moves little else, and
LocaEdit."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..edits import EditSet
from ..location import layers_from_tracing, trace_edits
from ..tuner import LocFTConfig, default_module, num_layers
from ..tuner.weights import language_tower
from .augmentation import subject_place


_PAPER = {
    "num_train_epochs": 25,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "contexts": 0,
    "margin": 0.0,
    "projector": 0.0,
    "output_projector": 0.0,
    "kl_weight": 0.0,
    "subject_focus": 0.0,
}
# By recipe, the fields of `EditConfig` that it sets where the user does not. How much `careful` decays depends on its steps.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "careful": {
        "num_train_epochs": 60,
        "lr_scheduler_type": "linear",
        "contexts": 12,
        "margin": 4.0,
        "projector": 0.03,
        "output_projector": 0.3,
        "kl_weight": 0.5,
        "subject_focus": 1.0,
    },
    "locaedit": _PAPER | {"kl_weight": 1.0, "learning_rate": 5e-3},
}
# How many times the automatic rate of a LocFT adapter, and how many edits make a step, at most. Behind a projector, 1,000 learned
# too slowly in steps of the paper's 100. What is learned at a few tokens only wants a little more, and half as many epochs again.
_RATE_FACTORS = {"careful": 0.85}
_FOCUSED_RATE, _FOCUSED_EPOCHS = 1.1, {"careful": 1.5}
MOST_EDITS = {"careful": 25}
# More edits take more steps, each of which moves the rest of the model as much: over 100, the rate falls as the cube root. That is
# enough for 300. With 1,000, perplexity and locality missed their aims by it, so that over 300 epochs, decay and the weight of
# the KL term grow as well, and the rate falls faster, by such powers of how many times 300 they are. Begun at 100, the same cost
# 300 edits too much generalization (docs/log.md).
_RATE_EDITS, _MANY = 100, 300
_RATE_POWER, _EPOCHS_POWER, _DECAY_POWER, _KL_POWER = -1 / 3, 1 / 2, 1 / 2, 0.6
# The exponent of what decay would leave of a change that is there from the first step on, where the rate falls to 0 in a line.
_DECAYED = {"careful": 1.6}
# What 100 edits have in 60 epochs. With 5 edits, which make 3 steps an epoch, 180 were too few (docs/log.md).
_LEAST_STEPS = {"careful": 240}
# Those that change what is learned, and are told with the results where they are on.
TERMS = (
    "contexts",
    "margin",
    "projector",
    "output_projector",
    "kl_weight",
    "subject_focus",
    "l2_weight",
    "max_delta",
    "max_growth",
)
# About the early peak of generalization that the paper's search found, layers 3 to 8 of 32 (section 4.2). On SmolLM2-135M,
# wider bands learned faster, but held less in other words and moved more beside the edits; so did later ones (docs/log.md).
_CAREFUL_DEPTHS = (3 / 30, 8 / 30)
# Tracing more facts than these hardly moves the mean.
_TRACED = 50
_RANK = 16


def recipe_config(
    recipe: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    edits: EditSet | None = None,
    needs_linear: bool = False,
    show_progress: bool = True,
) -> PeftConfig:
    """Return where and how a recipe trains, for a trainer that was given no `peft_config`.

    Args:
        recipe (`str`):
            One of `RECIPES`.
        model ([`~transformers.PreTrainedModel`]):
            The model to be edited.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer, for LocaEdit.
        edits ([`EditSet`], *optional*):
            The edits, for LocaEdit, which traces what the model knows about their subjects.
        needs_linear (`bool`, *optional*, defaults to `False`):
            Whether the training arguments have a term on that needs linear modules.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar while it does.

    Returns:
        [`~peft.PeftConfig`]: For `"paper"`, [`LocFTConfig.recommended`]; for `"careful"`, a [`LocFTConfig`] of a band of
        early layers; for `"locaedit"`, LoRA on the MLPs of the layers that causal tracing proposes.

    Raises:
        `ValueError`: If `"locaedit"` finds no edit that it can trace, or the model's MLPs are fused experts, which LoRA and the
            projector do not know.
    """
    if recipe == "paper":
        return LocFTConfig.recommended(model)
    if recipe == "careful":
        layers = careful_layers(num_layers(model.config) or 1)
        module = default_module(model, layers)
        if "experts" in module and needs_linear:
            raise ValueError(
                f"the recipe 'careful' puts projectors before and behind the MLPs' down projections, which are {module} in this "
                "model, fused experts that they do not know, and neither does a focus on subjects: give `projector=0`, "
                "`output_projector=0` and `subject_focus=0`, or a place among linear modules, such as "
                "attention's (`peft_config`, or `--layers` and `--target_modules`)"
            )
        config = LocFTConfig(layers=layers, target_modules=[module], task_type="CAUSAL_LM")
        config.set_reason("early layers, where edits hold best in other words, as the recipe 'careful' takes")
        return config
    facts = [edit for edit in edits if subject_place(edit) is not None][:_TRACED]
    if not facts:
        raise ValueError(
            f"the recipe 'locaedit' traces what the model knows about the edits' subjects: got {len(edits)} edits without a "
            "`subject` that stands in the prompt, expected some with one. Give subjects, or take another recipe"
        )
    # What the layers are proposed from, and no more: all of it took half an hour for 50 facts (docs/log.md).
    results = trace_edits(
        model, tokenizer, facts, kinds=["mlp"], roles=["last subject token"], show_progress=show_progress
    )
    layers = layers_from_tracing(results)
    module = default_module(model, layers)
    if "experts" in module:
        raise ValueError(
            f"the recipe 'locaedit' puts LoRA on the MLPs' down projections, which are {module} in this model, fused experts "
            "that LoRA does not know: take another recipe, or in Python a `peft_config`"
        )
    tower = language_tower(model)
    names = [name for name, _ in model.named_modules() if name.endswith(f".{module}")]
    return LoraConfig(
        r=_RANK,
        lora_alpha=2 * _RANK,
        target_modules=[module],
        layers_to_transform=layers,
        # LoRA takes the layers of every tower, such as one for images.
        exclude_modules=[name for name in names if tower and not name.startswith(f"{tower}.")] or None,
        task_type="CAUSAL_LM",
    )


def rate_factor(recipe: str | None, num_edits: int, focus: float = 0.0) -> float:
    """Return how many times the automatic rate of a LocFT adapter a recipe trains at.

    Args:
        recipe (`str`, *optional*):
            One of `RECIPES`.
        num_edits (`int`):
            How many edits there are.
        focus (`float`, *optional*, defaults to `0.0`):
            Of all the edits, how far they are learned at their subjects alone: `subject_focus`, times the share of those
            whose subjects were found.

    Returns:
        `float`: For `"careful"`, 0.85, over 100 edits, that times the cube root of 100 / edits, and over 300, times that of
        300 / edits as well; 1.1 times as much where all edits are learned at their subjects alone, and in between for a part
        of them. Else 1.
    """
    if recipe not in _RATE_FACTORS:
        return 1.0
    by_focus = 1 + (_FOCUSED_RATE - 1) * focus
    by_number = min(_RATE_EDITS / num_edits, 1.0) ** (1 / 3) * _by_many(recipe, num_edits, _RATE_POWER)
    return _RATE_FACTORS[recipe] * by_focus * by_number


def few_factor(recipe: str | None, num_edits: int) -> float:
    """Return how many times the rate of [`rate_factor`] few edits are trained at.

    Fewer than make a step are visited in each, and at the rate of 100 they leaked and moved unrelated answers. It stands apart
    because [`limited_learning_rate`], which has a rule of its own for few edits, compares with the rate before it.

    Args:
        recipe (`str`, *optional*):
            One of `RECIPES`.
        num_edits (`int`):
            How many edits there are.

    Returns:
        `float`: For `"careful"`, the cube root of edits / 25 under 25 edits. Else 1.
    """
    return min(num_edits / MOST_EDITS.get(recipe, 1), 1.0) ** (1 / 3)


def automatic_decay(recipe: str, num_edits: int, rate: float, steps: int) -> float:
    """Return the `weight_decay` of a LocFT adapter, where the user does not say.

    Args:
        recipe (`str`):
            One of `RECIPES`.
        num_edits (`int`):
            How many edits there are.
        rate (`float`):
            The learning rate that the run begins with.
        steps (`int`):
            How many steps it takes.

    Returns:
        `float`: For `"careful"`, 3.2 / (rate · steps), so that every run decays as much, and over 300 edits, that times the
        root of edits / 300; with three digits. Else 0.
    """
    decayed = _DECAYED.get(recipe, 0.0) * _by_many(recipe, num_edits, _DECAY_POWER)
    return float(f"{2 * decayed / (rate * steps):.3g}")


def kl_factor(recipe: str, num_edits: int) -> float:
    """Return how many times the recipe's `kl_weight` is in force, where the user does not say.

    Args:
        recipe (`str`):
            One of `RECIPES`.
        num_edits (`int`):
            How many edits there are.

    Returns:
        `float`: For `"careful"`, over 300 edits, (edits / 300) ** 0.6; with three digits. Else 1.
    """
    return float(f"{_by_many(recipe, num_edits, _KL_POWER):.3g}")


def recipe_epochs(recipe: str, num_edits: int, step: int, focus: float = 0.0) -> int:
    """Return how many epochs a recipe trains where the user does not say, so that few edits have steps enough, and many are
    learned at a low rate.

    Args:
        recipe (`str`):
            One of `RECIPES`.
        num_edits (`int`):
            How many edits there are.
        step (`int`):
            How many of them make a step.
        focus (`float`, *optional*, defaults to `0.0`):
            As in [`rate_factor`].

    Returns:
        `int`: The epochs of the recipe, and for `"careful"` as many as make 240 steps, if these are more, and over 300 edits,
        times the root of edits / 300; 1.5 times as many where all edits are learned at their subjects alone, and in
        between for a part of them.
    """
    steps = -(-num_edits // step)
    epochs = max(RECIPES[recipe]["num_train_epochs"], -(-_LEAST_STEPS.get(recipe, 0) // steps))
    by_focus = 1 + (_FOCUSED_EPOCHS.get(recipe, 1.0) - 1) * focus
    return round(epochs * by_focus * _by_many(recipe, num_edits, _EPOCHS_POWER))


def _by_many(recipe: str, num_edits: int, power: float) -> float:
    return max(num_edits / _MANY, 1.0) ** power if recipe == "careful" else 1.0


def careful_layers(count: int) -> list[int]:
    """Return the layers that the recipe `"careful"` edits.

    Args:
        count (`int`):
            How many layers the model has.

    Returns:
        `list[int]`: A band of early layers, counted from 0; at least one.
    """
    first, end = (round(depth * count) for depth in _CAREFUL_DEPTHS)
    return list(range(min(first, count - 1), max(end, first + 1)))
