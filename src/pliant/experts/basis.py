"""The singular vectors of a weight, on its smaller side, computed once and kept on disk.

With W = U diag(s) V^T, an expert needs V or U alone: U diag(s z) V^T = W + W V diag(z - 1) V^T. The
eigenvectors of the smaller Gram matrix are those vectors, and cost a half to a third of an SVD
(benchmarks/expert_basis.py).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pliant.files import cache_folder

Side = Literal["input", "output"]
"""The side of a weight whose singular vectors are used: V of its input, or U of its output."""

VERSION = 1
"""The version of the computation: a basis on disk from another version is not used."""
CACHE_ABOVE = 256
"""The smallest side for which reading a file is faster than computing it again."""
OVERSAMPLED, ITERATIONS = 16, 4
"""Extra vectors and iterations of the randomised decomposition."""
PROBE_SEED = 0
ORTHONORMAL = 1e-2
"""How far from orthonormal vectors on disk may be; rounding stays below 1e-5 at a side of 2048."""


@dataclass(frozen=True)
class Basis:
    """Orthonormal singular vectors, the largest singular value first."""

    vectors: Tensor
    """(..., side, rank)"""
    missing: float
    """The share of the weight's energy that approximated vectors leave out; 0 if they are exact."""


def side_of(out_features: int, in_features: int) -> Side:
    """The smaller side, whose vectors take the least room."""
    return "input" if in_features <= out_features else "output"


def basis_of(weight: Tensor, rank: int | None = None, exact_limit: int = 8192) -> Basis:
    """The basis of a weight (..., out, in), from disk if it was computed before."""
    size = min(weight.shape[-2:])
    rank = size if rank is None else min(rank, size)
    if size < CACHE_ABOVE or weight.is_meta:
        return decompose(weight, rank, exact_limit)
    approximate = size > exact_limit
    path = folder() / f"{_digest(weight)}{f'-{rank}' if approximate else ''}.safetensors"
    shape = (*weight.shape[:-2], size, rank if approximate else size)
    if (cached := _read(path, shape)) is not None:
        return Basis(cached.vectors[..., :rank], cached.missing)
    basis = decompose(weight, rank if approximate else size, exact_limit)
    _write(path, basis)
    return Basis(basis.vectors[..., :rank], basis.missing)


def decompose(weight: Tensor, rank: int, exact_limit: int = 8192) -> Basis:
    """The basis of a weight (..., out, in); approximate if its smaller side is above the limit."""
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if side_of(*matrix.shape[-2:]) == "output":
        matrix = matrix.mT
    if matrix.shape[-1] > exact_limit:
        return _randomised(matrix, rank)
    _, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    return Basis(vectors.flip(-1)[..., :rank].contiguous(), 0.0)


def _randomised(matrix: Tensor, rank: int) -> Basis:
    """By subspace iteration from a fixed start, with the share of the energy that is left out."""
    size = matrix.shape[-1]
    generator = torch.Generator().manual_seed(PROBE_SEED)
    start = torch.randn(size, min(size, rank + OVERSAMPLED), generator=generator)
    vectors = torch.linalg.qr(start.to(matrix.device)).Q
    for _ in range(ITERATIONS):
        vectors = torch.linalg.qr(matrix.mT @ (matrix @ vectors)).Q
    image = matrix @ vectors
    _, rotation = torch.linalg.eigh(image.mT @ image)
    vectors = (vectors @ rotation.flip(-1))[..., :rank].contiguous()
    energy = float(matrix.square().sum())
    return Basis(vectors, max(0.0, 1 - float((matrix @ vectors).square().sum()) / energy))


def check_value(vectors: Tensor) -> float:
    """A number that differs between different bases, and ignores the signs of their vectors.

    It applies an expert with a fixed random z to a fixed random direction.
    """
    generator = torch.Generator().manual_seed(PROBE_SEED)
    side, rank = vectors.shape[-2:]
    probe = torch.randn(side, generator=generator).to(vectors.device)
    change = torch.randn(rank, generator=generator).to(vectors.device)
    along = (vectors.float().mT @ probe).square()
    return float(along @ change) / side**0.5


# --- on disk --------------------------------------------------------------------------------------


def folder() -> Path:
    """PLIANT_BASES, or `pliant/bases` in the user's cache."""
    return cache_folder("PLIANT_BASES", "bases")


def _digest(weight: Tensor) -> str:
    """A hash of the values, the shape, the dtype and the version of the decomposition."""
    digest = xxhash.xxh3_128(f"{VERSION} {tuple(weight.shape)} {weight.dtype}".encode())
    raw = weight.detach().cpu().contiguous().view(torch.uint8)
    digest.update(raw.numpy().reshape(-1).data)
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, ...]) -> Basis | None:
    """The cached basis; None if the file holds none of this shape, and it must be computed."""
    try:
        tensors = load_file(path)
        vectors, missing = tensors["vectors"], tensors["missing"]
    except (OSError, SafetensorError, KeyError):
        return None
    if vectors.shape != shape or missing.numel() != 1 or not _is_orthonormal(vectors):
        return None
    return Basis(vectors, float(missing)) if 0 <= float(missing) <= 1 else None


def _is_orthonormal(vectors: Tensor) -> bool:
    """Whether a random combination of the vectors has its coefficients as inner products with them.

    This costs two products with a vector instead of a product of matrices.
    """
    if vectors.dtype not in (torch.float32, torch.float64):
        return False
    generator = torch.Generator().manual_seed(PROBE_SEED)
    probe = torch.randn(vectors.shape[-1], 1, generator=generator).to(vectors)
    error = (vectors.mT @ (vectors @ probe) - probe).norm(dim=(-2, -1)).amax()
    return bool(error <= ORTHONORMAL * probe.norm())


def _write(path: Path, basis: Basis) -> None:
    """Write to a temporary name first; a cache that cannot be written is no error."""
    tensors = {
        "vectors": basis.vectors.cpu().contiguous(),
        "missing": torch.tensor(basis.missing, dtype=torch.float64),
    }
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
