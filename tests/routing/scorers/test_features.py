"""Features of texts that have next to none."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix, identity
from sklearn.feature_extraction.text import TfidfVectorizer

from pliant.routing.scorers.features import TOKEN, Topics, Words, hashed_counts

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


@pytest.mark.parametrize(
    ("a", "b", "other"),
    [
        ("今天天气怎么样", "明天的天气怎么样呢", "请把这首诗翻译成英文"),
        ("東京の天気はどうですか", "大阪の天気は", "このリストを並べ替えて"),
        ("วันนี้อากาศเป็นอย่างไร", "พรุ่งนี้อากาศดีไหม", "แปลบทกวีนี้"),
    ],
    ids=["Chinese", "Japanese", "Thai"],
)
def test_sentences_without_spaces_share_words(a: str, b: str, other: str) -> None:
    for rows in (Words().fit([a, b, other])([a, b, other]), hashed_counts([a, b, other], 2**18)):
        similar = (rows @ rows.T).toarray()
        assert similar[0, 1] > 2 * similar[0, 2] and similar[0, 1] > 0.15 * similar[0, 0]


def test_words_with_spaces_between_them_stay_whole() -> None:
    assert re.findall(TOKEN, "GPT-4 naïve слово 날씨가 3.50") == [
        *("GPT", "-", "4", "naïve", "слово", "날씨가", "3", ".", "50")
    ]
    assert re.findall(TOKEN, "用GPT回答。") == ["用", "GPT", "回", "答", "。"]


def test_texts_that_share_no_word_have_words() -> None:
    texts = [chr(0x4E00 + i) for i in range(60)]
    assert np.allclose(Words().fit(texts)(texts).toarray(), np.eye(60))


def test_words_are_as_long_as_what_is_known_of_them() -> None:
    """A prompt of unknown words has none, one that is half unknown lies in between."""
    words = Words().fit(["add three and four", "add five and six"])
    texts = ["add three and four", "add zebras and lions", "wholly different sentence"]
    length = np.sqrt(words(texts).multiply(words(texts)).sum(axis=1)).A1
    assert length[0] == pytest.approx(1) and 0.1 < length[1] < 0.9 and length[2] == 0


def test_words_are_tf_idf_where_all_are_known() -> None:
    """Term counts on a log scale, as TfidfVectorizer has them."""
    texts = ["add three and three and three", "add five and six"]
    reference = TfidfVectorizer(
        preprocessor=str.lower,
        token_pattern=r"(?u)\w+|[^\w\s]",
        ngram_range=(1, 2),
        sublinear_tf=True,
    )
    expected = reference.fit_transform(texts).toarray()
    assert np.allclose(Words().fit(texts)(texts).toarray(), expected)


def test_words_of_an_older_file_keep_their_length() -> None:
    """The weight of unknown words is not in it, so that its predictions stay as they were."""
    words = Words().fit(["add three and four", "add five and six"])
    state = words.state()
    assert Words.from_state(state).unknown == words.unknown
    del state.settings["unknown"]
    row = Words.from_state(state)(["add zebras and lions"])
    assert np.sqrt(row.multiply(row).sum()) == pytest.approx(1)
