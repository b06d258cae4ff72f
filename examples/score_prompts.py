"""Put a scorer on each of some models, score prompts, and answer them in the same pass.

    python examples/score_prompts.py
    python examples/score_prompts.py smollm2-135m my-folder

A new scorer is undecided (0.5); `pliant train scorer` trains one on prompts of your own.
"""

import sys

import torch

from pliant import CPXCausalLM, CPXTokenizer

PROMPTS = ["What is 2 + 2? [CPX]", "Prove that there are infinitely many primes. [CPX]"]


def compare(names: list[str]) -> None:
    """What a scorer adds to each model."""
    print(f"{'model':20} {'width':>6} {'layers':>6} {'parameters':>12} {'trained':>8}")
    for name in names:
        model = CPXCausalLM.from_pretrained(name, num_labels=1)
        config = model.base_model.config.get_text_config()
        trained = sum(p.numel() for p in model.params_to_train)
        size = sum(p.numel() for p in model.parameters()) - trained
        print(
            f"{name:20} {config.hidden_size:6} {config.num_hidden_layers:6} {size:12,} {trained:8,}"
        )


def score(name: str) -> None:
    """The wrapper's own call: the scorer's logits, and the base's output for the prompts."""
    tokenizer = CPXTokenizer.from_pretrained(name)
    model = CPXCausalLM.from_pretrained(
        name, cpx_token_id=tokenizer.cpx_token_id, tokenizer_size=len(tokenizer)
    )
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits, outputs = model(**inputs)
    for prompt, probability in zip(PROMPTS, torch.sigmoid(logits[:, 0]), strict=True):
        print(f"P(hard) {probability:.3f}  {prompt}")
    print("first new tokens:", tokenizer.batch_decode(outputs.logits[:, -1:].argmax(-1)))
    answers = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8
    )
    print("answers:", answers.texts, "scored again:", answers.scores.score)


def main(names: list[str]) -> None:
    names = names or ["nano-s", "nano-l"]
    compare(names)
    for name in names:
        print(f"\n{name}")
        score(name)


if __name__ == "__main__":
    main(sys.argv[1:])
