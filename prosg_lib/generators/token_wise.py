"""The token-wise generator: the synthetic gradient, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.gradient_factors import captured_inputs
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.generators.base import DROPOUT, Generator, key


class Terms(NamedTuple):
    """A prompt's tokens as the sum over them has them: what is written, under which key, and what comes after them.

    Attributes:
        z: (B, T', H), zero at padding; T' = T - 1 tokens with a label, or T with one that was pending.
        keys: map -> V^T x_t + K z_t, (B, T', r).
        state, pending: as in `Memory`.
    """

    z: Tensor
    keys: dict[str, Tensor]
    state: RecurrentState
    pending: tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Memory:
    """A prompt absorbed so far, of a size that does not grow with it.

    Attributes:
        sums: map -> (B, H, r), sum over tokens of z_t (V^T x_t + K z_t)^T; the delta is linear in it.
        state: the model's state after the last token.
        pending: the last token's hidden state and embedding (B, 2 D) and reads V^T x (B, r) a map; its label is not
            known yet.
        length: tokens absorbed.
    """

    sums: dict[str, Tensor]
    state: RecurrentState
    pending: tuple[Tensor, dict[str, Tensor]]
    length: int


class TokenGenerator(Generator):
    """The synthetic gradient token by token: delta_t predicted from (hidden state at t, token t, next token).

    A fact can be written where the text says what it is about: before its value ("my pet is a" -> parrot), or, where
    only the value tells that ("I brought home a parrot."), at the value itself, which is then token t and no label.

    V^T x_t is the key that the fact is written under, and V^T x at the question the one that it is looked up by. They
    are alike only as far as statement and question are; K z_t brings them closer where they are not.

    Args:
        label: whether it sees the next token; without it (DNI instead of cDNI) that input is 0, and nothing else is
            another.
        foresight: whether it has a head that predicts z_{t+1} from z_t, and by it the next token's delta: DNI's
            auxiliary task, which `supervised` trains; a change of the weights never uses it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rank: int,
        width: int,
        endings: tuple[str, ...],
        label: bool = True,
        foresight: bool = False,
    ):
        super().__init__(lm, rank, endings)
        self.label = label
        size = lm.config.width
        self.mlp = nn.Sequential(
            nn.Dropout(DROPOUT), nn.Linear(3 * size, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )
        self.heads = nn.ModuleDict({key(n): nn.Linear(width, out, bias=False) for n, out in self.outs.items()})
        self.keys = nn.ModuleDict({key(n): nn.Linear(width, rank, bias=False) for n in self.outs})
        for start in (*self.heads.values(), *self.keys.values()):
            nn.init.zeros_(start.weight)
        if foresight:
            self.ahead = nn.Linear(width, width)

    def forward(self, lm, ids, valid=None):
        memory = self.absorb(lm, ids, valid=valid)
        return self.delta_of(memory), memory.state

    @torch.no_grad()
    def keys_of(self, lm, ids, valid=None):
        """Those that it writes under, V^T x_t + K z_t, (B, T - 1, r): nearer to a question's than the prompt's own."""
        keys = self.terms(lm, ids, valid=valid).keys
        return keys if valid is None else {name: k * valid[:, :-1, None] for name, k in keys.items()}

    def absorb(
        self, lm: LanguageModel, ids: Tensor, memory: Memory | None = None, valid: Tensor | None = None
    ) -> Memory:
        """Take in (more of) a prompt, (B, T); pieces of any lengths add up to the whole.

        Args:
            memory: what was absorbed before; None: nothing. Cannot be combined with padding (`valid`).
        """
        return self.summed(self.terms(lm, ids, memory, valid), ids.shape[1], memory)

    def terms(self, lm: LanguageModel, ids: Tensor, memory: Memory | None = None, valid: Tensor | None = None) -> Terms:
        """The tokens' terms of the sum; as in `absorb`."""
        if memory is not None and valid is not None:
            raise UserError("a prompt that goes on cannot be padded in between; absorb pieces of equal length")
        with torch.no_grad(), captured_inputs(lm, self.names) as inputs:
            hidden, state = lm.step_through(ids, None if memory is None else memory.state, valid)
            label = lm.embed(ids)
            seen = torch.cat([hidden, label], -1)
        reads = {name: inputs[name].detach() @ self.V[key(name)] for name in self.names}  # V^T x_t, (B, T, r)
        pending = seen[:, -1], {name: read[:, -1] for name, read in reads.items()}
        here, after = seen[:, :-1], label[:, 1:]
        reads = {name: read[:, :-1] for name, read in reads.items()}
        if memory is not None:
            here = torch.cat([memory.pending[0][:, None], here], 1)
            after = label
            reads = {name: torch.cat([memory.pending[1][name][:, None], read], 1) for name, read in reads.items()}
        after = after if self.label else torch.zeros_like(after)
        z = self.mlp(torch.cat([here, after], -1))  # (B, T - 1, H), or T with a pending token
        if valid is not None:
            z = z * valid[:, :-1, None]
        keys = {name: read + self.keys[key(name)](z) for name, read in reads.items()}
        return Terms(z, keys, state, pending)

    def summed(self, terms: Terms, length: int, memory: Memory | None = None) -> Memory:
        """The terms of `length` more tokens added to a memory."""
        sums = {name: terms.z.transpose(1, 2) @ keys for name, keys in terms.keys.items()}
        if memory is not None:
            sums = {name: memory.sums[name] + new for name, new in sums.items()}
        return Memory(sums, terms.state, terms.pending, length + (memory.length if memory else 0))

    @torch.no_grad()
    def remember(
        self, lm: LanguageModel, text: str | Sequence[int], memory: Memory | None = None, chunk: int = 256
    ) -> Memory:
        """Take in one text of any length, or more of one, `chunk` tokens at a time: nothing here grows with its length.

        `delta_of` makes the change of what it returns. See `memories` for several prompts in one memory.

        Args:
            text: or its token ids.
            memory: what was taken in before; None: nothing. Never changed.
        Raises:
            UserError: the text is empty, a chunk has no token, or the generator was trained for another model.
        """
        if chunk < 1:
            raise UserError(f"chunk is {chunk}; a text is taken in by at least 1 token at a time")
        self.check(lm)
        self.eval()  # no dropout
        for piece in lm.encode_prompts([text])[0].split(chunk, 1):
            memory = self.absorb(lm, piece, memory)
        return memory

    def delta_of(self, memory: Memory) -> LowRankDelta:
        """U = sum_t delta_t (V^T x_t + K z_t)^T with delta_t = W z_t, taken as W (sum_t z_t (V^T x_t + K z_t)^T)."""
        return self._delta({name: self.heads[key(name)].weight @ memory.sums[name] for name in self.names})
