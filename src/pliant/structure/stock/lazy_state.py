"""Tensors by name that are made when they are asked for, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor

State = Mapping[str, Tensor]


class LazyState(Mapping[str, Tensor]):
    """Tensors by name, each made anew whenever it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.makers = makers

    @classmethod
    def over(cls, state: State, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> LazyState:
        """The same tensors, some of them changed."""

        def make(key: str) -> Tensor:
            return changes[key](state[key]) if key in changes else state[key]

        return cls({key: partial(make, key) for key in state})

    def __getitem__(self, key: str) -> Tensor:
        return self.makers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)
