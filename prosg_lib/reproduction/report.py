"""The report of a run: report.json for programs, report.html for people, which opens without a network."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.reproduction import claims

RUN_FILE = "run.json"


def load_records(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What is known of the notebooks that were run last, by name; none where nothing was run."""
    path = Path(run_dir) / RUN_FILE
    return files.read_json(path) if path.is_file() else {}


def measured(run_dir: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The claims file that belongs to a record, None where that very run did not finish it."""
    path = claims.measured_path(run_dir, record["notebook"])
    if not path.is_file():
        return None
    found = files.read_json(path)
    return found if found.get("run_id") == record["run_id"] else None


def build(profile: str, run_dir: Path, expected_dir: Path, course: Iterable[str]) -> dict[str, Any]:
    """The report of what runs/<profile> holds now.

    Args:
        course: names of all notebooks, in order.
    Returns:
        profile, seed, commit, device, prose, versions (several values are joined with commas where notebooks were run
        at different times), complete (every notebook finished), passed (complete, and no claim fails), claims (one
        entry a claim: notebook and a row of `claims.compare`), notebooks (name, status, seconds, peak_mb, seed,
        parameters, commit, error) and figures (name and sidecar).
    Raises:
        UserError: nothing was run.
    """
    records = load_records(run_dir)
    if not records:
        raise UserError(f"{run_dir} holds no run; run `prosg reproduce --profile {profile}` first.")
    rows, notebooks, facts = [], [], []
    for name in course:
        record = records.get(name)
        if record is None:
            notebooks.append({"name": name, "status": "not run"})
            continue
        found = measured(run_dir, record)
        facts.append(found or {})
        rows += [{"notebook": name, **row} for row in claims.judge(found, name, profile, expected_dir)]
        notebooks.append({"name": name, **{key: value for key, value in record.items() if key != "notebook"}})
    complete = all(notebook["status"] == "finished" for notebook in notebooks)
    return {
        "profile": profile,
        "seed": _joined(record["seed"] for record in records.values()),
        "commit": _joined(fact.get("commit") for fact in facts),
        "device": _joined(fact.get("device") for fact in facts),
        "prose": _joined(fact.get("prose", {}).get("source") for fact in facts),
        "versions": {
            key: _joined(fact.get("versions", {}).get(key) for fact in facts)
            for key in sorted({key for fact in facts for key in fact.get("versions", {})})
        },
        "complete": complete,
        "passed": complete and not any(row["holds"] is False for row in rows),
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
    found = [
        {"name": sidecar.stem, **files.read_json(sidecar)}
        for sidecar in sorted((Path(run_dir) / "figures").glob("*.json"))
        if sidecar.with_suffix(".png").is_file()
    ]
    return sorted(found, key=lambda figure: figure["notebook"])


def write(report: dict[str, Any], run_dir: Path) -> Path:
    """Writes report.json and report.html into `run_dir`; returns the path of the latter."""
    files.write_json(run_dir / "report.json", report)
    files.write_text(run_dir / "report.html", render(report, run_dir))
    return run_dir / "report.html"


STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fff; --line: #c8c8c8; --soft: #f3f3f3; --bad: #a33000; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #161616; --line: #4a4a4a; --soft: #242424; --bad: #ff9d6b; }
  a { color: #8ab8ff; }
}
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
th[scope=row] { font-weight: normal; }
thead th { background: var(--soft); }
strong { color: var(--bad); }
figure { margin: 2rem 0; }
img { max-width: 100%; height: auto; background: #fff; }
figcaption, .quiet { font-size: .9rem; opacity: .85; }
"""


def render(report: dict[str, Any], run_dir: Path) -> str:
    """The report as one HTML page that refers to nothing outside itself but the executed notebooks beside it."""
    title = f"Reproduction report, profile {report['profile']}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p>{verdict(report)}</p>
<h2>Claims</h2>
{_claims(report)}
<h2>Figures</h2>
{"".join(_figure(figure, run_dir) for figure in report["figures"]) or "<p>This run drew none.</p>"}
<h2>Notebooks</h2>
{_notebooks(report)}
<h2>Provenance</h2>
{_provenance(report)}
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value))


def verdict(report: dict[str, Any]) -> str:
    """One sentence, as HTML."""
    failed, open_ = (sum(row["holds"] is said for row in report["claims"]) for said in (False, None))
    missing = sum(notebook["status"] != "finished" for notebook in report["notebooks"])
    parts = []
    if failed:
        parts.append(f"<strong>{failed} of {len(report['claims'])} claims do not hold.</strong>")
    else:
        parts.append(f"All {len(report['claims']) - open_} claims {'that can be judged ' if open_ else ''}hold.")
    if open_:
        parts.append(f"{open_} ask for numbers of a run on other prose, and were not judged.")
    if missing:
        parts.append(f"<strong>{missing} of {len(report['notebooks'])} notebooks were not finished.</strong>")
    return " ".join(parts)


def _claims(report: dict[str, Any]) -> str:
    names = dict.fromkeys(row["notebook"] for row in report["claims"])
    tables = (
        f"<h3>{_text(name)}</h3>{claims.table_html([row for row in report['claims'] if row['notebook'] == name])}"
        for name in names
    )
    return "\n".join(tables) or "<p>None were recorded.</p>"


def _figure(figure: dict[str, Any], run_dir: Path) -> str:
    content = base64.b64encode((run_dir / "figures" / f"{figure['name']}.png").read_bytes()).decode("ascii")
    shown = ", ".join(f"<code>{_text(name)}</code>" for name in figure["claims"])
    return (
        f'<figure><img src="data:image/png;base64,{content}" alt="{_text(figure["alt"])}">'
        f"<figcaption>{_text(figure['name'])}, from {_text(figure['notebook'])}, seed {_text(figure['seed'])}"
        f"{'. Claims: ' + shown if shown else ''}</figcaption></figure>\n"
    )


def _notebooks(report: dict[str, Any]) -> str:
    lines = []
    for notebook in report["notebooks"]:
        name, status = _text(notebook["name"]), _text(notebook["status"])
        if notebook["status"] == "not run":
            cells = (name, status, "", "", "")
        else:
            peak = "unknown" if notebook["peak_mb"] is None else f"{notebook['peak_mb']:.0f} MB"
            link = f'<a href="notebooks/{name}.ipynb">{name}</a>'
            if notebook["error"]:
                status = f"<strong>{status}</strong>: {_text(notebook['error'])}"
            cells = (link, status, f"{notebook['seconds']:.0f} s", peak, _text(notebook["seed"]))
        lines.append(
            f'<tr><th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>"
        )
    head = "".join(f'<th scope="col">{word}</th>' for word in ("notebook", "status", "time", "peak memory", "seed"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _provenance(report: dict[str, Any]) -> str:
    facts = {key: report[key] for key in ("profile", "seed", "commit", "device", "prose")} | report["versions"]
    lines = "".join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>' for key, value in facts.items()
    )
    return (
        f"<table><tbody>{lines}</tbody></table>"
        '<p class="quiet">Peak memory is that of the largest process of a notebook. report.json beside this page holds '
        "the same for programs.</p>"
    )
