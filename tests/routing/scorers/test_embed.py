"""Sentence embeddings as a scorer: every encoder as sentence-transformers reads it, read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.routing.labels import outcomes
from tests.routing.tiny_encoder import POSITIONS, WIDTH, write_encoder
from transformers import AutoModel

from pliant.errors import InvalidInput, ModelNotFound, WrongBase
from pliant.loading import catalogue, is_encoder
from pliant.routing.scorers import load, make
from pliant.routing.scorers.embed import Embed, Encoder, reader_of
from pliant.routing.scorers.linear import folds
from pliant.routing.scorers.protocol import gains as as_gains
from pliant.routing.scorers.vectors import Candidate

TEXTS = ["total 1 and 2", "prove these", "spell a word, please, and 17 more words of it"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def reference(folder: Path, text: str) -> np.ndarray:
    """The mean of the last hidden states, of unit length: one text, without padding."""
    ids = Encoder(str(folder))._ids([text])
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(folder).eval()(torch.tensor(ids)).last_hidden_state
    mean = hidden[0].mean(dim=0).numpy()
    return mean / np.linalg.norm(mean)


def test_an_embedding_is_the_mean_over_the_prompts_own_tokens(encoder: Path) -> None:
    together = Encoder(str(encoder)).compute(TEXTS)[:, 0]
    for text, embedding in zip(TEXTS, together, strict=True):
        assert np.allclose(embedding, reference(encoder, text), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_of_the_tokenizer_changes_nothing(
    side: str, encoder: Path, tmp_path: Path
) -> None:
    padded = Encoder(str(write_encoder(tmp_path, padding_side=side))).compute(TEXTS)
    assert np.allclose(padded, Encoder(str(encoder)).compute(TEXTS), atol=1e-6)


def test_a_batch_of_one_and_of_many_agree(encoder: Path) -> None:
    reader = Encoder(str(encoder))
    alone = np.concatenate([reader.compute([text]) for text in TEXTS])
    assert np.allclose(reader.compute(TEXTS), alone, atol=1e-5)


def test_a_longer_prompt_is_truncated_to_what_the_model_reads(encoder: Path) -> None:
    reader = Encoder(str(encoder))
    assert reader.longest == POSITIONS
    longer = reader.compute(["total " * 200])
    assert np.allclose(longer, reader.compute(["total " * 300]), atol=1e-6)


def test_it_pools_as_the_folder_of_sentence_transformers_says(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling/config.json"
    with torch.inference_mode():
        ids = torch.tensor(Encoder(str(folder))._ids(TEXTS[:1]))
        hidden = AutoModel.from_pretrained(folder).eval()(ids).last_hidden_state[0].numpy()
    rows = {"cls_token": hidden[0], "lasttoken": hidden[-1], "mean_tokens": hidden.mean(axis=0)}
    for key, row in rows.items():
        pooling.write_text(json.dumps({f"pooling_mode_{key}": True}))
        embedding = Encoder(str(folder)).compute(TEXTS)[0, 0]
        assert np.allclose(embedding, row / np.linalg.norm(row), atol=1e-5), key


@pytest.mark.parametrize("head", ["ridge", "logistic", "knn"])
def test_every_head_predicts_the_same_after_loading(
    head: str, encoder: Path, tmp_path: Path
) -> None:
    train, new = outcomes(120, 1), outcomes(20, 2)
    fitted = make("embed", base=str(encoder), heads=[head]).fit(train)
    fitted.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, Embed) and again.candidate == fitted.candidate
    for scorer in (fitted, again):
        scorer.predict(new.asked).check(new, "embed")
    expected, values = fitted.predict(new.asked), again.predict(new.asked)
    assert np.allclose(values.gain, expected.gain, atol=1e-3)
    assert np.ptp(expected.last_gain) > 0


def test_it_refuses_another_encoder_than_its_own(encoder: Path, tmp_path: Path) -> None:
    make("embed", base=str(encoder)).fit(outcomes(40, 1)).save(tmp_path / "scorer")
    other = write_encoder(tmp_path / "other", seed=1)
    scorer = load(tmp_path / "scorer", base=str(other))
    with pytest.raises(WrongBase, match="embed was fitted on another base .a BertModel"):
        scorer.predict(["total 1 and 2"])


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All prompts that an encoder reads."""
    prompts: list[str] = []
    before = Encoder.compute

    def noting(self: Encoder, batch: Any, layers: Any = (0,)) -> Any:
        prompts.extend(batch)
        return before(self, batch, layers)

    monkeypatch.setattr(Encoder, "compute", noting)
    return prompts


def test_cross_validation_reads_each_prompt_once_and_fit_reads_none(
    encoder: Path, computed: list[str]
) -> None:
    labels = outcomes(80, 1)
    partitions = [folds(labels, 4, seed) for seed in range(2)]
    scorer = make("embed", base=str(encoder))
    predictions = scorer.cross_validate(labels, partitions)
    predictions.check(labels, "embed")
    scorer.fit(labels)
    assert sorted(computed) == sorted(set(labels.prompts))
    scorer.predict(labels.asked[:3])  # a fitted scorer that owns its encoder holds no prompts
    assert len(computed) == len(set(labels.prompts)) + 3


def test_scorers_that_share_a_reader_read_each_prompt_once(
    encoder: Path, computed: list[str]
) -> None:
    labels, reader = outcomes(60, 1), reader_of(str(encoder))
    reader.remember(labels.asked)
    for head in ("ridge", "knn"):
        make("embed", base=reader, heads=[head]).fit(labels).predict(labels.asked)
    assert len(computed) == len(set(labels.prompts))


def test_the_predictions_of_a_fold_do_not_use_its_labels(encoder: Path) -> None:
    labels = outcomes(60, 1)
    partition = folds(labels, 3, 0)
    right = labels.right.copy()
    right[partition[0]] = 1 - right[partition[0]]
    changed = type(labels)(labels.prompts, labels.models, right, labels.cost)
    settings: Any = {"base": reader_of(str(encoder)), "heads": ["ridge"]}
    gains = []
    for table in (labels, changed):
        scorer = make("embed", **settings)
        scorer.strengths = {"ridge": (100.0,)}
        gains.append(scorer.cross_validate(table, [partition]).gain)
    # But for the mean of all labels, which is added for all folds alike: see Scorer.cross_validate.
    moved = as_gains(changed.right - labels.right).mean(axis=0)
    assert np.allclose(gains[0][partition[0]] + moved, gains[1][partition[0]])
    assert not np.allclose(gains[0][partition[1]] + moved, gains[1][partition[1]])


def test_the_head_that_predicts_the_gain_best_is_chosen(encoder: Path) -> None:
    """Which model is right depends on the first word, which an embedding holds."""
    labels = outcomes(300, 1)
    scorer = make("embed", base=str(encoder))
    scorer.cross_validate(labels, [folds(labels, 4, 0)])
    assert scorer.candidate != Embed(str(encoder))._default()
    chosen = scorer.fit(labels).chosen()
    assert chosen["head"] in ("ridge", "logistic", "knn") and chosen["base"] == str(encoder)


def test_a_language_model_is_read_as_far_as_an_early_layer(tmp_path: Path) -> None:
    labels = outcomes(60, 1)
    scorer = make("embed", base="nano-s")
    assert scorer.reader.layers == (1, 2)  # of 3
    scorer.fit(labels).save(tmp_path)
    again = load(tmp_path)
    prompts = outcomes(10, 2).asked
    assert np.allclose(again.predict(prompts).gain, scorer.predict(prompts).gain, atol=1e-4)
    assert 0 < scorer.flops(prompts) < scorer.reader.base.reading_flops(prompts)


def test_states_of_a_language_model_are_averaged_over_the_prompts_own_tokens() -> None:
    reader = reader_of("nano-s", layers=[1, 2])
    together = reader.compute(TEXTS, [1, 2])
    alone = np.concatenate([reader.compute([text], [1, 2]) for text in TEXTS])
    assert together.shape[:2] == (3, 2) and np.allclose(together, alone, atol=1e-5)


def test_a_language_model_and_an_encoder_are_told_apart(encoder: Path) -> None:
    assert is_encoder(str(encoder)) and not is_encoder("nano-s")


def test_reading_costs_two_operations_for_each_parameter_and_token(encoder: Path) -> None:
    scorer = make("embed", base=str(encoder))
    parameters = AutoModel.from_pretrained(encoder).num_parameters()
    assert scorer.flops(["total", "total and"]) == 2 * parameters * (3 + 4) / 2


def test_without_an_encoder_the_error_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PLIANT_MODELS", str(tmp_path))
    assert not catalogue.installed("minilm")
    with pytest.raises(InvalidInput, match="pliant models get minilm"):
        make("embed").fit(outcomes(40, 1))
    with pytest.raises(ModelNotFound):
        make("embed", base=str(tmp_path / "nothing")).fit(outcomes(40, 1))
    with pytest.raises(InvalidInput, match="'rigde'.*ridge"):
        make("embed", heads=["rigde"])


def test_an_encoder_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    file = write_encoder(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["embeddings.LayerNorm.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelNotFound, match="lacks 1 of its weights"):
        Encoder(str(tmp_path)).compute(TEXTS)
    del weights["pooler.dense.weight"]  # is not read
    save_file(weights | {"embeddings.LayerNorm.weight": torch.ones(WIDTH)}, file, {"format": "pt"})
    assert Encoder(str(tmp_path)).compute(TEXTS).shape == (3, 1, WIDTH)


def test_where_nothing_was_compared_the_strength_is_from_the_middle(encoder: Path) -> None:
    assert make("embed", base=str(encoder)).fit(outcomes(40, 1)).candidate == Candidate(
        0, "ridge", 3_000.0
    )
