"""The forgetting explorer: what a model still knows of a prompt, token by token, by distance and scale of the change.

`explore` measures it. What it returns is shown in three ways: as sliders (live, or without a kernel), and as a static
figure. Scale 0 is the plain model.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import ipywidgets
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.deltas.low_rank import Factors, LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.evaluation import reading
from prosg_lib.evaluation.baselines import Start
from prosg_lib.generators.base import Generator
from prosg_lib.generators.true_gradient import change_squared_norm
from prosg_lib.plots import PALETTE
from prosg_lib.tasks import wording
from prosg_lib.tasks.answer_form import full_answer
from prosg_lib.tasks.dialogue import Dialogues, Item, Probe
from prosg_lib.tasks.wording import Fact
from prosg_lib.text.padding import left_padded
from prosg_lib.widgets import Control, Page, Sliders, shaded, typed

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def probes_in(text: str) -> list[Probe]:
    """A question for every fact in a prompt of one's own, in its order: each word that is a value of the data set.

    Raises:
        UserError: there is no such word.
    """
    words, table = re.findall(r"\w+", text), wording.words()
    slots = {value: slot for slot, spec in table["slots"].items() for value in spec["values"]}
    kinds = {word: kind for kind, spec in table["instructions"].items() for word in spec["words"]}
    instructions = {kinds[word]: word for word in words if word in kinds}
    facts = [Fact(slots[word], word) for word in dict.fromkeys(words) if word in slots]
    if not facts:
        some = "; ".join(f"my {table['slots'][s]['noun']} is {table['slots'][s]['values'][3]}" for s in ("pet", "home"))
        raise UserError(f"this prompt has no fact that the model could know. Try, for example: {some}")
    frame = table["frames"]["questions"]["test"][0]
    return [
        Probe(
            fact,
            frame.format(poss="my", noun=table["slots"][fact.slot]["noun"]),
            full_answer(fact.value, instructions),
        )
        for fact in facts
    ]


@torch.no_grad()
def explore(
    lm: LanguageModel,
    generator: Generator,
    data: Dialogues,
    prompt: Sequence[int],
    probes: Sequence[Probe],
    text: Sequence[int],
    distances: Sequence[int],
    scales: Sequence[float] = SCALES,
) -> Explored:
    """Reads prompt and text once a scale, and at every distance each right answer behind its question.

    The probability of an answer's token is that of the token after the right ones before it.

    Args:
        prompt, text: token ids; `text` is what is read between prompt and question.
    """
    delta, state = generator.memorize(lm, [list(prompt)]), lm.derive_state([list(prompt)])
    factor = torch.tensor(scales, device=next(lm.parameters()).device)[:, None, None]
    changes = replace(delta, factors={n: Factors(u * factor.to(u), v) for n, (u, v) in delta.factors.items()})
    begin = Start(state.select([0] * len(scales)), changes)
    pairs = [data.encode_probe(probe) for probe in probes]
    answers = [answer[:-1] for _, answer in pairs]  # without the end of the line
    owner = [row for row in range(len(scales)) for _ in probes]
    newline, rows = data.tokenizer.encode("\n"), []
    for place, there, _ in reading.read(lm, begin, [list(text)] * len(scales), sorted(distances)):
        ends = newline if place and text[place - 1] != newline[-1] else ()
        asked = [[*ends, *question, *answer] for (question, _), answer in zip(pairs, answers, strict=True)]
        ids, valid = (t.to(factor.device) for t in left_padded(asked * len(scales)))
        last = 1 + max(map(len, answers))
        logits, _ = lm(ids, there.select(owner), changes.select(owner), None if valid.all() else valid, last=last)
        chances = logits.float().softmax(-1)
        for number, row in enumerate(owner):
            probe, answer = probes[number % len(probes)], answers[number % len(probes)]
            for token, chance in zip(answer, chances[number, -1 - len(answer) : -1], strict=True):
                best = int(chance.argmax())
                rows.append(
                    {
                        "distance": place,
                        "scale": scales[row],
                        "slot": probe.fact.slot,
                        "value": probe.fact.value,
                        "question": probe.question,
                        "token": data.tokenizer.decode([token]).strip(),
                        "p": float(chance[token]),
                        "favourite": data.tokenizer.decode([best]).strip(),
                        "p_favourite": float(chance[best]),
                    }
                )
    return Explored(pd.DataFrame(rows), change_sizes(lm, delta))


def change_sizes(lm: LanguageModel, delta: LowRankDelta) -> pd.DataFrame:
    """||scale U V^T|| / ||W|| in the Frobenius norm, one row a layer and one column a map."""
    maps, sizes = lm.editable(), {}
    for name, change in delta.factors.items():
        layer, kind = re.search(r"(\d+)\.(.+)", name).groups()
        size = abs(delta.scale) * change_squared_norm(change)[0].clamp(min=0).sqrt() / maps[name].weight.norm()
        sizes.setdefault(kind, {})[int(layer)] = float(size)
    return pd.DataFrame(sizes).sort_index()


@dataclass(frozen=True)
class Explored:
    """What `explore` found.

    Attributes:
        table: one row a distance, scale, fact and token of the fact's right answer: the token and its probability, the
            likeliest token in its place (`favourite`) and that one's.
        sizes: of `change_sizes`.
        name: whose change it is, where it is shown.
    """

    table: pd.DataFrame
    sizes: pd.DataFrame
    name: str = "ProSG"

    def values(self, distance: int, scale: float) -> pd.DataFrame:
        """The rows of the values alone at one setting; `known`: the value is what the model would say."""
        part = self._part(distance, scale)
        part = part[part.token == part.value]
        return part.assign(known=part.favourite == part.value)

    def _part(self, distance: int, scale: float) -> pd.DataFrame:
        return self.table[(self.table.distance == distance) & (self.table.scale == scale)]

    def page(self, distance: int, scale: float) -> Page:
        """Every fact's right answer by the plain model and with the change, and the change by layer and map."""
        plain, changed = (self.values(distance, s) for s in (0.0, scale))
        summary = (
            f"{distance:,} tokens after the prompt, the plain model would name {plain.known.sum()} of {len(plain)} "
            f"values (mean probability {plain.p.mean():.2f}); {self.name} at scale {scale:g} would name "
            f"{changed.known.sum()} of {len(changed)} ({changed.p.mean():.2f})."
        )
        cells = [
            {slot: _answer(rows) for slot, rows in self._part(distance, s).groupby("slot", sort=False)}
            for s in (0.0, scale)
        ]
        rows = "".join(
            f'<tr><th scope="row">{html.escape(row.question)}</th><td>{cells[0][row.slot]}</td>'
            f"<td>{cells[1][row.slot]}</td></tr>"
            for row in plain.itertuples()
        )
        table = (
            "<table><caption>Probability of each token of the right answer; → what the model would rather say</caption>"
            '<thead><tr><th scope="col">question</th><th scope="col">plain model</th>'
            f'<th scope="col">{html.escape(self.name)}, scale {scale:g}</th></tr></thead><tbody>{rows}</tbody></table>'
        )
        return Page(summary, (table, self._sizes_table(scale)))

    def _sizes_table(self, scale: float) -> str:
        largest = self.sizes.to_numpy().max() * max(self.table.scale)
        head = "".join(f'<th scope="col">{html.escape(kind)}</th>' for kind in self.sizes)
        body = "".join(
            f'<tr><th scope="row">layer {layer}</th>'
            + "".join(f"<td>{shaded(f'{scale * x:.2f}', scale * x / largest if largest else 0)}</td>" for x in row)
            + "</tr>"
            for layer, row in zip(self.sizes.index, self.sizes.to_numpy(), strict=True)
        )
        return (
            "<table><caption>Size of the change, relative to the map’s own weights, by layer and map</caption>"
            f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def sliders(self, distance: int, scale: float = 1.0) -> Sliders:
        """Two sliders, distance and scale, that start where they are told."""
        distances, scales = (tuple(sorted(self.table[name].unique().tolist())) for name in ("distance", "scale"))
        controls = (
            Control("tokens between prompt and question", distances, distance),
            Control("scale of the change", scales, scale, "{:g}"),
        )
        return Sliders(controls, self.page)

    def draw(self, axes: Sequence[Axes], distance: int, scale: float = 1.0) -> str:
        """Four panels that say what the sliders say; returns them in words.

        Args:
            axes: the answers of the plain model, those with the change, the values' mean probability by distance, and
                the change by layer and map.
        """
        for ax, s, title in zip(axes, (0.0, scale), ("plain model", f"{self.name}, scale {scale:g}"), strict=False):
            self._draw_answers(ax, distance, s)
            ax.set_title(f"{title}, {distance:,} tokens later")
        distances = sorted(self.table.distance.unique().tolist())
        ends, shown = {}, [s for s in (0.0, 0.5, 1.0, 2.0) if s in set(self.table.scale)]
        colours = [PALETTE[c] for c in ("black", "sky", "blue", "vermillion")]
        for s, colour, marker, line in zip(shown, colours, "ov^x", ("-", "-.", "-", "--"), strict=False):
            means = [self.values(d, s).p.mean() for d in distances]
            ends[s] = means[-1]
            label = "plain model (scale 0)" if s == 0 else f"scale {s:g}"
            axes[2].plot(range(len(distances)), means, color=colour, marker=marker, linestyle=line, label=label)
        axes[2].set_xticks(range(len(distances)), [f"{d:,}" for d in distances])
        axes[2].set(xlabel="tokens between prompt and question", ylabel="mean probability of a value",
                    ylim=(-0.03, 1.03))  # fmt: skip
        axes[2].legend(fontsize=9)
        self._draw_sizes(axes[3], scale)
        plain, changed = (self.values(distance, s) for s in (0.0, scale))
        return (
            f"Token by token, the probabilities of the right answers {distance:,} tokens after the prompt: the plain "
            f"model would name {plain.known.sum()} of {len(plain)} values, and {self.name} at scale "
            f"{scale:g} would name {changed.known.sum()} of {len(changed)}. At {distances[-1]:,} tokens the mean "
            "probability of a value is "
            + ", ".join(f"{p:.2f} at scale {s:g}" for s, p in ends.items())
            + ". The change is largest in "
            + "layer {} of {}.".format(*max(self.sizes.stack().items(), key=lambda cell: cell[1])[0])
        )

    def _draw_answers(self, ax: Axes, distance: int, scale: float) -> None:
        facts = list(self._part(distance, scale).groupby("slot", sort=False))
        for y, (_, rows) in enumerate(facts):
            for x, row in enumerate(rows.itertuples()):
                known = row.favourite == row.token
                words = f"{'✓' if known else '✗'} {html.unescape(quoted(row.token))}\n{row.p:.2f}"
                draw_share(ax, x, y, row.p, words, fontsize=7.5)
        ax.set(xlim=(-0.5, max(len(rows) for _, rows in facts) - 0.5), ylim=(len(facts) - 0.5, -0.5))
        ax.set_yticks(range(len(facts)), [slot for slot, _ in facts])
        ax.set_xticks([])
        ax.grid(False)

    def _draw_sizes(self, ax: Axes, scale: float) -> None:
        values = scale * self.sizes.to_numpy()
        for y, row in enumerate(values):
            for x, size in enumerate(row):
                draw_share(ax, x, y, size / (values.max() or 1), f"{size:.2f}")
        ax.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(len(values) - 0.5, -0.5), title="size of the change, relative")
        ax.set_xticks(range(values.shape[1]), self.sizes.columns)
        ax.set_yticks(range(len(values)), [f"layer {layer}" for layer in self.sizes.index])
        ax.grid(False)


def own_prompt(
    lm: LanguageModel,
    generator: Generator,
    data: Dialogues,
    item: Item,
    distances: Sequence[int],
    distance: int,
    scales: Sequence[float] = SCALES,
) -> ipywidgets.VBox:
    """The explorer with a prompt of one's own, which needs a running kernel: a line to type in, a button, the sliders.

    Args:
        item: its prompt stands in the line at first, and its body is what is read between prompt and question.
        distance: where the slider stands at first.
    """
    line = ipywidgets.Text(item.prompt.strip().removeprefix("User: "), description="prompt")
    line.layout.width = "60em"

    def read(text: str, setting: list | None) -> tuple[str, Sliders]:
        probes, prompt = probes_in(text), data.tokenizer.encode(f"User: {text.strip()}\n")
        found = explore(lm, generator, data, prompt, probes, item.body, distances, scales)
        said = f"{len(prompt)} tokens, {len(probes)} facts: {', '.join(p.fact.value for p in probes)}"
        return said, found.sliders(*(setting or (distance, 1.0)))  # the new sliders stand where the old ones stood

    return typed(line, "remember it", read)


def _answer(rows: pd.DataFrame) -> str:
    """A right answer's tokens with their probabilities; where the model would rather say another, that one."""
    words = []
    for row in rows.itertuples():
        known = row.favourite == row.token
        other = "" if known else f" → {quoted(row.favourite)} {row.p_favourite:.2f}"
        words.append(shaded(f"{'✓' if known else '✗'} {quoted(row.token)} {row.p:.2f}{other}", row.p))
    return " ".join(words)


def quoted(token: str) -> str:
    """A word as it is, anything else in quotation marks; escaped."""
    return html.escape(token if token.isalnum() else f"“{token}”")


def draw_share(ax: Axes, x: int, y: int, share: float, words: str, fontsize: float = 9) -> None:
    """A square with words in it, blue by opacity; black text on it stays readable."""
    blue = (*to_rgb(PALETTE["blue"]), 0.7 * share)
    ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=blue, edgecolor="0.6"))
    ax.text(x, y, words, ha="center", va="center", fontsize=fontsize, parse_math=False)
