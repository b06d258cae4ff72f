"""The singular vectors of a weight: right, on the smaller side, and the same from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pliant.experts import basis
from pliant.experts.basis import basis_of, check_value, decompose, side_of


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_the_vectors_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    own = weight(*shape)
    vectors = decompose(own, min(shape)).vectors
    u, _, vt = torch.linalg.svd(own, full_matrices=False)
    theirs = vt.T if side_of(*shape) == "input" else u
    assert torch.allclose((vectors.T @ theirs).abs(), torch.eye(min(shape)), atol=1e-3)
    assert torch.allclose(vectors.T @ vectors, torch.eye(min(shape)), atol=1e-5)


def test_stacked_weights_have_a_basis_each() -> None:
    own = weight(3, 12, 6)
    vectors = decompose(own, 6).vectors
    for one, alone in zip(vectors, own, strict=True):
        assert torch.allclose(one, decompose(alone, 6).vectors, atol=1e-5)


def test_a_rank_takes_the_largest() -> None:
    own = weight(24, 8)
    assert torch.equal(decompose(own, 3).vectors, decompose(own, 8).vectors[:, :3])


def test_a_large_matrix_is_approximated_and_its_error_told() -> None:
    own = weight(40, 4) @ weight(4, 32, seed=1) + 0.01 * weight(40, 32, seed=2)
    approximate = decompose(own, 4, exact_limit=16)
    image = own @ approximate.vectors
    left = 1 - image.square().sum() / own.square().sum()
    assert approximate.missing == pytest.approx(float(left), abs=1e-6)
    assert 0 < approximate.missing < 1e-3
    exact = decompose(own, 4).vectors
    assert torch.allclose((approximate.vectors.T @ exact).abs(), torch.eye(4), atol=1e-2)


def test_the_check_value_shows_other_vectors_but_not_other_signs() -> None:
    vectors = decompose(weight(24, 12), 12).vectors
    signs = torch.where(torch.arange(12) % 2 == 0, 1.0, -1.0)
    swapped = vectors[:, [1, 0, *range(2, 12)]]
    assert check_value(vectors * signs) == pytest.approx(check_value(vectors), abs=1e-6)
    assert abs(check_value(swapped) - check_value(vectors)) > 1e-2


FORGED = [
    pytest.param("vectors", lambda v: 2 * v, id="longer"),
    pytest.param("vectors", lambda v: v.index_fill(1, torch.tensor([3]), 0.0), id="one-is-zero"),
    pytest.param("vectors", lambda v: v.index_fill(0, torch.tensor([3]), torch.nan), id="nan"),
    pytest.param("vectors", lambda v: v[:, :4].contiguous(), id="fewer"),
    pytest.param("vectors", lambda v: torch.eye(8, dtype=torch.int64), id="whole-numbers"),
    pytest.param("missing", lambda m: m + 2, id="missing-above-1"),
    pytest.param("missing", lambda m: torch.tensor(torch.nan), id="missing-nan"),
    pytest.param("missing", lambda m: torch.zeros(2), id="missing-of-two"),
]


class TestOnDisk:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PLIANT_BASES", str(tmp_path))
        monkeypatch.setattr(basis, "CACHE_ABOVE", 4)
        return tmp_path

    def test_it_is_computed_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = basis_of(weight(24, 8))
        assert len(list(folder.iterdir())) == 1
        monkeypatch.setattr(basis, "decompose", None)  # a second computation would fail
        assert torch.equal(basis_of(weight(24, 8)).vectors, first.vectors)
        assert torch.equal(basis_of(weight(24, 8), rank=3).vectors, first.vectors[:, :3])

    def test_an_approximate_basis_has_a_file_for_each_rank(self) -> None:
        for rank in (3, 6, 3):
            assert basis_of(weight(40, 32), rank, exact_limit=16).vectors.shape == (32, rank)

    def test_other_values_have_another(self, folder: Path) -> None:
        basis_of(weight(24, 8))
        basis_of(weight(24, 8, seed=1))
        basis_of(weight(24, 8).bfloat16())
        assert len(list(folder.iterdir())) == 3

    @pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
    def test_a_damaged_file_is_computed_again(self, folder: Path, damage: bytes | None) -> None:
        first = basis_of(weight(24, 8))
        (path,) = folder.iterdir()
        path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
        assert torch.equal(basis_of(weight(24, 8)).vectors, first.vectors)
        assert torch.equal(basis_of(weight(24, 8)).vectors, first.vectors)

    @pytest.mark.parametrize("name, forged", FORGED)
    def test_a_file_without_such_a_basis_is_computed_again(
        self, folder: Path, name: str, forged: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        first = basis_of(weight(24, 8))
        (path,) = folder.iterdir()
        tensors = load_file(path)
        save_file({**tensors, name: forged(tensors[name])}, path)
        again = basis_of(weight(24, 8))
        assert torch.equal(again.vectors, first.vectors) and again.missing == first.missing

    def test_a_folder_that_cannot_be_written_is_no_error(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (folder / "file").touch()
        monkeypatch.setenv("PLIANT_BASES", str(folder / "file" / "below"))
        assert basis_of(weight(24, 8)).vectors.shape == (8, 8)
