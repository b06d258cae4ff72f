"""`python -m pliant.experts`, the seed's example: an expert for a mocked maths domain."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from pliant.cli import terminal

PROMPTS = 256
SAMPLE = "what is 58+67?"
LONGEST_ANSWER = 24


@dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    model_name: str = "nano-l"
    """An embedded model, a folder, or a name on the hub."""
    output_dir: Path = Path("outputs")
    """The folder of the expert and of its checkpoints."""
    logging_dir: Path = Path("logs")
    """The folder of the log: log.jsonl, and TensorBoard's if that is installed."""
    batch_size: Annotated[int, Ge(1)] = 4
    """Prompts a step; each is answered eight times."""
    max_epochs: Annotated[int, Ge(1)] = 1
    """Passes over the prompts, on average."""
    learning_rate: float = 0.01
    """Of Adam, which moves z by about this much in a step; z starts at 1."""
    resume: bool = False
    """Resume from the last complete checkpoint in the output folder."""


def example(options: ExampleOptions) -> None:
    """Train an expert for a mocked maths domain by reward, and answer a sample question with it.

    In the end the model classifies the question itself, to choose between the expert and the base.

    Example: python -m pliant.experts --model_name nano-l --output_dir outputs
    """
    from peft import PeftModel

    from pliant.experts.adapting import ByPrompt
    from pliant.experts.facade.ppo import SVF_PPOTrainer, check_logging_dir
    from pliant.experts.training.answers import greedy_answers
    from pliant.experts.training.config import ExpertTrainingConfig
    from pliant.experts.training.task import prompt_ids
    from pliant.loading import load

    terminal.hide_loading_bars()
    config = ExpertTrainingConfig(
        learning_rate=options.learning_rate,
        prompts=options.batch_size,
        max_new_tokens=LONGEST_ANSWER,
    )
    check_logging_dir(options.logging_dir)
    config.arguments(options.output_dir)  # report mistakes before anything is loaded
    model, tokenizer = load(options.model_name)

    def answer(asked: object) -> str:
        ids = [prompt_ids(SAMPLE, tokenizer, True, "the sample")]
        return str(
            tokenizer.decode(
                greedy_answers(asked, ids, LONGEST_ANSWER, tokenizer)[0], skip_special_tokens=True
            )
        )

    before = answer(model)
    trainer = SVF_PPOTrainer(
        model,
        tokenizer,
        config,
        output_dir=options.output_dir,
        logging_dir=options.logging_dir,
        batch_size=options.batch_size,
    )
    prompts, answers = mocked_maths(PROMPTS)
    result = trainer.train_on_prompts(
        prompts, answers, max_epochs=options.max_epochs, resume=options.resume
    )
    terminal.print_text(str(result))
    adapted = PeftModel.from_pretrained(model, str(options.output_dir), adapter_name="maths")
    terminal.print_text(f"{SAMPLE} before: {before!r}; with the expert: {answer(adapted)!r}")
    strategy = ByPrompt(adapted.eval(), tokenizer, {"maths": "a sum or a product of numbers"})
    terminal.print_text(f"The model's own choice for this question: {strategy.choose([SAMPLE])[0]}")


def mocked_maths(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Sums and products, and their results."""
    rng = random.Random(seed)
    prompts, answers = [], []
    for i in range(count):
        a, b, c = rng.randint(10, 999), rng.randint(2, 99), rng.randint(2, 9)
        text, result = (f"{a}+{b}", a + b) if i % 2 else (f"{a}*{c}", a * c)
        prompts.append(f"what is {text}?")
        answers.append(str(result))
    return prompts, answers
