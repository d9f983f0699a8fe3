"""What a step learns from: tensors with one row an example, which can be cut into parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Tensors, or named tuples of them, with one row an example; subclasses say which.

    Attributes:
        source: the batch that this is a part of, on the device where it was made; None: it is all of it. A mean over
            the tokens of a batch needs it: each part's own mean would count its tokens by another number.
        first: this one's first row in it.
    """

    _: KW_ONLY
    source: Self | None = None
    first: int = 0

    def __len__(self) -> int:
        first = getattr(self, self._names()[0])
        return len(first if isinstance(first, Tensor) else first[0])

    @property
    def whole(self) -> Self:
        """The batch that this is a part of, or itself."""
        return self if self.source is None else self.source

    @property
    def rows(self) -> slice:
        """Which rows of the whole these are."""
        return slice(self.first, self.first + len(self))

    def part(self, start: int, stop: int) -> Self:
        """Some of the examples, as wide as all of them."""
        return self._map(lambda t: t[start:stop], self.first + start)

    def split(self, size: int) -> list[Self]:
        """All of them in parts of `size` examples; the last may be smaller."""
        return [self.part(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Self:
        return self._map(lambda t: t.to(device), self.first)

    def _map(self, change: Callable[[Tensor], Tensor], first: int) -> Self:
        values = {name: getattr(self, name) for name in self._names()}
        changed = {n: change(v) if isinstance(v, Tensor) else type(v)(*map(change, v)) for n, v in values.items()}
        return type(self)(**changed, source=self.whole, first=first)

    def _names(self) -> list[str]:
        return [field.name for field in fields(self) if not field.kw_only]
