"""Text with embeddings: what the words do not share an encoder may know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.routing.labels import outcomes
from tests.routing.tiny_encoder import WIDTH, write_encoder

from pliant.errors import WrongBase
from pliant.routing.scorers import load, make
from pliant.routing.scorers.embed import reader_of
from pliant.routing.scorers.linear import folds
from pliant.routing.scorers.text import TOPICS, WAVES
from pliant.routing.scorers.text_and_embedding import TextAndEmbedding

LABELS, NEW = outcomes(120, 1), outcomes(20, 2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def fitted(encoder: Path) -> TextAndEmbedding:
    scorer = make("text+embed", base=str(encoder))
    assert isinstance(scorer, TextAndEmbedding)
    scorer.cross_validate(LABELS, [folds(LABELS, 4, 0)]).check(LABELS, "text+embed")
    return scorer.fit(LABELS)


def test_the_embedding_stands_beside_the_surface_and_its_topics_beside_the_words(
    fitted: TextAndEmbedding,
) -> None:
    x = fitted._features(NEW.prompts, None)
    of_words = min(TOPICS, x.words.shape[1] - 1)
    assert x.dense.shape == (20, WAVES + WIDTH)
    assert x.topics.shape == (20, of_words + WIDTH - 1)
    # Together the embeddings and both kinds of topics weigh what the topics of the words weigh.
    assert np.linalg.norm(x.topics, axis=1) == pytest.approx(np.full(20, 0.5**0.5 * 2**0.5))
    embeddings = np.linalg.norm(x.dense[:, WAVES:], axis=1)
    assert embeddings == pytest.approx(np.full(20, 0.5**0.5))


def test_it_reads_the_embedding(fitted: TextAndEmbedding) -> None:
    """Its predictions change where those of the same text without an encoder would not."""
    x = fitted._blocks(NEW.prompts, None)
    gain = fitted.weights(x)
    x.dense[:, WAVES : WAVES + WIDTH] *= -1
    assert np.abs(fitted.weights(x) - gain).max() > 1e-3


def test_a_saved_scorer_predicts_the_same(fitted: TextAndEmbedding, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, TextAndEmbedding) and again.chosen() == fitted.chosen()
    expected, values = fitted.predict(NEW.prompts), again.predict(NEW.prompts)
    values.check(NEW, "text+embed")
    assert np.allclose(values.gain, expected.gain, atol=1e-4) and np.ptp(expected.last_gain) > 0
    assert again.flops(NEW.prompts) == fitted.flops(NEW.prompts) > 0


def test_it_refuses_another_encoder_than_its_own(fitted: TextAndEmbedding, tmp_path: Path) -> None:
    fitted.save(tmp_path / "scorer")
    other = write_encoder(tmp_path / "other", seed=1)
    scorer = load(tmp_path / "scorer", base=str(other))
    with pytest.raises(WrongBase, match=r"text\+embed was fitted on another base"):
        scorer.predict(["total 1 and 2"])


def test_each_prompt_is_read_once(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In cross-validation and in the fit after it, by both scorers that share a reader."""
    labels, reader = outcomes(40, 3), reader_of(str(encoder))
    read: list[str] = []
    compute = type(reader).compute

    def noting(self: object, prompts: list[str], layers: tuple[int, ...] = (0,)) -> np.ndarray:
        read.extend(prompts)
        return compute(self, prompts, layers)  # type: ignore[arg-type]

    monkeypatch.setattr(type(reader), "compute", noting)
    for kind in ("text+embed", "embed"):
        scorer = make(kind, base=reader)
        scorer.cross_validate(labels, [folds(labels, 4, 0)])
        scorer.fit(labels).predict(labels.prompts)
    assert sorted(read) == sorted(set(labels.prompts))
