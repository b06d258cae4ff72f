"""Train an expert: one number for each singular value, saved alone and merged into a stock model.

    python examples/specialist.py
    python examples/specialist.py my-model my-folder

Without a second argument it writes to a new temporary folder.
Here it learns from solved questions; `pliant expert train` learns from reward alone.
"""

import sys
import tempfile
from pathlib import Path

import torch

import pliant
from pliant.experts import Expert, SVFConfig, merge

QUESTIONS = [f"{a} & {b} =" for a in range(2, 8) for b in range(2, 8)]
ANSWERS = [f" {a + b}" for a in range(2, 8) for b in range(2, 8)]


def main(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "nano-s"
    folder = Path(arguments[1] if arguments[1:] else tempfile.mkdtemp())
    base, tokenizer = pliant.load(name, dtype="float32")
    model = pliant.attach(base, SVFConfig(parts="mlp"), name="sums")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    batch = tokenizer(
        [question + answer for question, answer in zip(QUESTIONS, ANSWERS, strict=True)],
        return_tensors="pt",
        padding=True,
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for step in range(20):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 in (0, 9):
            print(f"step {step}: loss {loss.item():.3f}")
    expert = Expert.of(model, "sums")
    expert.save(folder / "sums")
    print(expert)
    print(f"half of it: {0.5 * expert}")
    print(merge(folder / "sums", folder / "sums-model", base=name))


if __name__ == "__main__":
    main(sys.argv[1:])
