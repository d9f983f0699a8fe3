"""A batch for a training step: tensors with one row per example, which can be split into parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Tensors, or named tuples of tensors, with one row per example; subclasses define them.

    Attributes:
        source: the batch that this is a part of, on the device where it was made; None if it is a whole batch. A mean
            over the tokens of a batch needs it, because each part would divide by its own number of tokens.
        first: the first row of this part in the whole batch.
    """

    _: KW_ONLY
    source: Self | None = None
    first: int = 0

    def __len__(self) -> int:
        first = getattr(self, self._names()[0])
        return len(first if isinstance(first, Tensor) else first[0])

    @property
    def whole(self) -> Self:
        """The batch that this is a part of, or this batch itself."""
        return self if self.source is None else self.source

    @property
    def rows(self) -> slice:
        """The rows of the whole batch that are in this part."""
        return slice(self.first, self.first + len(self))

    def part(self, start: int, stop: int) -> Self:
        """Some of the examples, padded as in the whole batch."""
        return self._map(lambda t: t[start:stop], self.first + start)

    def split(self, size: int) -> list[Self]:
        """The batch in parts of `size` examples; the last part may be smaller."""
        return [self.part(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Self:
        return self._map(lambda t: t.to(device), self.first)

    def _map(self, change: Callable[[Tensor], Tensor], first: int) -> Self:
        values = {name: getattr(self, name) for name in self._names()}
        changed = {n: change(v) if isinstance(v, Tensor) else type(v)(*map(change, v)) for n, v in values.items()}
        return type(self)(**changed, source=self.whole, first=first)

    def _names(self) -> list[str]:
        return [field.name for field in fields(self) if not field.kw_only]
