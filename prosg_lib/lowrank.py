"""Low-rank gradients, and low-rank changes of weights that are applied without touching the weights.

The gradient of a linear map's weight is a sum of outer products, one a token: G = sum_t delta_t x_t^T, with x_t the
map's input and delta_t the gradient at its output. Everything here works on the two factors and never on G.

Glossary of shapes: B batch, T tokens, r rank; U (B, out, r), V (B, in, r).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from prosg_lib import adapters, files
from prosg_lib.errors import UserError

if TYPE_CHECKING:
    from prosg_lib.backbones.base import LanguageModel


class Factors(NamedTuple):
    """One map's change: U (B, out, r), V (B, in, r). B may be 1 for a factor that all sequences share."""

    U: Tensor
    V: Tensor


@dataclass(frozen=True)
class LowRankDelta:
    """A change of some linear maps, W' = W + scale U V^T, one per sequence of a batch.

    Attributes:
        factors: module name -> Factors.
        fingerprint: of the model that the change was made for.
        scale: multiplies every change.
    """

    factors: Mapping[str, Factors]
    fingerprint: str
    scale: float = 1.0

    @property
    def batch(self) -> int:
        return max(max(f.U.shape[0], f.V.shape[0]) for f in self.factors.values())

    @property
    def rank(self) -> int:
        return max(f.U.shape[2] for f in self.factors.values())

    def nbytes(self) -> int:
        """Bytes of one sequence's change; factors shared by the whole batch count once."""
        return sum(t[0].numel() * t.element_size() for f in self.factors.values() for t in f)

    def scaled(self, factor: float) -> Self:
        return replace(self, scale=self.scale * factor)

    def select(self, rows) -> Self:
        """The changes of some sequences; rows may repeat. Shared factors stay shared."""
        return self._map(lambda t: t if t.shape[0] == 1 and self.batch > 1 else t[rows])

    def detach(self) -> Self:
        return self._map(Tensor.detach)

    def to(self, *args, **kwargs) -> Self:
        return self._map(lambda t: t.to(*args, **kwargs))

    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, factors={n: Factors(f(u), f(v)) for n, (u, v) in self.factors.items()})

    def __add__(self, other: Self) -> Self:
        """Both changes at once: adds U where the reading directions V are the same, else concatenates ranks.

        Raises:
            UserError: changes of different models, or of batches that do not fit.
        """
        return self._with(other, add=True)

    def __radd__(self, other: int) -> Self:
        """For `sum`, which begins with 0."""
        return self if other == 0 else NotImplemented

    def beside(self, other: Self) -> Self:
        """The same change as the sum, always with concatenated ranks: U and V of each stay as they are."""
        return self._with(other, add=False)

    def _with(self, other: Self, add: bool) -> Self:
        if self.fingerprint != other.fingerprint:
            raise UserError(
                f"cannot add a delta for model {other.fingerprint} to one for {self.fingerprint}; "
                "derive both with the same model"
            )
        if len({1, self.batch, other.batch}) > 2:
            raise UserError(f"cannot add deltas of batch {self.batch} and {other.batch}; select() as many of each")
        total = dict(self._scaled_into_u(self.scale).factors)
        for name, (u, v) in other._scaled_into_u(other.scale).factors.items():
            if name not in total:
                total[name] = Factors(u, v)
            elif add and (total[name].V is v or (total[name].V.shape == v.shape and torch.equal(total[name].V, v))):
                total[name] = Factors(total[name].U + u, v)
            else:
                mine = total[name]
                n = max(len(mine.U), len(mine.V), len(u), len(v))
                both = (
                    torch.cat([a.expand(n, -1, -1), b.expand(n, -1, -1)], 2) for a, b in zip(mine, (u, v), strict=True)
                )
                total[name] = Factors(*both)
        return replace(self, factors=total, scale=1.0)

    def _scaled_into_u(self, factor: float) -> Self:
        return replace(self, factors={n: Factors(u * factor, v) for n, (u, v) in self.factors.items()}, scale=1.0)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically."""
        tensors = {f"{name}.{part}": t for name, f in self.factors.items() for part, t in zip("UV", f, strict=True)}
        files.save_tensors(path, tensors, {"kind": "delta", "fingerprint": self.fingerprint, "scale": self.scale})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged or no delta.
        """
        tensors, meta = files.load_tensors(path)
        if meta.get("kind") != "delta":
            raise UserError(f"{path} holds a {meta.get('kind', 'file of unknown kind')}, not a delta")
        names = sorted({name.rsplit(".", 1)[0] for name in tensors})
        try:
            factors = {name: Factors(tensors[f"{name}.U"], tensors[f"{name}.V"]) for name in names}
            return cls(factors, meta["fingerprint"], meta["scale"])
        except KeyError as error:
            raise UserError(f"{path} is no complete delta, it lacks {error}; save it again") from error

    @torch.no_grad()
    def merged(self, lm: LanguageModel) -> LanguageModel:
        """A new model with the change in its weights, W + scale U V^T; `lm` stays as it is, and the two share nothing
        but the tokenizer.

        Raises:
            UserError: the change is one of several sequences, which no weights can be, or another model's.
        """
        maps_of(lm, self)  # only to check
        other = copy.deepcopy(lm, {id(lm.tokenizer): lm.tokenizer})
        for name, (u, v) in self._only().items():
            module = other.editable()[name]
            wide = torch.promote_types(module.weight.dtype, torch.float32)
            change = self.scale * u.to(wide) @ v.to(wide).t()
            module.weight.copy_(module.weight.to(wide) + (change if isinstance(module, nn.Linear) else change.t()))
        return other

    def save_peft(self, folder: str | Path, lm: LanguageModel, base_model: str | None = None) -> None:
        """Write a LoRA adapter that `peft.PeftModel.from_pretrained(model, folder)` loads, atomically file by file.

        `model` is what computes the same as `lm` in `transformers`: for an RWKV-4 the one that `save_model` writes.
        (Where its config.json has another `rescale_every` than 0, as RWKV's own have, it divides weights in place that
        PEFT knows nothing of; load it with `rescale_every=0`.)

        Args:
            base_model: the hub id or folder of that model, for the adapter's description; `AutoPeftModelForCausalLM`
                needs it.
        Raises:
            UserError: the change is one of several sequences, another model's, or of maps that PEFT refuses.
        """
        maps = maps_of(lm, self)
        refused = [name for name in maps if lm.peft_refuses and name.endswith(lm.peft_refuses)]
        if refused:
            raise UserError(
                f"PEFT puts no adapter on {refused[0]} of a {type(lm).__name__} ({len(refused)} such maps here); "
                "hand on merged(lm), or derive the change by a generator of other maps"
            )
        changes = {lm.hf_module_name(name): (self.scale * u, v) for name, (u, v) in self._only().items()}
        transposed = not all(isinstance(module, nn.Linear) for module in maps.values())
        adapters.save(folder, changes, transposed, base_model)

    @classmethod
    def load_peft(cls, folder: str | Path, lm: LanguageModel) -> Self:
        """Read a LoRA adapter that `save_peft` or PEFT itself wrote, as a change of this model, of batch 1 and scale 1.

        The folder does not say which weights the adapter is for; whether they are this model's is for you to know.

        Raises:
            UserError: files are missing or damaged; the adapter is more than a low-rank change (DoRA, biases, modules
                saved whole), or changes what this model has not.
        """
        own = {lm.hf_module_name(name): name for name in lm.editable()}
        found = adapters.load(folder)
        unknown = found.keys() - own.keys()
        if unknown:
            raise UserError(
                f"{folder} changes {', '.join(sorted(unknown))}, which is no map of this model that can be changed "
                f"(those are {', '.join(own)})"
            )
        for name, (u, v) in found.items():
            if (len(u), len(v)) != sizes(lm.editable()[own[name]]):
                raise UserError(
                    f"{folder} is for another model: there, {name} has {len(u)} outputs and {len(v)} inputs, "
                    f"here {' and '.join(map(str, sizes(lm.editable()[own[name]])))}"
                )
        return cls({own[name]: Factors(u[None], v[None]) for name, (u, v) in found.items()}, lm.fingerprint())

    def _only(self) -> dict[str, tuple[Tensor, Tensor]]:
        """U (out, r) and V (in, r) of every map, where there is one change and not several.

        Raises:
            UserError: there are several.
        """
        if self.batch != 1:
            raise UserError(f"this delta is one of {self.batch} sequences, and weights hold one; select([i]) one first")
        return {name: (u[0], v[0]) for name, (u, v) in self.factors.items()}


def sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear map; GPT-2's Conv1D keeps its weight transposed."""
    return tuple(module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape))


def applied(lm: LanguageModel, delta: LowRankDelta | None) -> AbstractContextManager[None]:
    """While it lasts, y = x W^T + scale (x V) U^T in every map that the delta names; W itself is never written.

    Checked and prepared here, once; what is returned may be entered again and again, as generation does at every step.

    Raises:
        UserError: the delta was made for another model, or names a map that this one does not have.
    """
    return nullcontext() if delta is None else _Applied(maps_of(lm, delta), delta)


def maps_of(lm: LanguageModel, delta: LowRankDelta) -> dict[str, nn.Module]:
    """The maps of the model that the delta changes, by name.

    Raises:
        UserError: the delta was made for another model, names a map that this one does not have, or is of
            whole numbers.
    """
    if delta.fingerprint != lm.fingerprint():
        raise UserError(
            f"this delta was made for model {delta.fingerprint}, not for this one ({lm.fingerprint()}); "
            "derive it again with this model"
        )
    maps = lm.editable()
    unknown = delta.factors.keys() - maps.keys()
    if unknown:
        raise UserError(
            f"the delta changes {', '.join(sorted(unknown))}, which this model has not (it has {', '.join(maps)})"
        )
    for name, pair in delta.factors.items():
        if not all(t.is_floating_point() for t in pair):  # a cast cut everything off behind the point
            kinds = " and ".join(sorted({str(t.dtype) for t in pair}))
            raise UserError(f"the delta's factors of {name} are {kinds}; a change of weights is of floating point")
    return {name: maps[name] for name in delta.factors}


class _Applied(AbstractContextManager):
    def __init__(self, maps: dict[str, nn.Module], delta: LowRankDelta):
        self._adders = [(maps[name], _Adder(f, delta.scale, maps[name])) for name, f in delta.factors.items()]
        self._handles = None

    def __enter__(self) -> None:
        if self._handles is not None:  # so it is entered again and again
            for _, adder in self._adders:
                adder.lay_out()
        self._handles = [module.register_forward_hook(adder) for module, adder in self._adders]

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()


class _Adder:
    """Adds scale (x V) U^T to what a linear map says, as a forward hook of it."""

    def __init__(self, factors: Factors, scale: float, module: nn.Module):
        self.u, self.v = (t.to(module.weight.dtype).transpose(1, 2) for t in factors)  # (B, r, out), (B, r, in)
        self.scale = scale

    def lay_out(self) -> None:
        """Order the factors in memory as single tokens need them: a step takes a third of the time then, and the copy
        takes as long as a few steps."""
        self.u, self.v = self.u.contiguous(), self.v.contiguous()

    def __call__(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        (x,) = args
        u, v = self.u.to(x.dtype), self.v.to(x.dtype)
        if not {len(u), len(v)} <= {1, len(x)}:
            raise UserError(f"{len(x)} sequences but a delta of batch {max(len(u), len(v))}; select() one per sequence")
        read = x @ v[0].t() if len(v) == 1 else torch.bmm(x, v.transpose(1, 2))  # (B, T, r)
        return torch.baddbmm(out, read, u.expand(len(x), -1, -1), alpha=self.scale)


class LogitsOf(Protocol):
    """A model that has taken something in, as a function."""

    def __call__(self, ids: Tensor, valid: Tensor | None, last: int | None = None) -> Tensor:
        """Logits (B, T, vocab) after token ids (B, T), `valid` where they are no padding; or of the `last` so many
        positions alone, (B, last, vocab)."""


def with_delta(lm: LanguageModel, delta: LowRankDelta | None) -> LogitsOf:
    """The model with a change, from a blank state."""
    return lambda ids, valid, last=None: lm(ids, None, delta, valid, last)[0]


@contextmanager
def captured_inputs(lm: LanguageModel, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, what is read leaves the inputs x of the named maps, (B, T, in), in the dict it yields.

    T: all tokens read, one piece after the other, because some models read a batch in pieces.
    """
    inputs: dict[str, Tensor] = {}
    maps = lm.editable()

    def keep(name):
        def hook(module, args):
            inputs[name] = torch.cat([inputs[name], args[0]], 1) if name in inputs else args[0]

        return hook

    handles = [maps[name].register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(lm: LanguageModel, names: Iterable[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """While it lasts, what is read leaves the inputs and outputs of the named maps in the dict it yields: name -> a
    pair (B, T, in), (B, T, out) for each pass, of which there are several where a text is read in pieces.

    Outputs can be differentiated by, also where all weights are frozen.
    """
    passes: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def keep(name):
        def hook(module, args, out):
            out = out if out.requires_grad else out.detach().requires_grad_()  # the graph has to start somewhere
            passes[name].append((args[0], out))
            return out

        return hook

    maps = lm.editable()
    handles = [maps[name].register_forward_hook(keep(name)) for name in passes]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


class TokenFactors(NamedTuple):
    """A gradient as a sum over tokens, G = delta^T x: delta (..., tokens, out), x (..., tokens, in)."""

    delta: Tensor
    x: Tensor


def sequence_factors(lm: LanguageModel, names: list[str], loss_of: Callable[[], Tensor]) -> dict[str, TokenFactors]:
    """Per-token factors of the weight gradient of each named map, from one backward pass, one row a sequence.

    Args:
        names: editable maps.
        loss_of: runs the model's forward pass and returns a scalar loss.
    Returns:
        name -> TokenFactors, delta (B, T, out) and x (B, T, in), T being all tokens that were read. Where the loss is a
        sum over sequences, a row's product delta.T @ x is the gradient of that sequence's own loss.
    """
    with torch.enable_grad(), watched(lm, names) as passes:
        loss = loss_of()
    seen = {name: tuple(each) for name, each in passes.items()}  # blocks that are run again add to `passes`
    grads = iter(torch.autograd.grad(loss, [out for name in names for _, out in seen[name]]))
    return {
        name: TokenFactors(
            torch.cat([next(grads) for _ in seen[name]], 1).detach(),
            torch.cat([x for x, _ in seen[name]], 1).detach(),
        )
        for name in names
    }


def gradient_factors(lm: LanguageModel, names: list[str], loss_of: Callable[[], Tensor]) -> dict[str, TokenFactors]:
    """As `sequence_factors`, of the whole batch at once: delta (B T, out), x (B T, in); delta.T @ x equals the
    weight's gradient."""
    found = sequence_factors(lm, names, loss_of)
    return {name: TokenFactors(*(t.flatten(0, 1) for t in factors)) for name, factors in found.items()}


def spectrum(factors: TokenFactors) -> Tensor:
    """Singular values of G = delta^T x, largest first, (..., min(tokens, in, out)), without forming G."""
    return _thin_svd(factors)[1]


def best_rank(factors: TokenFactors, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` approximation of G = delta^T x, without forming G (Eckart-Young).

    Returns:
        U (..., out, rank), V (..., in, rank) with U V^T the truncated SVD of G.
    Raises:
        UserError: rank is not in 1 .. min(tokens, out, in); the gradient has no more directions than that.
    """
    u, s, v = _thin_svd(factors)
    if not 1 <= rank <= s.shape[-1]:
        raise UserError(f"rank {rank} asked for, but this gradient has 1 to {s.shape[-1]} directions")
    root = s[..., None, :rank].sqrt()
    return u[..., :rank] * root, v[..., :rank] * root


def _thin_svd(factors: TokenFactors) -> tuple[Tensor, Tensor, Tensor]:
    """delta^T = Q_d R_d and x^T = Q_x R_x, so G = Q_d (R_d R_x^T) Q_x^T: the SVD of a core no larger than tokens."""
    delta, x = factors
    if delta.shape[-2] != x.shape[-2]:
        raise UserError(f"{delta.shape[-2]} rows of delta but {x.shape[-2]} of x; one of each per token")
    q_d, r_d = torch.linalg.qr(delta.mT)
    q_x, r_x = torch.linalg.qr(x.mT)
    u, s, vt = torch.linalg.svd(r_d @ r_x.mT, full_matrices=False)
    return q_d @ u, s, q_x @ vt.mT
