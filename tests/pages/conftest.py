"""A small run of two notebooks, as `prosg reproduce` leaves one, but not by running the course; and the course's own
run at smoke, where there is one of the notebooks as they are: `pytest tests/pages -k course` after it.
"""

import base64
import io
from types import SimpleNamespace

import matplotlib.image
import nbformat
import numpy as np
import pytest

from prosg_lib import files, paths, plots, widgets
from prosg_lib.config import get_profile
from prosg_lib.reproduction import notebook_files

WORDS = "Two bars, the second one higher."
TOUR = r"""# A tour of two pages

[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/x)

Next is [the state](01_state_derivation.ipynb#A-section), then [forgetting](02_prompt_forgetting.ipynb); there are
[results](../docs/results.md) and [a datasheet](../data/DATASHEET.md). It keeps 0.99<!--claim cpu x y--> of $x_t^\top$.

It adds $K z_t$ to
$V$ and not to $W'$.

$$M_{ti} = \begin{cases} e^{-w} & i < t \\ 0 & i > t \end{cases}, \qquad \big(1, \dots, n\big) \in \mathbb{R}^n$$

![curves](../figures/recall_by_distance.png)
"""
SOLUTION = "<details>\n<summary>Solution</summary>\n\n```python\nanswer = 42\n```\n\n</details>"
PLOT = 'save_figure(fig, "00_bars", alt="...")'


def picture():
    image = io.BytesIO()
    matplotlib.image.imsave(image, np.eye(40), format="png")
    return base64.b64encode(image.getvalue()).decode()


def output(**data):
    return nbformat.v4.new_output("display_data", {kind.replace("_", "/"): value for kind, value in data.items()})


def small_run(runs):
    """Two executed notebooks, a figure's sidecar and what the run recorded, as `prosg reproduce` leaves them."""
    v4, run = nbformat.v4, runs / "smoke"
    slider = widgets.rank_slider([8, 4, 2, 1], (128, 512))
    live = v4.new_output(
        "execute_result",
        {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox()"},
        execution_count=1,
    )
    said = [v4.new_output("stream", name="stdout", text="12 tokens\n")]
    said.append(v4.new_output("stream", name="stderr", text="a progress bar"))
    data, facts = plots.Picture(base64.b64decode(picture()), "A diagonal.", 30)._repr_mimebundle_()
    described = v4.new_output("display_data", data, metadata=facts)
    table = "<table class='dataframe'><thead><tr><th>rank</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>"
    cells = [
        v4.new_markdown_cell(TOUR, metadata={"tags": ["slide"]}),
        v4.new_code_cell("import sys", metadata={"tags": ["set-up"]}),
        v4.new_code_cell("profile = 'smoke'", metadata={"tags": ["injected-parameters"]}),
        v4.new_markdown_cell("## A question\n\n### Exercise 0.1\n\nFind the answer."),
        v4.new_markdown_cell(SOLUTION, metadata={"tags": ["solution"]}),
        v4.new_code_cell("count = 12  # tokens\nprint(f'{count} tokens')", metadata={"tags": ["slide"]}, outputs=said),
        v4.new_code_cell(
            PLOT,
            metadata={"jupyter": {"source_hidden": True}, "tags": ["slide"]},
            outputs=[output(image_png=picture(), text_plain="<Figure>")],
        ),
        v4.new_code_cell("slider", outputs=[output(text_html=slider.html(), text_plain="Sliders")]),
        v4.new_code_cell("live", outputs=[live]),
        v4.new_code_cell("both", outputs=[output(text_markdown="#### 06, *by claim*"), described]),
        v4.new_code_cell("table", outputs=[output(text_html=table, text_plain="rank")]),
    ]
    second = [v4.new_markdown_cell("# The state\n\nBack to [the tour](00_tour.ipynb).\n\n## A section\n\nThe end.")]
    origin = {"profile": "smoke", "seed": 0, "commit": "abc", "device": "CPU: a small one", "versions": {"torch": "2"}}
    records = {}
    for name, content in (("00_tour", cells), ("01_state_derivation", second)):
        notebook = v4.new_notebook(cells=content)
        notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}
        (run / "notebooks").mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, run / "notebooks" / f"{name}.ipynb")
        claims = {
            **origin,
            "notebook": name,
            "peak_mb": 1.0,
            "books": None,
            "claims": {"error": {"value": 1.0, "exact": True}},
        }
        files.write_json(run / "claims" / f"{name}.json", claims)
        records[name] = {"notebook": name, "status": "finished", "seconds": 1.0, "peak_mb": 1.0, "seed": 0}
        records[name] |= {"parameters": {}, "error": None}
    files.write_json(run / "run.json", records)
    files.write_bytes(run / "figures" / "00_bars.png", base64.b64decode(picture()))
    files.write_json(run / "figures" / "00_bars.json", {**origin, "notebook": "00_tour", "claims": [], "alt": WORDS})


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory):
    """The folder for $PROSG_RUNS."""
    runs = tmp_path_factory.mktemp("runs")
    small_run(runs)
    return runs


@pytest.fixture(scope="session", params=["small", "course"])
def some_runs(request, small_runs):
    """A run's folder for $PROSG_RUNS, and its profile: the small one, and the course's."""
    if request.param == "small":
        return SimpleNamespace(folder=small_runs, profile=get_profile("smoke"))
    folder = paths.runs_dir("smoke")
    for path in notebook_files.course():
        copy = folder / "notebooks" / path.name
        if not copy.is_file() or _sources(copy) != _sources(path):
            pytest.skip(f"{path.stem} was not run here as it is now: prosg reproduce --profile smoke")
    return SimpleNamespace(folder=folder.parent, profile=get_profile("smoke"))


def _sources(path):
    """A notebook's cells, but for the one that a run puts in."""
    return [c["source"] for c in notebook_files.cells(path) if "injected-parameters" not in notebook_files.tags(c)]
