"""The synthetic gradient: from what a recurrent model makes of a prompt to a low-rank change of its weights.

After the abstract of ProSG (arXiv 2311.01981); its base model, rank, layers and losses are not public, so all of them
here are our reading. Two generators, both forward only, both without effect before training (last layer zero):

- `FinalStateGenerator`: U from the state after the prompt alone. The most literal reading; it cannot know what the
  state has forgotten already.
- `TokenGenerator`: the true gradient is G = sum_t delta_t x_t^T. Predict delta_t from the hidden state at t, token t
  and the next prompt token (the label; conditional DNI, Jaderberg et al. 2016, section 2), read the real inputs x_t
  along r learned directions V shared by all prompts, and add a predicted part: U = sum_t delta_t (V^T x_t + K z_t)^T,
  z_t being what delta_t is predicted from, too. A sum over tokens, so that it streams and adds.

`StaticDelta` is their control: a change of the same size, trained alike, blind to the prompt.

Glossary of shapes: B batch, T prompt tokens, D model width, H hidden width, r rank, F state features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import UserError
from prosg_lib.lowrank import Factors, LogitsOf, LowRankDelta, captured_inputs, sizes, with_delta
from prosg_lib.state import Normaliser, RecurrentState
from prosg_lib.tasks.pair_batches import Rows

SCALE = 0.1
"""Of the synthetic gradient, as in DNI: sums over a hundred tokens would otherwise break the model at first."""


DROPOUT = 0.1
"""Of what a generator reads, while it trains: without it, the wording of the training prompts is learned by heart."""


EVERY = ("",)
"""Endings that every editable map of a model has, whatever its class calls them."""


def edited_maps(lm: LanguageModel, endings: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The editable maps of every block whose name ends so, e.g. "att.output".

    Raises:
        UserError: no map ends so.
    """
    maps = lm.editable()
    for ending in endings:
        if not any(name.endswith(ending) for name in maps):
            raise UserError(f"this model has no linear map ...{ending}; it has {', '.join(maps)}")
    return {name: module for name, module in maps.items() if name.endswith(endings)}


def _directions(maps: dict[str, nn.Linear], rank: int) -> nn.ParameterDict:
    """The reading directions V (in, r) of every map."""
    for name, module in maps.items():
        if not 1 <= rank <= min(sizes(module)):
            raise UserError(
                f"rank {rank} asked for, but {name} is {tuple(sizes(module))}; a change of it has rank 1 to "
                f"{min(sizes(module))}"
            )
    return nn.ParameterDict(
        {key(name): nn.Parameter(torch.randn(sizes(m)[1], rank) / sizes(m)[1] ** 0.5) for name, m in maps.items()}
    )


def key(name: str) -> str:
    """A module's name as one of a parameter dictionary, which allows no dots."""
    return name.replace(".", "_")


class Generator(nn.Module, ABC):
    """A prompt, as a recurrent model has read it -> LowRankDelta.

    Attributes:
        names: the maps that are changed.
        V: the reading directions, shared by all prompts.
    """

    def __init__(self, lm: LanguageModel, rank: int, endings: tuple[str, ...]):
        super().__init__()
        maps = edited_maps(lm, endings)
        self.names = list(maps)
        self.V = _directions(maps, rank)
        self.outs = {name: sizes(m)[0] for name, m in maps.items()}
        self.rank = rank
        self.fingerprint = lm.fingerprint()

    def _delta(self, u: dict[str, Tensor]) -> LowRankDelta:
        return LowRankDelta({n: Factors(u[n], self.V[key(n)][None]) for n in self.names}, self.fingerprint, SCALE)

    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the statistics that it needs over a batch of prompts, once, before training; as a rule none."""

    @abstractmethod
    def forward(
        self, lm: LanguageModel, ids: Tensor, valid: Tensor | None = None
    ) -> tuple[LowRankDelta, RecurrentState]:
        """The change for each prompt of a left-padded batch (B, T), and the state after the prompt.

        The model itself is only run forward and gets no gradient; the change has one for the generator's parameters.
        """

    @torch.no_grad()
    def keys_of(self, lm: LanguageModel, ids: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """By map the keys under which a change of this generator is looked up by a prompt's own tokens, V^T x_t.

        Args:
            ids: (B, T), left-padded where `valid` (B, T) is False.
        Returns:
            map -> (B, T, r), zero at padding.
        """
        with captured_inputs(lm, self.names) as inputs:
            lm.step_through(ids, None, valid)
        told = 1.0 if valid is None else valid[..., None]
        return {name: inputs[name] @ self.V[key(name)] * told for name in self.names}

    def after(self, lm: LanguageModel, contexts: Rows, successive: bool) -> LogitsOf:
        """The model after its contexts, (B, 1, C): see `gradient_step.Way`.

        Raises:
            UserError: more than one context an example.
        """
        if contexts.ids.shape[1] > 1:
            raise UserError("a generator takes one prompt an example; join the contexts to one text")
        return with_delta(lm, self(lm, contexts.ids[:, 0], contexts.valid[:, 0])[0])

    @torch.no_grad()
    def memorize(self, lm: LanguageModel, prompts: list[str] | list[list[int]]) -> LowRankDelta:
        """One change per prompt, forward only.

        Raises:
            UserError: a prompt is empty, or the generator was trained for another model.
        """
        self.check(lm)
        self.eval()  # no dropout
        ids, valid = lm.encode_prompts(prompts)
        return self(lm, ids, None if valid.all() else valid)[0]

    def check(self, lm: LanguageModel) -> None:
        if self.fingerprint != lm.fingerprint():
            raise UserError(
                f"this generator was trained for model {self.fingerprint}, not for this one ({lm.fingerprint()})"
            )


def _chosen(lm: LanguageModel, kinds: tuple[str, ...]) -> Tensor:
    """1 at the state features of these kinds, 0 at the others, (F,)."""
    names = lm.state_feature_names
    unknown = [kind for kind in kinds if kind not in names]
    if unknown or not kinds:
        raise UserError(
            f"no kind of state feature {', '.join(unknown) or 'chosen'}; a {type(lm).__name__} names "
            f"{', '.join(names) or 'none'}"
        )
    of_layer = torch.tensor([float(name in kinds) for name in names]).repeat_interleave(lm.config.width)
    return of_layer.repeat(lm.config.layers)


class FinalStateGenerator(Generator):
    """U from the final state: normalised features -> residual trunk -> one head a map.

    Args:
        features: kinds of state features that it sees (`LanguageModel.state_feature_names`); the others are 0 to it.
            None: all.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rank: int,
        width: int,
        endings: tuple[str, ...],
        features: tuple[str, ...] | None = None,
    ):
        super().__init__(lm, rank, endings)
        self.register_buffer("seen", None if features is None else _chosen(lm, features), persistent=False)
        size = lm.state_features(lm.blank_state(1)).shape[1]
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.inner = nn.Linear(size, width)
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({key(n): nn.Linear(width, out * rank) for n, out in self.outs.items()})
        for head in self.heads.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @torch.no_grad()
    def fit_normaliser(self, lm: LanguageModel, ids: Tensor, valid: Tensor) -> None:
        """Collect the features' statistics over a batch of prompts; once, before training."""
        _, state = lm.step_through(ids, None, valid)
        found = Normaliser.fit(lm.state_features(state))
        self.mean.copy_(found.mean)
        self.std.copy_(found.std)

    def forward(self, lm, ids, valid=None):
        with torch.no_grad():
            _, state = lm.step_through(ids, None, valid)
            features = Normaliser(self.mean, self.std)(lm.state_features(state))
            features = features if self.seen is None else features * self.seen
        h = self.inner(F.dropout(features, DROPOUT, self.training))
        for layer in self.trunk:
            h = h + layer(h)
        h = self.norm(h)
        u = {name: self.heads[key(name)](h).view(-1, out, self.rank) for name, out in self.outs.items()}
        return self._delta(u), state


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


class StaticDelta(Generator):
    """One trained change for every prompt: what a generator would be worth that does not look at the prompt."""

    def __init__(self, lm: LanguageModel, rank: int, endings: tuple[str, ...]):
        super().__init__(lm, rank, endings)
        self.U = nn.ParameterDict({key(n): nn.Parameter(torch.zeros(out, rank)) for n, out in self.outs.items()})

    def forward(self, lm, ids, valid=None):
        with torch.no_grad():
            _, state = lm.step_through(ids, None, valid)
        return self._delta({name: self.U[key(name)].expand(len(ids), -1, -1) for name in self.names}), state
