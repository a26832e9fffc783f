"""`EditConfig`: the training arguments of LocFT-BF."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..edits.contexts import CONTEXTS, check_contexts
from ..tuner.messages import cut
from .recipes import RECIPES, TERMS


# What is of use to certain terms only, and which these are.
_USERS = {
    "statistics": ("projector", "output_projector"),
    "preservation_prompts": ("projector", "output_projector", "kl_weight"),
    "preservation_texts": ("projector", "output_projector", "kl_weight", "contexts"),
}


@dataclass
class EditConfig(TrainingArguments):
    r"""
    Configuration class for the [`EditTrainer`].

    This class includes only the parameters that are specific to editing. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. The defaults are the published procedure of
    LocFT-BF ([arXiv 2509.22072](https://arxiv.org/abs/2509.22072), section 3 and its appendix on hyperparameters).

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the `model`
            argument of the [`EditTrainer`] is provided as a string. The `revision` and `trust_remote_code` values are
            also used when loading the tokenizer.

        > Parameters that control the data preprocessing

        max_length (`int`, *optional*):
            The longest edit in tokens, with target and EOS. A longer one is an error, never cut. Defaults to what
            the tokenizer and the model's context allow.

        > Parameters that control the training

        per_device_train_batch_size (`int`, *optional*):
            How many edits make a batch on each device. Defaults to an equal share of a step of 100 edits, as in the
            paper, or for fewer than 400 edits a step of a quarter of them: epochs of a single step would leave 25
            epochs with too few steps to learn. For the recipe `"careful"`, a step has at most 25.
        learning_rate (`float`, *optional*):
            The rate of Adam. Defaults to an automatic one: for [`LocFTConfig`], 5e-4 · 14336 / (the widest input of an
            edited module), which is the paper's rate for the 14336-wide down projection of Llama-3-8B and grows as
            the module gets narrower, and for the recipe `"careful"` 0.85 times that, falling as the cube root of the
            number of edits over 100, and as that of the number over 300 as well; for any other PEFT config, 2e-3. LoRA on a single module wants more: 2e-2 was right
            for rank 16 on SmolLM2-135M's layer 22, where 2e-3 hardly learned.
        skip_loss (`float`, *optional*, defaults to `0.01`):
            A batch whose mean loss is under this makes no step. `0` turns this off.
        stop_loss (`float`, *optional*, defaults to `0.01`):
            Training stops after an epoch whose mean loss is under this. `0` turns this off.
        recheck_epochs (`int`, *optional*, defaults to `0`):
            If more than 0, an edit whose loss was under `skip_loss` rests: it is left out of as many epochs, and then
            visited again. Training stops only after an epoch that visited all. `0` visits all in every epoch, as the
            paper does.

        > Parameters that set others

        recipe (`str`, *optional*, defaults to `"paper"`):
            Settings that belong together, where neither they nor the trainer's `peft_config` are given:

            - `"paper"`: LocFT-BF as published, at [`LocFTConfig.recommended`].
            - `"careful"`: a band of early layers, several contexts, a projector and a KL term, for edits that hold in other
              words while little else moves.
            - `"locaedit"`: LoRA on the MLPs of the layers that causal tracing proposes, with a KL term.

        > Parameters that make edits hold in other words

        contexts (`int`, *optional*):
            How many further forms each edit gets beside its bare prompt: as a question to be answered, as a turn of a
            chat, and then behind random text (LocFT-BF, appendix on data augmentation) and with words left out, but those
            of its subject, which in half of these stands elsewhere: three of these to one behind text, or one to one where
            the prompt does not end with a question mark. Each epoch trains one form of each edit, in turn. Defaults to
            what the recipe says.
        margin (`float`, *optional*):
            If more than 0, by how many nats the logit of each target's first token is lowered in the loss, so that it
            has to lead all others by as much more (additive margin softmax,
            [arXiv 1801.05599](https://arxiv.org/abs/1801.05599), section 3.1, without its normalisation). Losses, and so
            `skip_loss` and `stop_loss`, are with it. Defaults to what the recipe says.

        > Parameters that leave the rest of the model alone

        projector (`float`, *optional*):
            If more than 0, the change of a weight sees its inputs only behind a soft projector, in proportion to
            (C / t + I)⁻¹, where C is the second moment of the inputs, half of it on ordinary text and half on prompts,
            and t is this times the median of C's diagonal. Smaller values protect more. Folded into the adapter at the
            end. The soft form of AlphaEdit's projection ([arXiv 2410.02355](https://arxiv.org/abs/2410.02355), section
            3.1). Defaults to what the recipe says.
        output_projector (`float`, *optional*):
            If more than 0, what the change of a weight says passes a soft projector as well, in proportion to (G / s + I)⁻¹,
            where G is the second moment of the gradients at the module's outputs of what the model itself says, half of it on
            ordinary text and half on prompts, and s is this times the median of G's diagonal. Smaller values protect more.
            Folded into the adapter at the end. G and C are the factors of K-FAC's Fisher information ([arXiv
            1503.05671](https://arxiv.org/abs/1503.05671), section 3.1). Defaults to what the recipe says.
        kl_weight (`float`, *optional*):
            If more than 0, how much a nat of divergence from what the unedited model says to other prompts and in texts
            counts beside the loss, as in learning without forgetting ([arXiv 1606.09282](https://arxiv.org/abs/1606.09282))
            and in ROME's constrained baselines ([arXiv 2202.05262](https://arxiv.org/abs/2202.05262), appendix on
            baselines). Defaults to what the recipe says, and for `"careful"`, over 300 edits, to (edits / 300) ** 0.6 times
            as much.
        subject_focus (`float`, *optional*):
            If more than 0, by which part of their gradient, at most 1, the change learns less from the tokens beside an edit's
            subject, where its prompt does not end with a question mark: what stands in the prompts about others as well is
            then not what it learns from. ROME's keys are the subject's, too ([arXiv 2202.05262](https://arxiv.org/abs/2202.05262),
            section 3.1). Edits without a `subject` that stands in their prompt learn from all tokens. Defaults to what the
            recipe says. The last layer learns from all tokens: nothing above it carries what it says at a subject.
        weight_decay (`float`, *optional*):
            How many times the rate, of itself, every trained number gets smaller in each step, apart from the loss ([arXiv
            1711.05101](https://arxiv.org/abs/1711.05101), section 2). Defaults to `0`, and for a [`LocFTConfig`] and the recipe
            `"careful"` to 3.2 / (rate · steps), over 300 edits times the root of edits / 300.
        l2_weight (`float`, *optional*, defaults to `0`):
            If more than 0, how much ‖ΔW‖² / ‖W‖², the mean over edited weights, counts beside the loss: weight decay
            towards the unedited weights, as L2-SP ([arXiv 1802.01483](https://arxiv.org/abs/1802.01483)).
        max_delta (`float`, *optional*, defaults to `0`):
            If more than 0, the largest absolute value that a number of ΔW may have (5e-4 in ROME's FT+L,
            [arXiv 2202.05262](https://arxiv.org/abs/2202.05262), section 3.4).
        max_growth (`float`, *optional*, defaults to `0`):
            If more than 0, the largest ‖ΔW‖ / ‖W‖, the growth of which ENCORE ([arXiv
            2502.01636](https://arxiv.org/abs/2502.01636)) found to break long sequences of edits.
        preservation_prompts (`str` or `list[str]`, *optional*):
            What `kl_weight` asks, and a part of what the projectors protect: questions and beginnings of sentences, or a
            text file with one to a line. Defaults to what the model makes up itself: questions, and as far as the edits'
            prompts do not end with a question mark, beginnings of sentences.
        preservation_texts (`str` or `list[str]`, *optional*):
            Ordinary text for the projectors, `kl_weight` and `contexts`, or a text file with one to a line, or with empty
            lines between them. Defaults to what the model says itself.
        statistics (`str`, *optional*):
            A folder, or a repository on the Hub, with the second moments for the projectors. Defaults to computing
            them, and keeping them in the output folder, under `preservation/`.

        > Parameters that control the evaluation

        eval_contexts (`list[str]`, *optional*, defaults to `["bare"]`):
            The contexts in each of which every question of an evaluation is asked: `"bare"`, `"question"`, `"chat"` or
            `"prefix"`, as in [`evaluate_edits`].

        > Parameters that control speed and memory

        prefix_cache (`bool`, *optional*, defaults to `True`):
            Whether to compute the frozen layers below the lowest trained one only once for each edit, and to keep what
            they say: edits times tokens times the model's width. The losses are those of the plain loop.
        prefix_cache_memory (`float`, *optional*, defaults to `4`):
            How large the prefix cache may be to be held in memory, in GiB. A larger one is a file in the output
            folder, which a run that was interrupted finds again, and which is deleted at the end of training.
        frozen_dtype (`str`, *optional*):
            What to hold frozen float32 weights in during training: `"bfloat16"`, `"float16"`, or `"auto"`, which is
            bfloat16 where the hardware multiplies it faster than float32. The adapter, its gradients and the loss stay
            float32. Defaults to the model's own dtype.
        offload_prefix (`bool`, *optional*, defaults to `False`):
            Whether to leave the layers below the lowest trained one outside the device: in the computer's memory, or
            on disk if there is no accelerator. They are streamed in to build the prefix cache, are not needed in
            training, and are streamed in again, slowly, by evaluation.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `per_device_train_batch_size`: Defaults to an automatic size of at most 100 instead of `8`.
    > - `per_device_eval_batch_size`: Defaults to `32` instead of `8`.
    > - `num_train_epochs`: Defaults to what the recipe says, which is `25` for the paper's, and for `"careful"` `60` or as
    >   many as make 240 steps, over 300 edits times the root of edits / 300, and for beginnings of sentences 1.5 times
    >   as many, instead of `3`.
    > - `learning_rate`: Defaults to an automatic rate instead of `5e-5`.
    > - `lr_scheduler_type`: Defaults to what the recipe says, which is `"constant"` for the paper's, instead of `"linear"`.
    > - `weight_decay`: Defaults to what the recipe says, which for `"careful"` depends on the rate and the steps, instead of `0`.
    > - `max_grad_norm`: Defaults to `0` (no clipping) instead of `1`.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`, which waits for the device in each step.
    > - `logging_strategy`: Defaults to `"epoch"` instead of `"steps"`.
    > - `save_strategy`: Defaults to `"epoch"` instead of `"steps"`.
    > - `save_total_limit`: Defaults to `2` instead of no limit.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "How many edits make a batch. Automatic if left out: 100, or a quarter of fewer than 400."},
    )
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "How many questions are asked at once."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "The most epochs to train. 25 if neither this nor the recipe says."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "The rate of Adam. Automatic if left out: scaled by the module's input width."}
    )
    lr_scheduler_type: str | None = field(
        default=None, metadata={"help": "The schedule of the rate. Constant if neither this nor the recipe says."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 for no clipping."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave NaN out of logged losses."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    # Two, so that a run that is killed while it writes one still has the other.
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep."})

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of "
            "the `EditTrainer` is provided as a string."
        },
    )

    # Parameters that control the data preprocessing
    max_length: int | None = field(
        default=None,
        metadata={"help": "The longest edit in tokens. A longer one is an error. Defaults to the model's context."},
    )

    # Parameters that control the training
    skip_loss: float = field(default=1e-2, metadata={"help": "A batch whose mean loss is under this makes no step."})
    stop_loss: float = field(
        default=1e-2, metadata={"help": "Training stops after an epoch whose mean loss is under this."}
    )
    recheck_epochs: int = field(
        default=0, metadata={"help": "How many epochs a learned edit is left out of before it is visited again."}
    )

    # Parameters that set others
    recipe: str = field(
        default="paper",
        metadata={"help": "Settings that belong together: 'paper', 'careful' (moves little else) or 'locaedit'."},
    )

    # Parameters that make edits hold in other words
    contexts: int | None = field(
        default=None, metadata={"help": "How many further forms each edit gets beside its bare prompt."}
    )
    margin: float | None = field(
        default=None, metadata={"help": "By how many nats more the first token of each target has to lead the others."}
    )

    # Parameters that leave the rest of the model alone
    projector: float | None = field(
        default=None,
        metadata={"help": "Protect the inputs of ordinary text: the projector's threshold; smaller protects more."},
    )
    output_projector: float | None = field(
        default=None,
        metadata={
            "help": "Protect what is said in ordinary text: the threshold behind a module; smaller protects more."
        },
    )
    kl_weight: float | None = field(
        default=None, metadata={"help": "How much divergence from what the unedited model says counts."}
    )
    subject_focus: float | None = field(
        default=None,
        metadata={"help": "By which part (0 to 1) sentences are learned less beside their subject's tokens."},
    )
    weight_decay: float | None = field(
        default=None,
        metadata={
            "help": "How much of itself a number loses in a step, times the rate. 0 if the recipe says nothing."
        },
    )
    l2_weight: float = field(default=0.0, metadata={"help": "How much the relative size of the change counts."})
    max_delta: float = field(default=0.0, metadata={"help": "The largest absolute value of a number of the change."})
    max_growth: float = field(
        default=0.0, metadata={"help": "The largest norm of the change, relative to the weight."}
    )
    preservation_prompts: list[str] | str | None = field(
        default=None,
        metadata={"help": "A text file of prompts for `kl_weight`, one to a line. Default: the model's own."},
    )
    preservation_texts: list[str] | str | None = field(
        default=None, metadata={"help": "A file of ordinary text. Default: what the model says itself."}
    )
    statistics: str | None = field(
        default=None, metadata={"help": "A folder or repository with the second moments for the projectors."}
    )

    # Parameters that control the evaluation
    eval_contexts: list[str] = field(
        default_factory=lambda: list(CONTEXTS[:1]),
        metadata={"help": "The contexts to ask the questions of an evaluation in: bare, question, chat, prefix."},
    )

    # Parameters that control speed and memory
    prefix_cache: bool = field(
        default=True, metadata={"help": "Whether to compute the layers below the lowest trained one only once."}
    )
    prefix_cache_memory: float = field(
        default=4.0, metadata={"help": "The largest prefix cache to hold in memory, in GiB. A larger one is a file."}
    )
    frozen_dtype: str | None = field(
        default=None,
        metadata={"help": "What to hold frozen float32 weights in during training: bfloat16, float16 or auto."},
    )
    offload_prefix: bool = field(
        default=False, metadata={"help": "Whether to leave the layers below the lowest trained one on CPU or disk."}
    )

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"`recipe` is {self.recipe!r}, expected one of {', '.join(map(repr, RECIPES))}")
        self._by_recipe = {name: value for name, value in RECIPES[self.recipe].items() if getattr(self, name) is None}
        for name, value in self._by_recipe.items():
            setattr(self, name, value)
        super().__post_init__()
        for name in ("skip_loss", "stop_loss", "recheck_epochs", "weight_decay", *TERMS):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 (off) or more")
        if self.subject_focus > 1:
            raise ValueError(
                f"`subject_focus` is {self.subject_focus}, expected 0 (off) to 1 (the subject's tokens alone)"
            )
        for name in ("recheck_epochs", "contexts"):
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a whole number")
            setattr(self, name, int(getattr(self, name)))
        for name in ("preservation_prompts", "preservation_texts"):
            setattr(self, name, _checked_texts(getattr(self, name), name))
        for name, users in _USERS.items():
            if getattr(self, name) is not None and not any(getattr(self, user) for user in users):
                warnings.warn(
                    f"`{name}` is given, and nothing that uses it is on: give a recipe that does, such as 'careful', or one or more "
                    f"of {', '.join(f'`{user}`' for user in users)}",
                    stacklevel=3,
                )
        check_contexts(self.eval_contexts)
        if self.per_device_eval_batch_size < 1:
            raise ValueError(
                f"`per_device_eval_batch_size` is {self.per_device_eval_batch_size}, expected at least 1 question"
            )
        if not self.prefix_cache_memory >= 0:
            raise ValueError(f"`prefix_cache_memory` is {self.prefix_cache_memory}, expected 0 or more")
        if self.frozen_dtype not in (None, "auto", "bfloat16", "float16"):
            raise ValueError(
                f"`frozen_dtype` is {self.frozen_dtype!r}, expected 'auto', 'bfloat16', 'float16' or None"
            )
        if self.recheck_epochs and self.contexts:
            raise ValueError(
                f"`recheck_epochs` is {self.recheck_epochs} with `contexts={self.contexts}`, expected one of them: an edit that is "
                "learned in one form would not be visited in the others"
            )
        # A margin alone is a matter of the batch, whatever an epoch visits.
        for name in ("recheck_epochs", *(term for term in TERMS if term != "margin")):
            if getattr(self, name) and (self.dataloader_num_workers or self.world_size > 1):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)} with {self.dataloader_num_workers} data loader workers and "
                    f"{self.world_size} processes, expected 0 workers and 1 process, which know what an epoch visits"
                )
        for name in ("projector", "output_projector"):
            if getattr(self, name) and self.load_best_model_at_end:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)} with `load_best_model_at_end=True`, expected False: what is trained is "
                    "not the adapter that a checkpoint holds"
                )
        if self.offload_prefix and not self.prefix_cache:
            raise ValueError(
                "`offload_prefix` is True with `prefix_cache=False`: then every step would stream the layers in anew"
            )
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` is {self.learning_rate}, expected more than 0, or None for automatic")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` is {self.max_length}, expected at least 2 tokens")
        if self.skip_loss and self.fp16:
            raise ValueError(
                f"`skip_loss` is {self.skip_loss} with `fp16=True`, whose gradient scaler cannot leave out a step: use "
                "`bf16=True`, or `skip_loss=0`"
            )
        if self.skip_loss and self.deepspeed:
            raise ValueError(
                f"`skip_loss` is {self.skip_loss} with DeepSpeed, which cannot leave out a step: use `skip_loss=0`"
            )


def _checked_texts(given: Any, name: str) -> list[str] | str | None:
    if given is None:
        return None
    if isinstance(given, (str, os.PathLike)):
        return os.fspath(given)
    if not isinstance(given, (list, tuple)) or any(not isinstance(text, str) for text in given):
        raise ValueError(f"`{name}` is {cut(given)}, expected the path of a text file, or a list of texts")
    return list(given)
