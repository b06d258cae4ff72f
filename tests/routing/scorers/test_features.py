"""Features of texts that have next to none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix, identity

from pliant.routing.scorers.features import Topics, Words

VECTORS: dict[str, Any] = {
    "all zero": csr_matrix((60, 40)),
    "all the same": csr_matrix(np.ones((60, 40))),
    "without overlap": identity(60).tocsr(),
    "dense and zero": np.zeros((40, 16)),
    "one row": csr_matrix(np.ones((1, 40))),
}


@pytest.mark.parametrize("name", VECTORS)
def test_topics_are_finite_whatever_the_vectors(name: str) -> None:
    """As of prompts that share no word, or of an encoder that embeds all prompts alike."""
    vectors = VECTORS[name]
    topics = Topics.of(vectors, 32)(vectors)
    assert np.isfinite(topics).all() and (np.linalg.norm(topics, axis=1) < 1 + 1e-9).all()


def test_texts_that_share_no_word_have_words() -> None:
    texts = [chr(0x4E00 + i) for i in range(60)]
    assert np.allclose(Words().fit(texts)(texts).toarray(), np.eye(60))
