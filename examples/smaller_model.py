"""Remove a quarter of a model's channels, let the others take over, and leave as a stock model.

    python examples/smaller_model.py
    python examples/smaller_model.py my-model smaller

Without a second argument it writes to a new temporary folder.

`pliant prune` does the same within a budget over channels, heads and layers, from your own text.
"""

import sys
import tempfile

import pliant
from pliant import nano
from pliant.structure import PruneConfig, calibration_batches, export, perplexity, prune


def main(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "nano-s"
    folder = arguments[1] if arguments[1:] else f"{tempfile.mkdtemp()}/smaller-model"
    model, tokenizer = pliant.load(name)
    print(pliant.Anatomy.of(model))
    text = nano.conversations("train", 100)  # in place of text of your own
    test, *calibration = calibration_batches(text, tokenizer, tokens=1000, length=128)
    print(f"perplexity {perplexity(model, [test]):.3f}")
    for score in ("random", "error"):
        pruned = prune(model, calibration, PruneConfig(channels=0.25, score=score))
        print(f"perplexity {perplexity(model, [test]):.3f}: {pruned}, by {score}")
        if score == "random":
            pruned.detach()  # the base was never edited
    result = export(model, folder, tokenizer)
    smaller, _ = pliant.load(folder)
    print(f"{folder}: {pliant.Anatomy.of(smaller)}; logits differ by {result.difference:.2g}")


if __name__ == "__main__":
    main(sys.argv[1:])
