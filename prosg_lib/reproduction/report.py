"""The report of a run: promises, figures, measurements; report.json for programs, report.html for people, which opens
without a network."""

import base64
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from prosg_lib import files, paths, strict
from prosg_lib.config import Profile
from prosg_lib.errors import UserError
from prosg_lib.reproduction import ledger, notebook_files, promises

RUN_FILE = "run.json"


@dataclass
class Record:
    """What is known of a notebook's last run. peak_mb: None where it failed, or the system does not say."""

    notebook: str
    status: Literal["finished", "failed"]
    seconds: float
    peak_mb: float | None
    seed: int
    parameters: dict[str, Any]
    error: str | None


@dataclass(kw_only=True)
class Sidecar(ledger.Origin):
    """What is kept beside a figure: where it came from, the claims that it shows, and the same in words."""

    claims: list[str]
    alt: str


def load_records(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The records (fields of `Record`) of the notebooks that were run last, by name; none where nothing was run."""
    path = run_dir / RUN_FILE
    found = files.read_json(path) if path.is_file() else {}
    strict.read_as(dict[str, Record], found, path)
    return found


def build(profile: Profile) -> dict[str, Any]:
    """The report of what runs/<profile> holds now.

    Returns:
        profile, seed, commit, device, prose, versions (several values are joined with commas where notebooks were run
        at different times), complete (every notebook finished), passed (complete, every measurement near its reference,
        no promise newly broken), promises (rows of `promises.judge`), claims (notebook and a row of `ledger.compare`),
        notebooks (name, status, seconds, peak_mb, seed, parameters, commit, error) and figures (name and sidecar).
    Raises:
        UserError: nothing was run.
    """
    run_dir = paths.runs_dir(profile.name)
    records = load_records(run_dir)
    if not records:
        raise UserError(f"{run_dir} holds no run; run `prosg reproduce --profile {profile.name}` first.")
    rows, notebooks, found = [], [], {}
    for name in (path.stem for path in notebook_files.course()):
        record = records.get(name)
        if record is None:
            notebooks.append({"name": name, "status": "not run"})
            continue
        found[name] = ledger.measured(name, profile.name)
        rows += [{"notebook": name, **row} for row in ledger.judge(found[name], name, profile.name)]
        notebooks.append({"name": name, **{key: value for key, value in record.items() if key != "notebook"}})
    facts = [made for made in found.values() if made]
    verdicts = promises.judge({made["notebook"]: made["claims"] for made in facts}, profile.name)
    complete = all(notebook["status"] == "finished" for notebook in notebooks)
    wrong = any(row["holds"] is False for row in rows) or any(row["newly_broken"] for row in verdicts)
    return {
        "profile": profile.name,
        "seed": _joined(record["seed"] for record in records.values()),
        "commit": _joined(made["commit"] for made in facts),
        "device": _joined(made["device"] for made in facts),
        "prose": _joined("books" if made["books"] else "the project's own" for made in facts),
        "versions": {
            key: _joined(made["versions"].get(key) for made in facts)
            for key in sorted({key for made in facts for key in made["versions"]})
        },
        "complete": complete,
        "passed": complete and not wrong,
        "promises": verdicts,
        "claims": rows,
        "notebooks": notebooks,
        "figures": figures(run_dir),
    }


def _joined(values: Iterable[Any]) -> Any:
    """The one value that all have; several as text, None left out."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    return distinct[0] if len(distinct) == 1 else ", ".join(map(str, distinct)) or None


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The sidecars of a run's figures with the figures' names, in the order of the notebooks."""
    found = []
    for path in sorted((run_dir / "figures").glob("*.json")):
        if path.with_suffix(".png").is_file():
            sidecar = strict.read_as(Sidecar, files.read_json(path), path)
            found.append({"name": path.stem, **asdict(sidecar)})
    return sorted(found, key=lambda figure: figure["notebook"])


def verdict(report: dict[str, Any]) -> str:
    """What a run showed, in three sentences at most."""
    kept = sum(row["kept"] for row in report["promises"])
    judged = [row for row in report["claims"] if row["holds"] is not None]
    near = sum(row["holds"] for row in judged)
    missing = sum(notebook["status"] != "finished" for notebook in report["notebooks"])
    return (
        f"{kept} of {len(report['promises'])} promises are kept. {near} of {len(judged)} measurements agree with the "
        f"reference run ({len(report['claims']) - len(judged)} more are shown and not judged)."
    ) + (f" {missing} of {len(report['notebooks'])} notebooks were not finished." if missing else "")


def write(report: dict[str, Any], run_dir: Path) -> Path:
    """Writes report.json and report.html into `run_dir`; returns the path of the latter."""
    files.write_json(run_dir / "report.json", report)
    files.write_text(run_dir / "report.html", render(report, run_dir))
    return run_dir / "report.html"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Reproduction report, profile {{ report.profile }}</title>
<style>
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fff; --line: #c8c8c8; --soft: #f3f3f3; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #161616; --line: #4a4a4a; --soft: #242424; }
  a { color: #8ab8ff; }
}
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
thead th { background: var(--soft); }
figure { margin: 2rem 0; }
img { max-width: 100%; height: auto; background: #fff; }
figcaption { font-size: .9rem; opacity: .85; }
</style>
</head>
<body>
<h1>Reproduction report, profile {{ report.profile }}</h1>
<p>{{ verdict }}</p>
<h2>Promises</h2>
{{ promises }}
<h2>Figures</h2>
{% for figure in report.figures %}
<figure><img src="data:image/png;base64,{{ image(figure.name) }}" alt="{{ figure.alt }}">
<figcaption>{{ figure.name }}, from {{ figure.notebook }}, seed {{ figure.seed }}
{%- if figure.claims %}. Claims: {{ figure.claims | join(", ") }}{% endif %}</figcaption></figure>
{% else %}<p>This run drew none.</p>
{% endfor %}
<h2>Measurements</h2>
{% for name, table in measurements %}
<details{{ " open" if "NO" in table }}><summary>{{ name }}</summary>
{{ table }}
</details>
{% endfor %}
<h2>Notebooks</h2>
{{ notebooks }}
<p>Peak memory is that of a notebook's largest process.</p>
<h2>Provenance</h2>
{{ provenance }}
</body>
</html>
"""


def render(report: dict[str, Any], run_dir: Path) -> str:
    """The report as one HTML page that refers to nothing outside itself but the executed notebooks beside it."""
    import jinja2
    import pandas as pd
    from markupsafe import Markup, escape

    def table(frame: pd.DataFrame, **options) -> Markup:
        with pd.option_context("display.max_colwidth", None):
            return Markup(frame.to_html(border=0, **options))

    def image(name: str) -> str:
        return base64.b64encode((run_dir / "figures" / f"{name}.png").read_bytes()).decode("ascii")

    ran = pd.DataFrame(report["notebooks"]).reindex(columns=["name", "status", "seconds", "peak_mb", "seed", "error"])
    ran = ran.astype(object).where(ran.notna(), "").map(escape)
    ran["name"] = [
        f'<a href="notebooks/{n}.ipynb">{n}</a>' if s != "not run" else n
        for n, s in zip(ran.name, ran.status, strict=True)
    ]
    facts = {key: report[key] for key in ("profile", "seed", "commit", "device", "prose")} | report["versions"]
    by_notebook = {row["notebook"]: [] for row in report["claims"]}
    for row in report["claims"]:
        by_notebook[row["notebook"]].append(row)
    return jinja2.Template(PAGE, autoescape=True).render(
        report=report,
        verdict=verdict(report),
        promises=table(promises.table(report["promises"]), index=False),
        measurements=[(name, table(ledger.table(rows), index=False)) for name, rows in by_notebook.items()],
        notebooks=table(ran, index=False, escape=False),
        provenance=table(pd.DataFrame(facts.items()), index=False, header=False),
        image=image,
    )
