"""What a router learned after its fit: corrections of its scorer's predictions near new prompts.

The base scorer stays as it is. The learned prompts define a region, in words and pairs of words:
ridge regression separates them from a sample of the prompts that the scorer was fitted on. Inside
the region, a second ridge regression of the scorer's residuals on the learned prompts corrects its
predictions; its penalty keeps the correction small until many prompts agree. A prompt well inside
the region is no longer novel. Elsewhere nothing changes, not even in the last bit.

Learned prompts are those of users, so their hashes and hashed words are stored with a salt, as in
the ledger. Whoever holds the folder can still test a guess: four bytes of each prompt's plain hash
are among those of the labels, so that no measurement uses it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pliant.data import normalised
from pliant.errors import CorruptFile
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, digest, text_of
from pliant.routing.scorers.features import hashed_counts
from pliant.routing.scorers.protocol import (
    Predictions,
    Prompts,
    Scorer,
    gains,
    read_arrays,
    read_index,
    write_arrays,
)
from pliant.routing.scorers.wrapper import Wrapper
from pliant.stats import Floats

CORRECTIONS = "corrections.safetensors"
"""The file beside a scorer that corrects it."""
BACKGROUND = "background.safetensors"
"""The file beside a scorer with the sample of the prompts that it was fitted on."""
BUCKETS = 2**18
"""Of hashed words."""
SAMPLE = 500
MOST = 2_000
"""Learned prompts; the oldest are dropped. Solving for them takes a second."""

# Chosen coarsely on the tasks of benchmarks/learning.py: GSM8K and domains of MMLU, left out one at
# a time. A penalty of half or twice as much changes little, in the region and outside of it.
_SEPARATION = 0.5
"""The ridge penalty of the region."""
_EDGE, _INSIDE = 0.2, 0.4
"""Predicted membership of the region at which corrections begin, and from which they are whole."""
_SHRINKAGE = 5.0
"""The ridge penalty of the corrections, in prompts without a residual."""
_FAMILIAR = 0.5
"""How much of its correction a prompt must get to be no longer novel."""


@dataclass(frozen=True, eq=False)
class Corrections:
    """The learned prompts as counts of hashed words, and the scorer's residuals on them."""

    counts: Any
    """(n, buckets), sparse."""
    gain: Floats
    """(n, m) by how much each gain was higher than predicted."""
    right: Floats | None
    """(n, m) the same of P(right); None for a scorer that predicts no probabilities."""
    hashes: NDArray[np.uint8]
    """(n, 16) of the prompts and the salt, to know them again."""
    salt: bytes
    background: Any | None
    """(k, buckets) of the prompts that the scorer was fitted on; None where no fit sampled them:
    then only prompts that the scorer calls novel are corrected."""

    @classmethod
    def of(
        cls,
        outcomes: Outcomes,
        predictions: Predictions,
        background: Any | None,
        salt: bytes | None = None,
    ) -> Self:
        """From graded prompts and what the uncorrected scorer predicts for them; `salt` is that of
        the corrections that they are to be merged with."""
        right, salt = predictions.right, salt or secrets.token_bytes(_HASH)
        return cls(
            hashed_counts(outcomes.prompts, BUCKETS),
            gains(outcomes.right) - predictions.gain,
            None if right is None else outcomes.right - right,
            hashes_of(outcomes.prompts, salt),
            salt,
            background,
        )

    def merged(self, later: Corrections) -> Corrections:
        """With later ones, which replace those of the same prompts; at most `MOST`, the latest."""
        from scipy.sparse import vstack

        assert self.salt == later.salt
        new = {bytes(each) for each in later.hashes}
        old = [i for i, each in enumerate(self.hashes) if bytes(each) not in new]
        rows = slice(max(0, len(old) + len(later) - MOST), None)
        right = None
        if self.right is not None and later.right is not None:
            right = np.concatenate([self.right[old], later.right])
        return Corrections(
            vstack([self.counts[old], later.counts]).tocsr()[rows],
            np.concatenate([self.gain[old], later.gain])[rows],
            right[rows] if right is not None else None,
            np.concatenate([self.hashes[old], later.hashes])[rows],
            self.salt,
            later.background,
        )

    def new_since(self, before: Corrections | None) -> int:
        """How many of the prompts `before` lacks, or has other residuals of."""
        if before is None:
            return len(self)
        known = {bytes(each): i for i, each in enumerate(before.hashes)}

        def is_new(i: int) -> bool:
            at = known.get(bytes(self.hashes[i]))
            return at is None or not np.allclose(self.gain[i], before.gain[at], atol=1e-5)

        return sum(is_new(i) for i in range(len(self)))

    def contains(self, prompts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) which of these prompts were learned."""
        learned = {bytes(each) for each in self.hashes}
        return np.array(
            [bytes(each) in learned for each in hashes_of(prompts, self.salt)], np.bool_
        )

    def errors(self) -> tuple[float, float]:
        """The mean squared error of the gains on the learned prompts, without and with them."""
        x, m = self._weighted(self.counts), self.gain.shape[1]
        novel = np.ones(len(self), dtype=np.bool_)
        change = self._inside(x, novel)[:, None] * self._change(x)[:, :m]
        before, after = ((part[:, 1:] ** 2).mean() for part in (self.gain, self.gain - change))
        return float(before), float(after)

    def __len__(self) -> int:
        return len(self.gain)

    def apply(self, prompts: Prompts, predictions: Predictions) -> Predictions:
        """The predictions with corrections."""
        x = self._weighted(hashed_counts([text_of(prompt) for prompt in prompts], BUCKETS))
        inside = self._inside(x, predictions.novel)
        change = inside[:, None] * self._change(x)
        m = self.gain.shape[1]
        gain = np.clip(predictions.gain + change[:, :m], -1, 1)
        right = predictions.right
        if right is not None and self.right is not None:
            right = np.clip(right + change[:, m:], 0, 1)
        novel = predictions.novel
        if novel is not None:
            novel = novel & (inside < _FAMILIAR)
        return Predictions(right, gain, novel)

    def _inside(self, x: Any, novel: NDArray[np.bool_] | None) -> Floats:
        """(n,) how well inside the region each prompt is, from 0 to 1."""
        share = np.clip((x @ self._region - _EDGE) / (_INSIDE - _EDGE), 0, 1)
        if self.background is None:
            return np.zeros(len(share)) if novel is None else share * novel
        return np.asarray(share)

    @cached_property
    def _region(self) -> Floats:
        """(buckets,) of a ridge regression of 1 for the learned prompts and 0 for the others."""
        from scipy.sparse import vstack

        rows = self._weighted(self.counts)
        if self.background is not None:
            rows = vstack([rows, self._weighted(self.background)]).tocsr()
        member = (np.arange(rows.shape[0]) < len(self)).astype(np.float64)
        return np.asarray(rows.T @ _dual(rows, member, _SEPARATION))

    def _change(self, x: Any) -> Floats:
        """(n, m) of the gains, and of P(right) after them."""
        weight, constant = self._residual_weights
        return np.asarray(x @ weight + constant)

    @cached_property
    def _residual_weights(self) -> tuple[Floats, Floats]:
        """Of a ridge regression of the residuals: of each bucket, and of the constant."""
        rows = self._weighted(self.counts)
        residuals = self.gain if self.right is None else np.hstack([self.gain, self.right])
        dual = _dual(rows, residuals, _SHRINKAGE, constant=1.0)
        return np.asarray(rows.T @ dual), dual.sum(axis=0)

    @cached_property
    def _idf(self) -> Floats:
        parts = [self.counts] if self.background is None else [self.counts, self.background]
        frequency = sum(np.bincount(part.indices, minlength=BUCKETS) for part in parts)
        number = sum(part.shape[0] for part in parts)
        return np.asarray(np.log((1 + number) / (1 + frequency)) + 1)

    def _weighted(self, counts: Any) -> Any:
        """TF-IDF vectors of length 1."""
        from sklearn.preprocessing import normalize

        x = counts.astype(np.float64)
        x.data = (1 + np.log(x.data)) * self._idf[x.indices]
        return normalize(x, copy=False)

    # --- files -----------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Beside a scorer that was saved there."""
        arrays: dict[str, NDArray[Any]] = {
            "gain": self.gain,
            "hashes": self.hashes,
            "salt": np.frombuffer(self.salt, dtype=np.uint8),
            "scorer": _scorer_of(folder),
            **_sparse_arrays("learned", _moved(self.counts, _order(self.salt))),
        }
        if self.right is not None:
            arrays["right"] = self.right
        write_arrays(folder / CORRECTIONS, arrays)
        if self.background is not None and not (folder / BACKGROUND).exists():
            write_arrays(folder / BACKGROUND, _sparse_arrays("sample", self.background))

    @classmethod
    def load(cls, folder: Path) -> Corrections:
        path = folder / CORRECTIONS
        arrays = read_arrays(path)
        try:
            if not np.array_equal(arrays["scorer"], _scorer_of(folder)):
                raise CorruptFile(
                    f"{path}: corrects another scorer than the one beside it: remove it, and learn "
                    "again (pliant route learn)"
                )
            if "salt" not in arrays:
                raise CorruptFile(
                    f"{path}: learned before the hashes in it had a salt: remove it, and learn "
                    "again from the ledger, which holds all grades (pliant route learn)"
                )
            n, salt = len(arrays["gain"]), arrays["salt"].tobytes()
            right = arrays.get("right")
            counts = _moved(_sparse("learned", arrays), np.argsort(_order(salt)))
            wrong = (right is not None and right.shape != arrays["gain"].shape) or (
                counts.shape[0] != n or arrays["hashes"].shape != (n, _HASH) or n == 0
            )
            if wrong:
                raise ValueError("sizes that do not match")
            own = (arrays["gain"], right, arrays["hashes"], salt)
            return cls(counts, *own, background_of(folder))
        except (KeyError, ValueError, IndexError) as error:
            raise CorruptFile(f"{path}: not what Pliant writes ({error})") from error


_HASH = 16


def hashes_of(prompts: Sequence[str], salt: bytes) -> NDArray[np.uint8]:
    """(n, 16) by which learned prompts are known again."""
    content = b"".join(bytes.fromhex(digest(normalised(prompt), salt)) for prompt in prompts)
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, _HASH)


@lru_cache(maxsize=8)
def _order(salt: bytes) -> NDArray[np.int64]:
    """(buckets,) the place of each bucket in a file with this salt."""
    # Of numpy's generators the one whose numbers no version changes.
    draw = np.random.RandomState(np.frombuffer(salt, dtype="<u4"))
    return np.asarray(draw.permutation(BUCKETS))


def _moved(counts: Any, order: NDArray[np.int64]) -> Any:
    """The counts with each bucket in its new place."""
    from scipy.sparse import csr_matrix

    parts = (counts.data, order[counts.indices], counts.indptr)
    return csr_matrix(parts, shape=counts.shape).sorted_indices()


def write_background(folder: Path, prompts: Sequence[Prompt], seed: int = 0) -> None:
    """Store a sample of the prompts that the scorer in this folder was fitted on."""
    at = np.random.default_rng(seed).permutation(len(prompts))[:SAMPLE]
    counts = hashed_counts([text_of(prompts[i]) for i in at], BUCKETS)
    write_arrays(folder / BACKGROUND, _sparse_arrays("sample", counts))


def background_of(folder: Path) -> Any | None:
    """The sample beside a scorer; None where its fit wrote none."""
    path = folder / BACKGROUND
    if not path.is_file():
        return None
    try:
        return _sparse("sample", read_arrays(path))
    except (KeyError, ValueError, IndexError) as error:
        raise CorruptFile(f"{path}: not what Pliant writes ({error})") from error


def _dual(rows: Any, y: Floats, penalty: float, constant: float = 0.0) -> Floats:
    """(n, targets) of ridge regression on sparse rows: the weights are rows.T @ dual. There are
    fewer prompts than buckets, so this is the smaller system."""
    gram = (rows @ rows.T).toarray() + constant
    gram[np.diag_indices_from(gram)] += penalty
    return np.asarray(np.linalg.solve(gram, y))


def _scorer_of(folder: Path) -> NDArray[np.uint8]:
    """The digest of the scorer in a folder."""
    digest = str(read_index(folder).get("digest", ""))  # Pliant 0.1 wrote none
    return np.frombuffer(digest.encode(), dtype=np.uint8)


def _sparse_arrays(name: str, matrix: Any) -> dict[str, NDArray[Any]]:
    return {
        f"{name}.data": matrix.data.astype(np.float32),
        f"{name}.indices": matrix.indices.astype(np.int32),
        f"{name}.indptr": matrix.indptr.astype(np.int64),
    }


def _sparse(name: str, arrays: Mapping[str, NDArray[Any]]) -> Any:
    from scipy.sparse import csr_matrix

    data, indices, indptr = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
    matrix = csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, BUCKETS))
    matrix.check_format()
    if not (matrix.data > 0).all():
        raise ValueError("counts that are not above 0")
    return matrix


class WithCorrections(Wrapper):
    """A scorer of any kind with what was learned after its fit."""

    def __init__(self, scorer: Scorer, corrections: Corrections) -> None:
        super().__init__(scorer)
        self.corrections = corrections

    def change(self, prompts: Prompts, predictions: Predictions) -> Predictions:
        return self.corrections.apply(prompts, predictions)

    def save(self, folder: Path) -> None:
        self.scorer.save(folder)
        self.corrections.save(folder)
