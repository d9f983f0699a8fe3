"""The token-wise generator: the synthetic gradient as a sum over the prompt's tokens.

The true gradient of a linear map's weight is G = sum_t g_t x_t^T, with x_t the map's input and g_t the gradient at its
output. The generator keeps this form. It predicts each g_t, as P z_t, from the model's hidden state h_t, the token's
embedding e_t and that of its label, the next token (conditional DNI, Jaderberg et al. 2016, section 2); it reads the
real x_t along r learned directions V, and adds a predicted part K z_t:

    z_t = mlp([h_t; e_t; e_{t+1}])
    U   = sum_t g_t (V^T x_t + K z_t)^T  =  P sum_t z_t (V^T x_t + K z_t)^T,    g_t = P z_t.

The map then answers an input x with scale U V^T x: g_t is what token t writes, k_t = V^T x_t + K z_t is the key it is
written under, and V^T x looks it up. Statement and question are worded differently, so their V^T x differ; K z_t can
bring the keys closer.

The second sum is the memory: all that has to be kept of a prompt, whatever its length. Being a sum, it streams (a
prompt can be read in pieces) and adds (of two prompts, deltas sum to one of the same rank).

Glossary of shapes: B batch, T tokens, D model width, H hidden width of the generator, r rank.
"""

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
from prosg_lib.generators.base import DROPOUT, Generator, check_model, parameter_key

_PIECE = 256  # tokens of a long text that are read at a time


class LastToken(NamedTuple):
    """The last token read so far. It joins the sum when its label comes.

    Attributes:
        features: hidden state and embedding, (B, 2 D).
        reads: map -> V^T x, (B, r).
        first: whether it is its text's first, (B,); None where that does not matter.
    """

    features: Tensor
    reads: dict[str, Tensor]
    first: Tensor | None = None


@dataclass(frozen=True)
class Memory:
    """What is kept of a prompt read so far; its size does not depend on the prompt's length.

    Attributes:
        sums: map -> sum_t z_t k_t^T over the tokens with a label, (B, H, r).
        state: the model's state after the last token.
        last: the last token, which has no label yet.
    """

    sums: dict[str, Tensor]
    state: RecurrentState
    last: LastToken


class TokenGenerator(Generator):
    """U = sum_t g_t (V^T x_t + K z_t)^T, with g_t = P z_t; see above.

    A fact can be written before its value, where the text says what it is about ("my pet is a" -> parrot). Where only
    the value tells ("I brought home a parrot."), it is written at the value itself, which is then token t.

    Args:
        rank, width: r and H.
        endings: of the names of the maps that are changed.
        label: whether it sees the next token. Without it (DNI instead of cDNI) that input is zero.

    Attributes:
        mlp: makes z_t.
        heads, keys: P and K, by map; zero before training.
    """

    def __init__(self, lm: LanguageModel, rank: int, width: int, endings: tuple[str, ...], label: bool = True):
        super().__init__(lm, rank, endings)
        self.label = label
        inputs = 3 * lm.config.width
        self.mlp = nn.Sequential(
            nn.Dropout(DROPOUT), nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )
        self.heads = nn.ModuleDict(
            {parameter_key(n): nn.Linear(width, out, False) for n, out in self.out_sizes.items()}
        )
        self.keys = nn.ModuleDict({parameter_key(n): nn.Linear(width, rank, False) for n in self.names})
        for layer in (*self.heads.values(), *self.keys.values()):
            nn.init.zeros_(layer.weight)

    def forward(self, lm, ids, valid=None):
        memory = self.update(lm, ids, valid=valid)
        return self.delta_of(memory), memory.state

    def delta_of(self, memory: Memory) -> LowRankDelta:
        """U = P sum_t z_t k_t^T of every map."""
        return self._delta({name: self.heads[parameter_key(name)].weight @ memory.sums[name] for name in self.names})

    def update(
        self, lm: LanguageModel, ids: Tensor, memory: Memory | None = None, valid: Tensor | None = None
    ) -> Memory:
        """The memory after (more of) a prompt. Pieces of any lengths give the memory of the whole.

        Args:
            ids: (B, T), left-padded where `valid` (B, T) is False.
            memory: of what was read before, never changed; None for nothing. It rules out padding.
        Raises:
            UserError: there is both a memory and padding.
        """
        z, keys, state, last = self._terms(lm, ids, memory, valid)
        sums = {name: z.transpose(1, 2) @ k for name, k in keys.items()}  # sum_t z_t k_t^T
        if memory is not None:
            sums = {name: memory.sums[name] + new for name, new in sums.items()}
        return Memory(sums, state, last)

    def _terms(
        self, lm: LanguageModel, ids: Tensor, memory: Memory | None, valid: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], RecurrentState, LastToken]:
        """z_t (B, T', H), and by map the keys k_t (B, T', r), zero at padding, of the tokens that have a label; state
        and last token. T' is T - 1, or T where a memory's last token now gets its label."""
        if memory is not None and valid is not None:
            raise UserError("a prompt that is continued cannot be padded in between; give pieces of equal length")
        with torch.no_grad(), captured_inputs(lm, self.names) as inputs:
            hidden, state = lm.step_through(ids, None if memory is None else memory.state, valid)
            features = self._features(hidden, lm.embed(ids))
        labels = features[:, memory is None :, hidden.shape[-1] :]
        reads = {}
        for name in self.names:  # V^T x_t, in the generator's precision, whatever the model's
            v = self.directions(name)
            reads[name] = inputs[name].detach().to(v.dtype) @ v
        if memory is not None:
            features = torch.cat([memory.last.features[:, None], features], 1)
            reads = {name: torch.cat([memory.last.reads[name][:, None], read], 1) for name, read in reads.items()}
        last = LastToken(features[:, -1], {name: read[:, -1] for name, read in reads.items()})
        z = self.mlp(torch.cat([features[:, :-1], labels if self.label else torch.zeros_like(labels)], -1))
        keys = {name: read[:, :-1] + self.keys[parameter_key(name)](z) for name, read in reads.items()}
        if valid is not None:
            keys = {name: k * valid[:, :-1, None] for name, k in keys.items()}
        return z, keys, state, last

    def _features(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """What the generator sees of tokens, (B, T, 2 D)."""
        return torch.cat([hidden, embedded], -1)

    @torch.no_grad()
    def read_text(self, lm: LanguageModel, text: str | Sequence[int], memory: Memory | None = None) -> Memory:
        """The memory after one text of any length, or after more of one, read in pieces.

        `delta_of` makes its delta. See `several_prompts` for several prompts in one memory.

        Args:
            text: or its token ids.
            memory: of what was read before, never changed; None for nothing.
        Raises:
            UserError: the text is empty or longer than the model's window, or the generator was trained for another
                model.
        """
        check_model(self.fingerprint, lm)
        self.eval()  # no dropout
        ids, _ = lm.encode_prompts([text], memory and memory.state)
        lm.check_fits(ids)
        for piece in ids.split(_PIECE, 1):
            memory = self.update(lm, piece, memory)
        return memory

    @torch.no_grad()
    def prompt_keys(self, lm, ids, valid=None):
        """The keys that a prompt is written under, k_t = V^T x_t + K z_t, (B, T - 1, r), zero at padding: they are
        nearer to a question's than V^T x_t alone."""
        return self._terms(lm, ids, None, valid)[1]
