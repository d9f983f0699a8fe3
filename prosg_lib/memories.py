"""Memories added and removed: the changes of several prompts in one bank, and what a model knows with some of them in.

A bank is shown in three ways: as boxes to tick (live, or without a kernel), and as a static figure.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

import ipywidgets
import pandas as pd
import torch
from matplotlib.axes import Axes

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.evaluation.several_prompts import shared_out
from prosg_lib.explorer import draw_share, probes_in, quoted
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.dialogue import Item, Probe
from prosg_lib.text.padding import left_padded
from prosg_lib.widgets import Control, Page, Sliders, Tick, shaded, typed

SCALES = (0.0, 0.5, 1.0, 1.5)
MOST = 6
"""Memories in a bank of one's own."""


@dataclass(eq=False)
class Bank:
    """Several prompts' changes of a model, of which any may be in its weights at once.

    Attributes:
        texts: what each prompt says; probes: the questions about each.
        each: the prompts' changes, a batch, each from a blank state; they share their reading directions.
        common: the part that is in every one of them (`several_prompts.common_part`).
    """

    lm: LanguageModel
    texts: Sequence[str]
    probes: Sequence[Sequence[Probe]]
    each: LowRankDelta
    common: LowRankDelta
    _known: dict[tuple, pd.DataFrame] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        generator: Generator,
        texts: Sequence[str],
        probes: Sequence[Sequence[Probe]],
        common: LowRankDelta,
    ) -> Bank:
        """Every text as a memory of its own."""
        return cls(lm, texts, probes, generator.memorize(lm, [f"User: {text}\n" for text in texts]), common)

    @classmethod
    def of_item(cls, lm: LanguageModel, generator: Generator, item: Item, memories: int, common: LowRankDelta) -> Bank:
        """A dialogue's facts shared out over so many memories, and its questions about them."""
        size, asked = len(item.facts) // memories, {probe.fact: probe for probe in item.probes}
        groups = [item.facts[i : i + size] for i in range(0, len(item.facts), size)]
        return cls.of(
            lm, generator, shared_out(item, memories), [[asked[f] for f in group] for group in groups], common
        )

    @property
    def names(self) -> list[str]:
        return [chr(ord("A") + i) for i in range(len(self.texts))]

    def delta(self, inside: Sequence[bool], once: bool = True) -> LowRankDelta | None:
        """The sum of the memories that are in; None where none is.

        Args:
            inside: one a memory.
            once: the common part is counted once, instead of once a memory.
        """
        chosen = [self.each.select([i]) for i, ticked in enumerate(inside) if ticked]
        if once and len(chosen) > 1:
            chosen.append(self.common.scaled(1 - len(chosen)))
        return sum(chosen) if chosen else None

    @torch.no_grad()
    def answers(self, inside: Sequence[bool], once: bool = True, scale: float = 1.0) -> pd.DataFrame:
        """What the model knows from a blank state, with those memories in its weights.

        Returns:
            One row a question: memory, inside, question, value, p (the right value's probability behind the question),
            favourite and p_favourite (the likeliest word in its place), known (the value is the likeliest).
        """
        delta = self.delta(inside, once) if scale else None
        alone = once or sum(inside) < 2
        key = None if delta is None else (tuple(map(bool, inside)), alone, scale)
        if key not in self._known:
            self._known[key] = self._read(delta and delta.scaled(scale))
        names = [name for name, probes in zip(self.names, self.probes, strict=True) for _ in probes]
        ticked = dict(zip(self.names, map(bool, inside), strict=True))
        found = self._known[key].assign(memory=names, inside=[ticked[name] for name in names])
        return found.assign(known=found.favourite == found.value)

    def _read(self, delta: LowRankDelta | None) -> pd.DataFrame:
        probes, tokenizer = [probe for group in self.probes for probe in group], self.lm.tokenizer
        lines = [tokenizer.encode(f"User: {probe.question}\nBot:") for probe in probes]
        ids, valid = (t.to(next(self.lm.parameters()).device) for t in left_padded(lines))
        logits, _ = self.lm(ids, None, delta, None if valid.all() else valid, last=1)
        rows = []
        for probe, chance in zip(probes, logits[:, -1].float().softmax(-1), strict=True):
            value, best = probe.fact.value, int(chance.argmax())
            row = {"question": probe.question, "value": value, "p": float(chance[tokenizer.encode(f" {value}")[0]])}
            rows.append(row | {"favourite": tokenizer.decode([best]).strip(), "p_favourite": float(chance[best])})
        return pd.DataFrame(rows)

    def page(self, *setting) -> Page:
        """Every question with the probability of its right answer; a tick a memory, then `once` and `scale`."""
        *inside, once, scale = setting
        found = self.answers(inside, once, scale)
        summary = (
            f"In the weights: {self._listed(inside)}, at scale {scale:g}, the common part "
            f"{'once' if once else 'once a memory'}. The model would name {_counted(found)}."
        )
        rows = []
        for (name, part), text in zip(found.groupby("memory"), self.texts, strict=True):
            state = "in" if part.inside.iloc[0] else "out"
            says = f"{name} ({state})<br><span style=font-weight:400>{html.escape(text)}</span>"
            first = f'<th scope="rowgroup" rowspan="{len(part)}">{says}</th>'
            for row in part.itertuples():
                answer = shaded(f"{'✓' if row.known else '✗'} {quoted(row.value)} {row.p:.2f}", row.p)
                other = "" if row.known else f" → {quoted(row.favourite)} {row.p_favourite:.2f}"
                question = f'<th scope="row">{html.escape(row.question)}</th>'
                rows.append(f"<tr>{first}{question}<td>{answer}{other}</td></tr>")
                first = ""
        head = "".join(f'<th scope="col">{title}</th>' for title in ("memory", "question", "right answer"))
        caption = "Probability of each right answer; → what the model would rather say"
        return Page(summary, (f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
                              f"<tbody>{''.join(rows)}</tbody></table>",))  # fmt: skip

    def _listed(self, inside: Sequence[bool]) -> str:
        names = [name for name, ticked in zip(self.names, inside, strict=True) if ticked]
        return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "nothing"

    def sliders(self, inside: Sequence[bool], once: bool = True, scale: float = 1.0) -> Sliders:
        """A box a memory and one for the common part, and a slider for the scale."""
        ticks = [Tick(f"memory {name}", bool(ticked)) for name, ticked in zip(self.names, inside, strict=True)]
        last = (Tick("common part once", once), Control("scale of the sum", SCALES, scale, "{:g}"))
        return Sliders((*ticks, *last), self.page)

    def draw(self, ax: Axes) -> str:
        """Probabilities of all right answers by what is in the bank: nothing, one memory after the other, all but the
        second, and all as a plain sum. Returns them in words."""
        n = len(self.texts)
        banks = {"+".join(self.names[:k]) or "nothing": ([i < k for i in range(n)], True) for k in range(n + 1)}
        banks[f"all but {self.names[1]}"] = ([i != 1 for i in range(n)], True)
        banks["all, plain sum"] = ([True] * n, False)
        words = []
        for x, (label, (inside, once)) in enumerate(banks.items()):
            found = self.answers(inside, once)
            for y, row in enumerate(found.itertuples()):
                draw_share(ax, x, y, row.p, f"{'✓' if row.known else '✗'} {row.p:.2f}")
            words.append(f"with {label}, {_counted(found)}")
        ax.set(xlim=(-0.5, len(banks) - 0.5), ylim=(len(found) - 0.5, -0.5), xlabel="memories in the weights")
        ax.set_xticks(range(len(banks)), list(banks), fontsize=9)
        ax.set_yticks(range(len(found)), [f"{row.memory}: {row.value}" for row in found.itertuples()])
        ax.grid(False)
        named = "; ".join(words)
        return f"Probability of each right answer by the memories in the weights. The model would name: {named}."


def _counted(found: pd.DataFrame) -> str:
    """How many values the model would name, of those that are in and of the others."""
    parts = [(part.known.sum(), len(part), word) for ticked, word in ((True, "are in"), (False, "are not"))
             if len(part := found[found.inside == ticked])]  # fmt: skip
    return " and ".join(f"{known} of the {count} values that {word}" for known, count, word in parts)


def own_memories(
    lm: LanguageModel, generator: Generator, texts: Sequence[str], common: LowRankDelta
) -> ipywidgets.VBox:
    """Memories of one's own, one a line, which needs a running kernel: an area to type in, a button, the boxes.

    Args:
        texts: stand in the area at first.
    """
    area = ipywidgets.Textarea("\n".join(texts), description="memories", rows=MOST)
    area.layout.width = "60em"

    def read(typed_in: str, setting: list | None) -> tuple[str, Sliders]:
        lines = [line.strip() for line in typed_in.splitlines() if line.strip()]
        if not 1 <= len(lines) <= MOST:
            raise UserError(f"that is {len(lines)} memories; write 1 to {MOST}, one a line")
        bank = Bank.of(lm, generator, lines, [probes_in(line) for line in lines], common)
        return f"{len(lines)} memories", bank.sliders([True] * len(lines), *(setting or (True, 1.0))[-2:])

    return typed(area, "remember them", read)
