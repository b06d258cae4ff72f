"""A checksum over every bit: it changes with each edit, and with no stride."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pliant.complexity.prefix_cache.disk import BLOCK, checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool]


def noise(size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(size, generator=generator) * 50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 8, 1001])
def test_one_bit_is_enough(dtype: torch.dtype, size: int) -> None:
    tensor = noise(size, dtype)
    before = checksum(tensor)
    octets = tensor.view(torch.uint8)
    for at in {0, len(octets) // 3, len(octets) // 2, len(octets) - 1}:
        octets[at] ^= 1
        assert checksum(tensor) != before
        octets[at] ^= 1
    assert checksum(tensor) == before


def test_the_place_of_a_value_counts_in_a_block_and_beyond() -> None:
    tensor = noise(3 * BLOCK // 2, torch.float32)
    before = checksum(tensor)
    for a, b in [(0, 2), (4, 4 + BLOCK // 4), (5, 3 * BLOCK // 2 - 1)]:
        changed = tensor.clone()
        changed[[a, b]] = tensor[[b, a]]
        assert checksum(changed) != before


def test_strides_and_offsets_make_no_difference() -> None:
    tensor = noise(35, torch.bfloat16)
    assert checksum(tensor[1:33]) == checksum(tensor[1:33].clone())
    square = tensor[:25].view(5, 5)
    assert checksum(square.T) == checksum(square.T.contiguous()) != checksum(square)


def test_what_has_no_values_has_no_checksum() -> None:
    assert checksum(torch.empty(3, 0)) == checksum(torch.empty(3, device="meta")) == b""
    assert checksum(torch.tensor(1.5)) != checksum(torch.tensor(2.5))
