"""Train on a quarter of the tokens of each batch, in a loop of your own.

    python examples/train_selected_tokens.py
    python examples/train_selected_tokens.py my-model

`pliant gradients audit` tells, for your model and data, whether that pays.
"""

import sys

import torch

import pliant
from pliant.gradients import GradientConfig

TEXTS = [f"What is {a} plus {b}? It is {a + b}." for a in range(2, 12) for b in range(2, 12)]
BATCH, STEPS = 10, 20


def main(names: list[str]) -> None:
    model, tokenizer = pliant.load(names[0] if names else "nano-s", dtype="float32")
    gradients = pliant.attach(model.train(), GradientConfig(ratio=0.25, warmup_steps=5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        texts = TEXTS[BATCH * step % len(TEXTS) :][:BATCH]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gradients.step()
        if step % 5 == 4:
            print(f"loss {loss.item():.3f}  {gradients}")
    gradients.detach()  # the model is a stock model, with the weights that were trained


if __name__ == "__main__":
    main(sys.argv[1:])
