"""LocFT in a plain transformers.Trainer: for those who have a training script already.

python examples/plain_trainer.py MODEL [OUTPUT]
"""

import sys

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_locft import LocFTConfig, load_edits


model_name, output = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "plain_trainer_output"
tokenizer = AutoTokenizer.from_pretrained(model_name)
base = AutoModelForCausalLM.from_pretrained(model_name)
# The recommended place; LocFTConfig(layers=[22], task_type="CAUSAL_LM") would name another one.
model = get_peft_model(base, LocFTConfig.recommended(base))
model.print_trainable_parameters()

rows = []
for edit in load_edits("examples/edits.jsonl")[:8]:
    prompt = tokenizer(edit.prompt)["input_ids"]
    tokens = tokenizer(f"{edit.prompt} {edit.target}")["input_ids"] + [tokenizer.eos_token_id]
    # The loss is on the target and its end token only.
    rows.append({"input_ids": tokens, "labels": [-100] * len(prompt) + tokens[len(prompt) :]})

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=8,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_strategy="epoch",
        save_strategy="no",
    ),
    train_dataset=rows,
)
trainer.train()
trainer.save_model()
