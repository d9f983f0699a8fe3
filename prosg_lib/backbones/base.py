"""The interface of every backbone: logits and state, editable maps, state size, fingerprint."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Self

import torch
from torch import Tensor, nn

from prosg_lib.backbones import generation
from prosg_lib.backbones.generation import Decoding
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.text.tokenizer import Tokenizer


def as_tuple(tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    """One token, several or none, as configurations of `transformers` have them, as a tuple."""
    return () if tokens is None else (tokens,) if isinstance(tokens, int) else tuple(tokens)


def check_batch(ids: Tensor, state: RecurrentState | None) -> None:
    """Raises UserError if there is not one state per sequence."""
    if state is not None and state.batch != len(ids):
        raise UserError(f"{len(ids)} sequences but a state of batch {state.batch}; select() one state per sequence")


class LanguageModel(nn.Module, ABC):
    """A language model, recurrent as a rule, and its tokenizer.

    Subclasses say how tokens become logits and state (`step_through`), which linear maps may be edited
    (`editable`), what the features of a state are (`state_features`), and keep a dataclass `config`.
    """

    tokenizer: Tokenizer | None = None  # needed where texts go in or out
    ends: tuple[int, ...] = ()  # tokens that end a text, as the model's files say
    peft_refuses: tuple[str, ...] = ()  # endings of the maps that PEFT puts no adapter on
    supports_vmap = True  # whether `torch.func.vmap` can run it with weights of each example's own
    state_feature_names: tuple[str, ...] = ()  # kinds of `state_features`, where each layer has D of each in this order
    state_grows = False  # whether the state grows with the text: attention layers keep what they have read
    short_term: tuple[str, ...] = ()  # parts of names in a state: vectors that only say which tokens came last

    @abstractmethod
    def step_through(
        self, ids: Tensor, state: RecurrentState | None, valid: Tensor | None
    ) -> tuple[Tensor, RecurrentState]:
        """Final hidden states (B, T, D) and the state after the last token; see `forward`."""

    @abstractmethod
    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab) of final hidden states (..., D)."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings as the first block sees them, (B, T) -> (B, T, D)."""

    @abstractmethod
    def editable(self) -> dict[str, nn.Linear]:
        """The linear maps a delta may change, by module name."""

    def hf_module_name(self, name: str) -> str:
        """What an editable map is called in the model of `transformers` that computes the same; adapters use it."""
        return name

    def state_features(self, state: RecurrentState) -> Tensor:
        """What a generator reads of a state, (B, F): every vector on its own scale, gauge removed.

        Raises:
            UserError: this kind of model has no state of a fixed size.
        """
        raise UserError(f"a {type(self).__name__} has no state of a fixed size; take a recurrent model")

    def select(self, rows: Sequence[int]) -> Self:
        """The model for some sequences of a batch, the others having ended: itself, because it knows nothing of any."""
        return self

    def check_second_order(self) -> None:
        """Nothing, where the model can be differentiated twice, which gradient steps need that are trained through.

        Raises:
            UserError: it cannot, as it runs here; names the class and the remedy.
        """

    def combine_states(self, states: Sequence[RecurrentState], weights: Sequence[float]) -> RecurrentState:
        """The weighted sum of what states of the same batch hold; which tokens came last is the first one's.

        Here every tensor is summed as it is, which is right where a state is linear in what it holds (a matrix of
        Mamba-2 or RWKV-7); a backbone whose tensors mean something else overrides it.

        Raises:
            UserError: the state grows with the text, so that there is nothing to add up.
        """
        self.check_fixed_state("added to another")
        first = states[0].tensors
        sums = {
            name: sum(w * s.tensors[name] for s, w in zip(states, weights, strict=True))
            for name in first
            if not any(part in name for part in self.short_term)
        }
        return RecurrentState(first | sums)

    def state_decay(self, state: RecurrentState) -> RecurrentState:
        """What of a state is gone one token later, for those who make up for it. Here: all of it, an upper bound; a
        backbone that forgets at a rate of its own, whatever the token, knows better."""
        return state

    def tunable_state(self, state: RecurrentState) -> tuple[RecurrentState, tuple[str, ...]]:
        """The same state in a form whose named tensors may be changed freely, each number on its own, and the names.

        Raises:
            UserError: the state grows with the text.
        """
        self.check_fixed_state("tuned")
        return state, tuple(name for name, t in state.tensors.items() if t.is_floating_point())

    def check_fixed_state(self, what: str) -> None:
        """Raises a UserError where the state grows with the text, so that it cannot be `what`."""
        if self.state_grows:
            raise UserError(
                f"the state of a {type(self).__name__} grows with the text, so it cannot be {what}; "
                "take a model whose state has a fixed size"
            )

    def forward(
        self,
        ids: Tensor,
        state: RecurrentState | None = None,
        delta: LowRankDelta | None = None,
        valid: Tensor | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """Logits for every position, or for the last ones, and the state to go on from.

        Args:
            ids: token ids, (B, T).
            state: where to go on from; None for a blank state. Never changed.
            delta: change of the weights, one per sequence; None for none.
            valid: (B, T), False at left padding. None: all valid.
            last: so many positions at the end; None: all. Others are not read out, which a large vocabulary makes dear.
        Returns:
            logits (B, last or T, vocab); meaningless where not valid. State after the last token.
        """
        with applied(self, delta):
            hidden, state = self.step_through(ids, state, valid)
        return self.read_out(hidden if last is None else hidden[:, -last:]), state

    def encode_prompts(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts of different lengths as one left-padded batch: ids (B, T) and valid (B, T)."""
        if isinstance(prompts, str):
            raise UserError("prompts is one string; pass a list of prompts, [prompt] for a single one")
        if len(prompts) == 0:
            raise UserError("the list of prompts is empty; pass at least one prompt")
        rows = [list(self.needed_tokenizer().encode(p) if isinstance(p, str) else p) for p in prompts]
        for i, row in enumerate(rows):
            if not row:
                raise UserError(f"prompt {i} is empty; a prompt needs at least one token")
        longest = max(map(len, rows))
        device = next(self.parameters()).device
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=device)
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self.config.vocab:
            raise UserError(
                f"token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of "
                f"{self.config.vocab}; was the text encoded with another model's tokenizer?"
            )
        lengths = torch.tensor([len(r) for r in rows], device=device)
        valid = torch.arange(longest, device=device) >= (longest - lengths)[:, None]
        return ids, valid

    @torch.no_grad()
    def derive_state(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        state: RecurrentState | None = None,
        delta: LowRankDelta | None = None,
    ) -> RecurrentState:
        """The state after each prompt, batched, right whatever the padding; goes on from `state` if one is given."""
        ids, valid = self.encode_prompts(prompts)
        with applied(self, delta):
            _, state = self.step_through(ids, state, None if valid.all() else valid)
        return state

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        state: RecurrentState | None = None,
        delta: LowRankDelta | None = None,
        max_new_tokens: int = 32,
        stop: str | Sequence[str | None] | None = "\n",
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        ignore_eos: bool = False,
    ) -> list[str] | list[list[int]]:
        """Continuations of a batch of prompts, the likeliest or drawn, in constant memory. Each ends at a stop string,
        where the model ends it, or after `max_new_tokens`; what has ended is not computed for long.

        Args:
            prompts: texts or token ids, of any lengths.
            state, delta: as in `forward`; one per prompt. Never changed.
            max_new_tokens, stop, temperature, top_k, top_p, seeds, ignore_eos: see `generation.Decoding`.
        Returns:
            One text a prompt, without the prompt and without what ended it. Where the model has no tokenizer, which
            needs prompts of token ids and stop=None: one list of token ids a prompt.
        Raises:
            UserError: a value that cannot be meant; prompts, states, changes or seeds of different numbers.
        """
        how = Decoding(max_new_tokens, stop, temperature, top_k, top_p, seeds, ignore_eos)
        return generation.generate(self, prompts, state, delta, how)

    def stream(self, prompts, state=None, delta=None, max_new_tokens=32, stop="\n", **drawing) -> Iterator[Tensor]:
        """The tokens of `generate` as they come, (B,) a step, -1 for a sequence that has ended.

        The token that ends a text is -1 already, and so is the one that completes a stop string; where that spans
        several, those before were out by then.
        """
        return generation.stream(self, prompts, state, delta, Decoding(max_new_tokens, stop, **drawing))

    def stream_text(
        self, prompts, state=None, delta=None, max_new_tokens=32, stop="\n", **drawing
    ) -> Iterator[list[str]]:
        """The texts of `generate` as they come: the new piece of each, "" where there is nothing to show yet.

        Pieces are of whole characters, and hold back what may turn out to be the beginning of a stop string.
        """
        return generation.stream_text(self, prompts, state, delta, Decoding(max_new_tokens, stop, **drawing))

    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the model's files, and its tokenizer's own."""
        return self.ends + (() if self.tokenizer is None else self.tokenizer.ends)

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer; set lm.tokenizer = load_tokenizer(PATH) to the one it was trained with, "
                "or work on token ids and stop=None"
            )
        return self.tokenizer

    def fingerprint(self) -> str:
        """Sixteen hex digits that name this model: its configuration and every weight."""
        key = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if getattr(self, "_fingerprint", (None,))[0] != key:
            self._fingerprint = (key, fingerprint(self, json.dumps(asdict(self.config), sort_keys=True)))
        return self._fingerprint[1]


def fingerprint(module: nn.Module, made_as: str = "") -> str:
    """Sixteen hex digits that name a module: what it was made as, in words of one's own, and every weight."""
    digest = hashlib.sha256(made_as.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
