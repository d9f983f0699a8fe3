"""The interface of every backbone. It answers four questions: what are logits and state after some tokens,
which linear maps may be edited, how large is the state, and what identifies the model?

Everything above the backbones works through this interface and knows no model family.
"""

from __future__ import annotations

import hashlib
import json
import operator
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Self

import torch
from torch import Tensor, nn

from prosg_lib.backbones import generation
from prosg_lib.backbones.generation import Decoding
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.text.padding import left_padded
from prosg_lib.text.tokenizer import Tokenizer


def as_tuple(tokens: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids as configurations of `transformers` write them (one, a list, or null), as a tuple.

    Raises:
        UserError: they are anything else.
    """
    ids = () if tokens is None else tuple(tokens) if isinstance(tokens, list | tuple) else (tokens,)
    if any(type(token) is not int for token in ids):
        raise UserError(f"eos_token_id is {tokens!r:.60}; it is one token id, a list of them, or null")
    return ids


class LanguageModel(nn.Module, ABC):
    """A language model and its tokenizer. Most are recurrent.

    Subclasses implement `step_through`, `read_out`, `embed` and `editable`, `state_features` where the state has a
    fixed size, and keep a dataclass `config` with at least vocab, width and layers.

    Attributes:
        tokenizer: needed where text goes in or out.
        ends: tokens that end a text, according to the model's files.
        peft_refuses: endings of the names of maps on which PEFT refuses to put an adapter.
        supports_vmap: whether `torch.func.vmap` can run the model with different weights for each example.
        state_grows: whether the state grows with the text, because attention layers keep what they have read.
        short_term: parts of the names of state tensors that hold the last tokens alone, and no memory of the text.
        window: the most tokens that a token sees, itself among them; None: the model has no such limit.
    """

    tokenizer: Tokenizer | None = None
    ends: tuple[int, ...] = ()
    peft_refuses: tuple[str, ...] = ()
    supports_vmap = True
    state_grows = False
    short_term: tuple[str, ...] = ()
    window: int | None = None

    @abstractmethod
    def step_through(
        self, ids: Tensor, state: RecurrentState | None, valid: Tensor | None
    ) -> tuple[Tensor, RecurrentState]:
        """Final hidden states (B, T, D) and the state after the last token; arguments as in `forward`."""

    def hidden_states(self, ids: Tensor, state: RecurrentState | None = None, valid: Tensor | None = None) -> Tensor:
        """Those of `step_through` alone, (B, T, D), where the state afterwards is not needed."""
        return self.step_through(ids, state, valid)[0]

    @abstractmethod
    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab) from final hidden states (..., D)."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings as the first block gets them, (B, T) -> (B, T, D)."""

    @abstractmethod
    def editable(self) -> dict[str, nn.Linear]:
        """The linear maps a delta may change, by module name."""

    def hf_module_name(self, name: str) -> str:
        """The name of an editable map in the equivalent model of `transformers`, which PEFT adapters use."""
        return name

    def state_features(self, state: RecurrentState) -> Tensor:
        """The state as a delta generator reads it, (B, F): free of the arbitrary scale that some states carry.

        Raises:
            UserError: this kind of model has no state of a fixed size.
        """
        raise UserError(f"a {type(self).__name__} has no state of a fixed size; take a recurrent model")

    def select(self, rows: Sequence[int]) -> Self:
        """The model for some rows of a batch, after the other texts have ended. A model is the same for every row."""
        return self

    def check_second_order(self) -> None:
        """Raise a UserError if the model cannot be differentiated twice as it runs here.

        Training through a gradient step needs second derivatives.
        """

    def combine_states(self, states: Sequence[RecurrentState], weights: Sequence[float]) -> RecurrentState:
        """The weighted sum of states of the same batch; `short_term` tensors are those of the first.

        Tensors are summed as they are, which is right where a state is linear in what it holds (the matrices of Mamba-2
        and RWKV-7). A backbone whose tensors mean something else overrides this.

        Raises:
            UserError: the state grows with the text, so there is nothing to add up.
        """
        self.check_fixed_state("added to another")
        first = states[0].tensors
        sums = {
            name: sum(w * s.tensors[name] for s, w in zip(states, weights, strict=True))
            for name in first
            if not any(part in name for part in self.short_term)
        }
        return replace(states[0], tensors=first | sums)

    def state_decay(self, state: RecurrentState) -> RecurrentState:
        """How much of a state is gone one token later, for methods that restore it.

        All of it, unless a backbone overrides this: an upper bound. Where the decay does not depend on the token
        (RWKV-4), it is known exactly.
        """
        return state

    def tunable_state(self, state: RecurrentState) -> tuple[RecurrentState, tuple[str, ...]]:
        """The same state in a form that can be optimised: its named tensors may take any values. Returns both.

        Raises:
            UserError: the state grows with the text.
        """
        self.check_fixed_state("tuned")
        return state, tuple(name for name, t in state.tensors.items() if t.is_floating_point())

    def state_of(self, tensors: dict[str, Tensor]) -> RecurrentState:
        """These tensors as a state of this model."""
        return RecurrentState(tensors, weakref.ref(self))

    def check_state(self, ids: Tensor, state: RecurrentState | None) -> None:
        """Raise a UserError unless there is one state for each sequence, of this model or of one with equal weights."""
        if state is None:
            return
        if not isinstance(state, RecurrentState) or not state.tensors:
            raise UserError(f"state is {_described(state)}; give what derive_state returns, or None")
        if state.batch != len(ids):
            raise UserError(f"{len(ids)} sequences but a state of batch {state.batch}; select() one state per sequence")
        if state.model is None:  # made by hand: it has to look right, at least
            mine = self._shapes(state) == self._shapes(self.blank_state(1))
        else:
            made_by = state.model()
            mine = made_by is self or (type(made_by) is type(self) and made_by.fingerprint() == self.fingerprint())
        if not mine:
            raise UserError("this state was derived with another model; derive it again with this one")

    def _shapes(self, state: RecurrentState) -> dict[str, tuple[int, ...]]:
        """Of one sequence's tensors; where they grow, only the number of dimensions."""
        return {n: (t.ndim,) if self.state_grows else tuple(t.shape[1:]) for n, t in state.tensors.items()}

    def check_fixed_state(self, what: str) -> None:
        """Raise a UserError if the state grows with the text, so that it cannot be `what` (a participle)."""
        if self.state_grows:
            raise UserError(
                f"the state of a {type(self).__name__} grows with the text, so it cannot be {what}; "
                "take a model whose state has a fixed size"
            )

    def check_fits(self, ids: Tensor) -> None:
        """Raise a UserError if a prompt, (B, T), is longer than the window, so that its beginning is lost unread."""
        if self.window is not None and ids.shape[1] > self.window:
            raise UserError(
                f"the prompt has {ids.shape[1]} tokens, more than this model sees, {self.window}; shorten it, give it "
                f"in parts, or load the model with a window of at least {ids.shape[1]}"
            )

    def forward(
        self,
        ids: Tensor,
        state: RecurrentState | None = None,
        delta: LowRankDelta | None = None,
        valid: Tensor | None = None,
        last: int | None = None,
    ) -> tuple[Tensor, RecurrentState]:
        """Logits for every position, or for the last ones, and the state after the last token.

        Args:
            ids: token ids, (B, T).
            state: the state to continue from; None for a blank one. Never changed.
            delta: change of the weights, one per sequence; None for none.
            valid: (B, T), False at left padding. None: all valid.
            last: number of positions at the end to compute logits for, which are costly with a large vocabulary; None:
                all of them.
        Returns:
            logits (B, last or T, vocab), meaningless where not valid; state after the last token.
        Raises:
            UserError: ids are not token ids of this model; there is not one state, or not one delta, for each sequence;
                the state or the delta is another model's.
        """
        if not _is_of(ids, torch.int64, torch.int32) or ids.ndim != 2 or not ids.numel():
            raise UserError(f"ids is {_described(ids)}; give token ids as a tensor, torch.int64 of (B, T)")
        if valid is not None and not (_is_of(valid, torch.bool) and valid.shape == ids.shape):
            raise UserError(f"valid is {_described(valid)}; give a torch.bool for each of the ids, {tuple(ids.shape)}")
        if last is not None and last < 1:
            raise UserError(f"last is {last}; give at least 1, or None for all positions")
        try:
            with applied(self, delta):
                hidden, state = self.step_through(ids, state, valid)
        except IndexError:  # PyTorch's own, which does not name the token
            self._check_vocabulary(int(ids.min()), int(ids.max()))
            raise
        return self.read_out(hidden if last is None else hidden[:, -last:]), state

    def encode_prompts(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], state: RecurrentState | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prompts of different lengths as one left-padded batch: ids (B, T), and valid (B, T), False at padding.

        What the tokenizer's files put in front of a text (`<bos>`) is added, unless the text continues from a `state`.

        Raises:
            UserError: a prompt is empty, or has a token outside the vocabulary.
        """
        if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
            what = "one string" if isinstance(prompts, str) else _described(prompts)
            raise UserError(f"prompts is {what}; pass a list of prompts, [prompt] for a single one")
        if len(prompts) == 0:
            raise UserError("the list of prompts is empty; pass at least one prompt")
        rows = [self._ids_of(number, prompt, state is None) for number, prompt in enumerate(prompts)]
        ids, valid = left_padded(rows)
        device = next(self.parameters()).device
        return ids.to(device), valid.to(device)

    def _ids_of(self, number: int, prompt: str | Sequence[int], whole: bool) -> list[int]:
        """Token ids of a prompt, the `number`-th; a UserError if it has none, or has one that the model cannot read."""
        try:
            if isinstance(prompt, bytes):
                raise TypeError
            row = self._encoded(prompt, whole) if isinstance(prompt, str) else [operator.index(t) for t in prompt]
        except TypeError as error:
            raise UserError(f"prompt {number} is neither a text nor a list of whole numbers, token ids") from error
        if not row:
            raise UserError(f"prompt {number} is empty; a prompt needs at least one token")
        self._check_vocabulary(min(row), max(row))
        return list(row)

    def _check_vocabulary(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.config.vocab:
            raise UserError(
                f"token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of "
                f"{self.config.vocab}; was the text encoded with another model's tokenizer?"
            )

    @torch.no_grad()
    def derive_state(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        state: RecurrentState | None = None,
        delta: LowRankDelta | None = None,
    ) -> RecurrentState:
        """The state after each prompt, as a batch, free of padding; continues from `state` if one is given."""
        ids, valid = self.encode_prompts(prompts, state)
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
        """Continuations of a batch of prompts, greedy or sampled, in constant memory for recurrent models. Each ends
        before a stop string, at the model's end-of-text token, or after `max_new_tokens`.

        Args:
            prompts: texts or token ids, of any lengths.
            state, delta: as in `forward`; one per prompt. Never changed.
            max_new_tokens, stop, temperature, top_k, top_p, seeds, ignore_eos: see `generation.Decoding`.
        Returns:
            One text per prompt, without the prompt and without what ended it. A model without a tokenizer takes token
            ids and stop=None, and returns a list of token ids per prompt.
        Raises:
            UserError: an argument is out of range; prompts, states, deltas or seeds differ in number.
        """
        decoding = Decoding(max_new_tokens, stop, temperature, top_k, top_p, seeds, ignore_eos)
        return generation.generate(self, prompts, state, delta, decoding)

    def stream(self, prompts, state=None, delta=None, max_new_tokens=32, stop="\n", **sampling) -> Iterator[Tensor]:
        """The tokens of `generate` one step at a time, (B,) a step, -1 for a sequence that has ended.

        The token that ends a text is itself given as -1, and so is the one that completes a stop string; where a stop
        string spans several tokens, the earlier ones have been given out by then.
        """
        return generation.stream(self, prompts, state, delta, Decoding(max_new_tokens, stop, **sampling))

    def stream_text(
        self, prompts, state=None, delta=None, max_new_tokens=32, stop="\n", **sampling
    ) -> Iterator[list[str]]:
        """The texts of `generate` piece by piece: what is new in each, "" where there is nothing to show yet.

        Pieces consist of whole characters; what may turn out to begin a stop string is held back.
        """
        return generation.stream_text(self, prompts, state, delta, Decoding(max_new_tokens, stop, **sampling))

    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the model's files, and the tokenizer's own."""
        return self.ends + (() if self.tokenizer is None else self.tokenizer.ends)

    def _encoded(self, text: str, whole: bool) -> tuple[int, ...]:
        tokenizer = self.needed_tokenizer()
        ids = tokenizer.encode(text)
        return tokenizer.starts + ids if whole and ids else ids

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises a UserError if there is none."""
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer; set lm.tokenizer to the one it was trained with: load_tokenizer(PATH) of "
                "prosg_lib.text.tokenizer for a tokenizer.json, load_world_tokenizer(PATH) of "
                "prosg_lib.text.world_tokenizer for RWKV's rwkv_vocab_*.txt; or work on token ids and stop=None"
            )
        return self.tokenizer

    def fingerprint(self) -> str:
        """Sixteen hex digits that identify this model: a hash of its configuration and every weight.

        Computed again when a weight has changed, even if PyTorch does not count the change: through `weight.data`, or
        in another framework that shares the memory. The check costs about as much as adding up the weights.
        """
        weights = list(self.state_dict().values())
        sums = torch.stack([bit_sum(t) for t in weights]).tolist() if weights else []  # one transfer from the device
        key = [(t.data_ptr(), t._version) for t in weights], sums
        if getattr(self, "_fingerprint", (None,))[0] != key:
            self._fingerprint = (key, fingerprint(self, json.dumps(asdict(self.config), sort_keys=True)))
        return self._fingerprint[1]


def _is_of(value: object, *dtypes: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype in dtypes


def _described(value: object) -> str:
    """What a value is, for messages."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as eight-byte integers: it changes if any one number of the tensor does."""
    tensor = tensor.detach()
    try:
        words = tensor.view(torch.int64)
    except RuntimeError:  # its rows, or its place in memory, are not aligned to eight bytes
        words = nn.functional.pad(tensor.reshape(-1), (0, -tensor.numel() % 8)).view(torch.int64)
    return words.sum()


def fingerprint(module: nn.Module, description: str = "") -> str:
    """Sixteen hex digits that identify a module: a hash of a description (its configuration) and every weight."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
