"""LowRankDelta: a low-rank change of some linear maps, one per sequence of a batch.

Glossary of shapes: B batch, r rank; U (B, out, r), V (B, in, r).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from prosg_lib import files
from prosg_lib.deltas import peft
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.strict import read_as


class EditableModel(Protocol):
    """What a delta needs of a model. Every language model of `backbones` has it."""

    tokenizer: object | None
    peft_refuses: tuple[str, ...]  # endings of the maps that PEFT puts no adapter on

    def editable(self) -> dict[str, nn.Linear]:
        """The linear maps that a delta may change, by module name."""

    def fingerprint(self) -> str:
        """A hash of configuration and weights, which names the model."""

    def hf_module_name(self, name: str) -> str:
        """The name of an editable map in the model of `transformers` that computes the same."""


@dataclass(frozen=True)
class _Header:
    """What a delta's file says of itself."""

    kind: Literal["delta"]
    fingerprint: str
    scale: float


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
    Raises:
        UserError: there are no factors, or they do not fit each other; the scale is not finite in float32.
    """

    factors: Mapping[str, Factors]
    fingerprint: str
    scale: float = 1.0

    def __post_init__(self):
        for name, (u, v) in self.factors.items():
            fits = u.ndim == v.ndim == 3 and u.shape[2] == v.shape[2] and 0 not in (*u.shape, *v.shape)
            if not fits or not {u.dtype, v.dtype} <= peft.REAL:
                kinds = " and ".join(f"{part} {peft.described(t)}" for part, t in (("U", u), ("V", v)))
                raise UserError(
                    f"the factors of {name} are {kinds}; they should be (batch, outputs, rank) and "
                    "(batch, inputs, rank), floating point, of one rank, none of them 0"
                )
        batches = {len(t) for f in self.factors.values() for t in f} - {1}
        if not self.factors or len(batches) > 1:
            raise UserError(
                f"a delta needs at least one map and one size of batch for all; this one has {len(self.factors)} maps "
                f"and batches of {', '.join(map(str, sorted(batches))) or 1}"
            )
        if not abs(self.scale) <= torch.finfo(torch.float32).max:
            raise NotFinite(f"the scale of a delta cannot be {self.scale}; it has to be finite in float32")

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

    def to(self, *args, **kwargs) -> Self:
        """The same change on another device or in another precision, as `Tensor.to`."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def _map(self, f: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, factors={n: Factors(f(u), f(v)) for n, (u, v) in self.factors.items()})

    def __add__(self, other: Self) -> Self:
        """Both changes at once: adds U where both read along the same V, otherwise concatenates ranks.

        Raises:
            UserError: the changes are of different models, or of batches that do not match.
        """
        return self._joined(other, add=True)

    def __radd__(self, other: int) -> Self:
        """For `sum`, which starts with 0."""
        return self if other == 0 else NotImplemented

    def concatenated(self, other: Self) -> Self:
        """The same change as the sum, but always with concatenated ranks: U and V of each are kept."""
        return self._joined(other, add=False)

    def _joined(self, other: Self, add: bool) -> Self:
        if self.fingerprint != other.fingerprint:
            raise UserError(
                f"cannot add a delta for model {other.fingerprint} to one for {self.fingerprint}; "
                "derive both with the same model"
            )
        if len({1, self.batch, other.batch}) > 2:
            raise UserError(f"cannot add deltas of batch {self.batch} and {other.batch}; select() as many of each")
        total = {name: Factors(u * self.scale, v) for name, (u, v) in self.factors.items()}
        for name, (u, v) in other.factors.items():
            u = u * other.scale
            mine = total.get(name)
            if mine is None:
                total[name] = Factors(u, v)
            elif add and (mine.V is v or torch.equal(mine.V, v)):
                total[name] = Factors(mine.U + u, v)
            else:
                n = max(map(len, (*mine, u, v)))
                pairs = zip(mine, (u, v), strict=True)
                total[name] = Factors(*(torch.cat([a.expand(n, -1, -1), b.expand(n, -1, -1)], 2) for a, b in pairs))
        return replace(self, factors=total, scale=1.0)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically.

        Raises:
            NotFinite: a factor is NaN or infinite; `load` would refuse it.
            UserError: the file cannot be written.
        """
        self._check_finite()
        tensors = {f"{name}.{part}": t for name, f in self.factors.items() for part, t in zip("UV", f, strict=True)}
        files.save_tensors(
            path, tensors, {"kind": "delta", "fingerprint": self.fingerprint, "scale": float(self.scale)}
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged or not a delta (an adapter, for example, which `load_peft` reads);
                its numbers are not finite or do not fit together.
        """
        folder = Path(path).parent if Path(path).name == peft.WEIGHTS else Path(path)
        if os.path.isfile(folder / peft.CONFIG):
            raise UserError(f"{folder} is a PEFT adapter; read it with LowRankDelta.load_peft(folder, lm)")
        tensors, meta = files.load_tensors(path)
        if meta.get("kind") != "delta":
            raise UserError(f"{path} holds a {meta.get('kind', 'file of unknown kind')}, not a delta")
        header = read_as(_Header, meta, f"the header of {path}")
        names = sorted({key.rpartition(".")[0] for key in tensors})
        wrong = tensors.keys() ^ {f"{name}.{part}" for name in names for part in "UV"}
        if wrong:
            raise UserError(
                f"{path} should have one U and one V for each map and nothing else; "
                f"unexpected or missing: {', '.join(sorted(wrong)[:4])}"
            )
        factors = {name: Factors(tensors[f"{name}.U"], tensors[f"{name}.V"]) for name in names}
        return cls._read(path, factors, header.fingerprint, header.scale)

    @classmethod
    def _read(cls, path: str | Path, factors: Mapping[str, Factors], fingerprint: str, scale: float = 1.0) -> Self:
        """A delta out of a file; a UserError names it."""
        try:
            delta = cls(factors, fingerprint, scale)
            delta._check_finite()
        except UserError as error:
            raise type(error)(f"{path}: {error}") from None
        return delta

    def _check_finite(self) -> None:
        for name, factors in self.factors.items():
            if not all(t.isfinite().all() for t in factors):
                raise NotFinite(f"the factors of {name} have numbers that are NaN or infinite; derive the delta again")

    @torch.no_grad()
    def merged(self, lm: EditableModel) -> EditableModel:
        """A new model with the change in its weights, W + scale U V^T. `lm` is not changed; the two share only the
        tokenizer.

        Raises:
            UserError: the delta has a change for each of several sequences, or was made for another model.
        """
        changed_maps(lm, self)  # raises where they do not fit
        other = copy.deepcopy(lm, {id(lm.tokenizer): lm.tokenizer})
        for name, (u, v) in self._single().items():
            module = other.editable()[name]
            wide = torch.promote_types(module.weight.dtype, torch.float32)
            u, v = (t.to(module.weight.device, wide) for t in (u, v))
            change = self.scale * u @ v.t()
            module.weight.copy_(module.weight.to(wide) + (change if isinstance(module, nn.Linear) else change.t()))
        return other

    def save_peft(self, folder: str | Path, lm: EditableModel, base_model: str | None = None) -> None:
        """Write a LoRA adapter that `peft.PeftModel.from_pretrained(model, folder)` loads, each file atomically.

        `model` is the one in `transformers` that computes the same as `lm`; for an RWKV-4, the one that `save_model`
        writes. (If its config.json sets `rescale_every` above 0, as RWKV's own do, the model divides weights in place
        without telling PEFT; load it with `rescale_every=0`.)

        Args:
            base_model: hub id or folder of that model, recorded in the adapter; `AutoPeftModelForCausalLM` needs it.
        Raises:
            UserError: the delta has a change for each of several sequences, was made for another model, or changes
                maps that PEFT refuses.
        """
        maps = changed_maps(lm, self)
        refused = [name for name in maps if lm.peft_refuses and name.endswith(lm.peft_refuses)]
        if refused:
            raise UserError(
                f"PEFT puts no adapter on {refused[0]} of a {type(lm).__name__} ({len(refused)} such maps here); "
                "save merged(lm) instead, or use a generator that changes other maps"
            )
        changes = {lm.hf_module_name(name): (self.scale * u, v) for name, (u, v) in self._single().items()}
        transposed = not all(isinstance(module, nn.Linear) for module in maps.values())
        peft.save(folder, changes, transposed, base_model)

    @classmethod
    def load_peft(cls, folder: str | Path, lm: EditableModel) -> Self:
        """Read a LoRA adapter that `save_peft` or PEFT wrote, as a delta of batch 1 and scale 1.

        The folder does not identify the weights that the adapter was trained on; make sure that they are this model's.

        Raises:
            UserError: files are missing or damaged; the adapter is more than a low-rank change (DoRA, biases, modules
                saved whole), or does not fit this model.
        """
        own = {lm.hf_module_name(name): name for name in lm.editable()}
        found = peft.load(folder)
        unknown = found.keys() - own.keys()
        if unknown:
            raise UserError(
                f"{folder} changes {', '.join(sorted(unknown)[:4])}, which this model does not let a delta change "
                f"(it has {', '.join(own)})"
            )
        factors = {own[name]: Factors(u[None], v[None]) for name, (u, v) in found.items()}
        delta = cls._read(folder, factors, lm.fingerprint())
        changed_maps(lm, delta)  # raises where they do not fit
        return delta

    def _single(self) -> dict[str, tuple[Tensor, Tensor]]:
        """U (out, r) and V (in, r) of every map; a UserError if there is more than one change or it is not finite."""
        self._check_finite()
        if self.batch != 1:
            raise UserError(f"this delta has {self.batch} changes, and weights can take one; select([i]) it first")
        return {name: (u[0], v[0]) for name, (u, v) in self.factors.items()}


def map_shape(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear map; GPT-2's Conv1D stores its weight transposed."""
    return tuple(module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape))


def changed_maps(lm: EditableModel, delta: LowRankDelta) -> dict[str, nn.Module]:
    """The maps of the model that the delta changes, by name.

    Raises:
        UserError: the delta was made for another model, or changes a map that this one does not have in that shape.
    """
    if not isinstance(delta, LowRankDelta):
        raise UserError(f"delta is a {type(delta).__name__}; give a LowRankDelta, such as memorize returns, or None")
    if delta.fingerprint != lm.fingerprint():
        raise UserError(
            f"this delta was made for model {delta.fingerprint}, not for this one ({lm.fingerprint()}); "
            "derive it again with this model"
        )
    maps = lm.editable()
    unknown = delta.factors.keys() - maps.keys()
    if unknown:
        raise UserError(
            f"the delta changes {', '.join(sorted(unknown)[:4])}, which this model does not have "
            f"(it has {', '.join(maps)})"
        )
    for name, (u, v) in delta.factors.items():
        there, here = (u.shape[1], v.shape[1]), map_shape(maps[name])
        if there != here:
            raise UserError(
                f"the delta is for another model: there, {name} has {there[0]} outputs and {there[1]} inputs, "
                f"here {here[0]} and {here[1]}"
            )
    return {name: maps[name] for name in delta.factors}
