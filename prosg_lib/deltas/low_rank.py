"""Low-rank gradients, and low-rank changes of weights that are applied without touching the weights.

The gradient of a linear map's weight is a sum of outer products, one a token: G = sum_t delta_t x_t^T, with x_t the
map's input and delta_t the gradient at its output. Everything here works on the two factors and never on G.

Glossary of shapes: B batch, T tokens, r rank; U (B, out, r), V (B, in, r).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor, nn

from prosg_lib import files
from prosg_lib.deltas import peft
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
        peft.save(folder, changes, transposed, base_model)

    @classmethod
    def load_peft(cls, folder: str | Path, lm: LanguageModel) -> Self:
        """Read a LoRA adapter that `save_peft` or PEFT itself wrote, as a change of this model, of batch 1 and scale 1.

        The folder does not say which weights the adapter is for; whether they are this model's is for you to know.

        Raises:
            UserError: files are missing or damaged; the adapter is more than a low-rank change (DoRA, biases, modules
                saved whole), or changes what this model has not.
        """
        own = {lm.hf_module_name(name): name for name in lm.editable()}
        found = peft.load(folder)
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
