"""The embedded models are what their cards say, and load anywhere as stock checkpoints."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pliant import nano
from pliant.errors import ModelNotFound
from pliant.nano.evaluate.__main__ import Accuracy, card_questions, table

SMALL, LARGE = nano.NAMES


@pytest.fixture(scope="module")
def answers() -> dict[str, Accuracy]:
    """Both models' answers to the same 2,000 test questions (not those of the card)."""
    asked = tuple(nano.questions("test", 2_000, seed=1))
    found = {}
    for name in nano.NAMES:
        said = nano.ask(*nano.load(name), [q.prompt for q in asked])
        found[name] = Accuracy(asked, tuple(q.check(s) for q, s in zip(asked, said, strict=True)))
    return found


@pytest.mark.parametrize("name", nano.NAMES)
def test_accuracy_is_that_of_the_card(answers, name):
    written = json.loads((nano.path(name) / "accuracy.json").read_text())
    assert written["questions"] >= 5_000
    # Four standard errors of a share over 2,000 questions.
    assert abs(answers[name].share() - written["accuracy"]) < 4 * (0.25 / 2_000) ** 0.5
    assert f"{written['accuracy']:.3f}" in (nano.path(name) / "README.md").read_text()


def test_there_is_headroom_between_the_models_and_above_them():
    small, large = (json.loads((nano.path(n) / "accuracy.json").read_text()) for n in nano.NAMES)
    assert 0.45 <= small["accuracy"] <= 0.65
    assert large["accuracy"] >= 0.75
    assert large["accuracy"] - small["accuracy"] >= 0.20
    assert all(share <= 0.95 for share in large["by_domain"].values())


def test_the_large_model_is_at_least_four_times_the_small_one():
    sizes = [nano.load(name)[0].num_parameters() for name in nano.NAMES]
    assert sizes[1] >= 4 * sizes[0]


def test_accuracy_falls_with_difficulty_in_most_families(answers):
    for name in nano.NAMES:
        falling = [
            answers[name].share(f.name, 1) > answers[name].share(f.name, 5)
            for f in nano.TRAINED
            if answers[name].share(f.name, 5) is not None
        ]
        assert sum(falling) > 0.7 * len(falling)


def test_each_model_is_right_where_the_other_is_wrong(answers):
    pairs = list(zip(answers[SMALL].right, answers[LARGE].right, strict=True))
    assert any(s and not le for s, le in pairs)
    assert any(le and not s for s, le in pairs)


@pytest.mark.parametrize("name", nano.NAMES)
def test_stock_transformers_loads_it_in_fp32_from_fp16_files(name):
    folder = nano.path(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(k).dtype for k in weights.keys()} == {torch.float16}  # noqa: SIM118
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("größer?")["input_ids"]) == "größer?"


def test_together_they_are_small():
    weights = nano.path(SMALL).parent
    assert sum(f.stat().st_size for f in weights.rglob("*") if f.is_file()) <= 8e6


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ModelNotFound, match="nano-m.*nano-s, nano-l"):
        nano.load("nano-m")


def test_the_table_counts_what_was_asked_and_leaves_the_rest_empty():
    asked, unseen = nano.questions("test", 300), nano.questions("test", 30, families=["shift"])
    trained = Accuracy(tuple(asked), tuple(q.family == "sort" for q in asked))
    other = Accuracy(tuple(unseen), (True,) * len(unseen))
    lines = {row.split("|")[2].strip(): row for row in table(trained, other).splitlines()[2:]}
    assert lines["sort"].rstrip(" |").endswith("1.00")
    assert lines["add"].rstrip(" |").endswith("0.00")
    assert lines["double"].replace("|", "").split() == ["unseen", "double"]
    assert len(card_questions()[0]) >= 5_000


def test_the_documentation_has_the_figures_of_the_cards(root):
    for page in (root / "README.md", root / "docs" / "nano.md"):
        for name in nano.NAMES:
            written = json.loads((nano.path(name) / "accuracy.json").read_text())
            assert f"{written['accuracy']:.3f}" in page.read_text()
            assert f"{nano.load(name)[0].num_parameters():,}" in page.read_text()
