"""Runs the course's notebooks in order, compares their claims with the ledger, and writes the report."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prosg_lib import files, paths
from prosg_lib.config import Profile, get_profile
from prosg_lib.errors import UserError
from prosg_lib.reproduction import claims, notebook_files, promises, quotes, report

# Only these runs' figures are kept in the repository, and where.
REFERENCE_FIGURES = {"cpu": ".", "gpu": "gpu"}
GIVEN = ("profile", "seed", "retrain")  # parameters that have an option of their own


@dataclass(frozen=True)
class Places:
    """The folders of a reproduction."""

    notebooks: Path
    expected: Path
    figures: Path
    runs: Path  # of all profiles

    @classmethod
    def default(cls) -> "Places":
        """This checkout's."""
        return cls(paths.notebooks_dir(), paths.expected_dir(), paths.figures_dir(), paths.runs_dir("any").parent)


def select(course: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The notebooks of those names in the course's order; all where no name is given.

    Raises:
        UserError: an unknown name; lists the known ones.
    """
    wanted = [name.removesuffix(".ipynb") for name in names]
    known = [path.stem for path in course]
    for name in wanted:
        if name not in known:
            raise UserError(f"There is no notebook {name!r}; the course has {', '.join(known)}.")
    return [path for path in course if not wanted or path.stem in wanted]


def bind(selected: Sequence[Path], given: Mapping[str, Any], extra: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What each notebook is started with, by its name.

    Args:
        given: profile, seed and retrain; a notebook gets those that it takes.
        extra: parameters as typed, name -> text; each goes to the notebooks that take it.
    Raises:
        UserError: no selected notebook takes a parameter (papermill would only warn), it has an option of its own, or
            its value is of another kind than the notebook's default.
    """
    defaults = {path.stem: notebook_files.parameters(path) for path in selected}
    for name in extra:
        if name in GIVEN:
            raise UserError(f"The parameter {name!r} has its own option; use --{name}.")
        if not any(name in known for known in defaults.values()):
            known = sorted({key for names in defaults.values() for key in names} - set(GIVEN))
            raise UserError(
                f"No notebook takes a parameter {name!r}; they take --profile, --seed, --retrain"
                + (f" and --param {', '.join(known)}." if known else ", and none that --param could set.")
            )
    bound = {}
    for notebook, known in defaults.items():
        bound[notebook] = {name: value for name, value in given.items() if name in known}
        for name, text in extra.items():
            if name in known:
                bound[notebook][name] = _parse(notebook, name, text, known[name])
    return bound


def _parse(notebook: str, name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise UserError(
            f"The parameter {name!r} of {notebook} is of type {type(default).__name__} (its default is {default!r}); "
            f"{text!r} is not."
        )
    return value


def reproduce(
    profile: Profile,
    *,
    seed: int = 0,
    retrain: bool = False,
    names: Sequence[str] = (),
    parameters: Mapping[str, str] | None = None,
    update_expected: bool = False,
    places: Places | None = None,
) -> int:
    """Runs notebooks, says on the terminal what happens, and writes runs/<profile>/report.{json,html}.

    A notebook is finished when its process ended well *and* left the claims of this very run; the executed copy does
    not count, because it calls a notebook completed even if its kernel died. The first one that fails ends the run,
    because later ones may need it; what was finished stays, and the report is written of it.

    Args:
        names: only these notebooks; what others of the profile recorded before stays in the report. All, and afresh,
            where empty.
        parameters: further notebook parameters as typed, name -> text.
        update_expected: write the ledger from this run (`claims.update`), and for the reference profiles the figures.
    Returns:
        0, or 1 where a notebook failed, or where `show` says so of those that ran.
    Raises:
        UserError: unknown notebook or parameter; nothing was run.
        KeyboardInterrupt: after the running notebook was stopped and the report written.
    """
    places = places or Places.default()
    course = notebook_files.course(places.notebooks)
    selected = select(course, names)
    arguments = bind(selected, {"profile": profile.name, "seed": seed, "retrain": retrain}, parameters or {})
    run_dir = places.runs / profile.name
    if retrain:
        from prosg_lib.training.stages import forget

        forget(profile)
    _forget(run_dir, None if len(selected) == len(course) else [path.stem for path in selected])

    failed = None
    interrupted = False
    for number, path in enumerate(selected, start=1):
        label = f"[{number}/{len(selected)}] {path.stem}"
        print(f"{label} ...", flush=True)
        record, interrupted = _run(path, run_dir, arguments[path.stem])
        files.write_json(run_dir / report.RUN_FILE, report.load_records(run_dir) | {path.stem: record})
        peak = "" if record["peak_mb"] is None else f", peak {record['peak_mb']:.0f} MB"
        print(f"{label} {record['status']}: {record['seconds']:.0f} s{peak}", flush=True)
        if record["error"]:
            failed = number - 1
            break

    ran = [path.stem for path in selected[: len(selected) if failed is None else failed + 1]]
    if update_expected and failed is None:
        for written in claims.update(run_dir, profile.name, places.expected, ran):
            print(f"ledger: {written}")
        _keep_figures(profile.name, run_dir, places.figures, ran)
    ended = show(profile, places, only=ran)
    if failed is not None:
        name = selected[failed].stem
        rest = "".join(f" --notebook {path.stem}" for path in selected[failed:])
        print(
            f"\n{name} failed: {record['error']}\n"
            f"Its executed copy and log: {_copy(run_dir, name)}, {_log(run_dir, name)}\n"
            f"What was finished is kept. To go on: prosg reproduce --profile {profile.name}"
            + (f" --seed {seed}" if seed else "")
            + "".join(f" --param {name}={text}" for name, text in (parameters or {}).items())
            + rest
            + ("\nThe ledger was not touched, because the run was not finished." if update_expected else "")
        )
        ended = 1
    if interrupted:
        raise KeyboardInterrupt
    return ended


def show(profile: Profile, places: Places | None = None, only: Sequence[str] | None = None) -> int:
    """Writes the report of what runs/<profile> holds, and prints its promises and whatever does not hold.

    Args:
        only: the notebooks whose claims decide the result; all where None.
    Returns:
        0, or 1 where a measurement is too far from the reference run's, or a promise is broken that the reference run
        kept. One that the reference run broke as well is listed, and changes nothing.
    Raises:
        UserError: nothing was run.
    """
    places = places or Places.default()
    run_dir = places.runs / profile.name
    names = [path.stem for path in notebook_files.course(places.notebooks)]
    built = report.build(profile.name, run_dir, places.expected, names)
    page = report.write(built, run_dir)

    def decides(row: Mapping[str, Any]) -> bool:
        return only is None or row["notebook"] in only

    print()
    for row in built["promises"]:
        state = "newly broken" if row["newly_broken"] else "kept" if row["kept"] else "broken"
        bar = f"{row['relation'].replace('_', ' ')} {row['bar']:g}"
        print(f"{state}: {row['sentence']} ({claims.number_text(row['value'])}, {bar}; {row['source']})")
    broken = [row for row in built["promises"] if row["newly_broken"] and decides(row)]
    wrong = [row for row in built["claims"] if row["holds"] is False and decides(row)]
    print(f"\n{report.verdict(built)}")
    for row in wrong:
        value = claims.number_text(row["value"])
        print(f"  {row['notebook']} {row['name']}: measured {value}, expected {claims.expected_text(row)}")
    if any(row["expected"] is None for row in wrong):
        print("Claims that are not in the ledger are added to it with --update-expected.")
    print(f"\nreport: {page}", flush=True)
    return 1 if wrong or broken else 0


def _copy(run_dir: Path, name: str) -> Path:
    return run_dir / "notebooks" / f"{name}.ipynb"


def _log(run_dir: Path, name: str) -> Path:
    return run_dir / "logs" / f"{name}.log"


def _forget(run_dir: Path, names: Sequence[str] | None) -> None:
    """Removes what earlier runs recorded of these notebooks (of all where None), so that nothing stale is reported.

    Checkpoints stay: whether one fits is for the notebooks to decide.
    """
    if names is None:
        for folder in ("claims", "figures", "notebooks", "logs"):
            shutil.rmtree(run_dir / folder, ignore_errors=True)
        (run_dir / report.RUN_FILE).unlink(missing_ok=True)
        return
    for figure in report.figures(run_dir):
        if figure["notebook"] in names:
            for suffix in (".png", ".json"):
                (run_dir / "figures" / f"{figure['name']}{suffix}").unlink()
    for name in names:
        claims.measured_path(run_dir, name).unlink(missing_ok=True)
    records = report.load_records(run_dir)
    if records.keys() & set(names):
        files.write_json(run_dir / report.RUN_FILE, {key: value for key, value in records.items() if key not in names})


def _run(path: Path, run_dir: Path, values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Executes one notebook in a process of its own; returns its record, and whether Ctrl-C ended it."""
    copy, log_path = _copy(run_dir, path.stem), _log(run_dir, path.stem)
    for file in (copy, log_path):
        file.parent.mkdir(parents=True, exist_ok=True)
    package = str(Path(__file__).resolve().parents[2])
    run_id = uuid.uuid4().hex
    environment = os.environ | {
        "PROSG_RUN_ID": run_id,
        "PROSG_RUNS": str(run_dir.parent.resolve()),
        "PYTHONFAULTHANDLER": "1",  # whatever kills a process, its threads' places are in the log
        # The kernel shall run the code that runs here, installed or not.
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    started = time.time()
    interrupted = False
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", notebook_files.__name__, str(path), str(copy), json.dumps(values)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            _follow(process.stdout, log)
            code, peak_mb = _wait(process)
        except KeyboardInterrupt:
            interrupted = True
            process.terminate()
            code, peak_mb = _wait(process)
    record = {
        "notebook": path.stem,
        "status": "finished",
        "seconds": round(time.time() - started, 2),
        "peak_mb": peak_mb,
        "seed": values["seed"],
        "parameters": dict(values),
        "run_id": run_id,
        "error": None,
    }
    if interrupted:
        record["error"] = "it was interrupted"
    elif code != 0:
        record["error"] = _why(path, copy, log_path, code)
    elif report.measured(run_dir, record) is None:
        record["error"] = "it ended without claims.finish(), so its claims are not known; let its last cell call it"
    if record["error"]:
        record["status"] = "failed"
        claims.measured_path(run_dir, path.stem).unlink(missing_ok=True)  # a cell after finish() may have failed
    return record, interrupted


def _follow(stream: BinaryIO, log: BinaryIO) -> None:
    """Copies a process's output into its log until it ends; on a terminal, shows the progress bar that is in it."""
    show_bar = sys.stderr.isatty()
    while chunk := os.read(stream.fileno(), 65536):
        log.write(chunk)
        log.flush()
        if show_bar:
            for bar in re.findall(r"Executing:[^\r\n]*?\]", chunk.decode("utf-8", errors="ignore")):
                print(f"\r  {bar}\x1b[K", end="", file=sys.stderr, flush=True)
    if show_bar:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _wait(process: subprocess.Popen) -> tuple[int, float | None]:
    """A process's exit code and the peak memory, in MB, of the largest process among it and its waited-for children."""
    if not hasattr(os, "wait4"):
        return process.wait(), None
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return process.returncode, round(usage.ru_maxrss * unit / 1e6, 1)


def _why(source: Path, copy: Path, log: Path, code: int) -> str:
    """Which cell of a failed notebook, and the last line of its error."""
    if code < 0:
        return f"its process was killed (signal {-code}); often memory was short (a smaller profile needs less)"
    text = log.read_text(encoding="utf-8", errors="replace")
    executed = notebook_files.cells(copy) if copy.is_file() else []  # it may have failed before the first cell
    started = [cell for cell in executed if cell["metadata"].get("papermill", {}).get("start_time")]
    last = max(started, key=lambda cell: cell["metadata"]["papermill"]["start_time"], default=None)
    where = _where(source, last) if last else "before the first cell"
    if "CellTimeoutError" in text:
        return f"{where}: it ran for more than {notebook_files.CELL_S / 3600:g} hours and was ended"
    if "DeadKernelError" in text:
        return f"{where}: the kernel died; often memory was short (a smaller profile needs less)"
    for cell in executed:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                lines = [line.strip() for line in "".join(output["evalue"]).splitlines() if line.strip()]
                return f"{_where(source, cell)}: {output['ename']}: {lines[-1] if lines else ''}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"it could not be executed: {lines[-1] if lines else 'its process said nothing'}"


def _where(source: Path, cell: Mapping[str, Any]) -> str:
    """A cell as a reader finds it in the source: its number among all cells, from 1, and its first line."""
    ids = [other.get("id") for other in notebook_files.cells(source)]
    number = ids.index(cell["id"]) + 1 if cell.get("id") in ids else None
    first = next((line.strip() for line in cell["source"].splitlines() if line.strip()), "")
    return f"cell {number} (`{first[:60]}`)" if number else f"the parameters (`{first[:60]}`)"


def _keep_figures(profile: str, run_dir: Path, figures_dir: Path, names: Sequence[str]) -> None:
    """Copies a reference run's figures with their sidecars into the repository."""
    if profile not in REFERENCE_FIGURES:
        return
    for figure in report.figures(run_dir):
        if figure["notebook"] in names:
            for suffix in (".png", ".json"):
                content = (run_dir / "figures" / f"{figure['name']}{suffix}").read_bytes()
                files.write_bytes(figures_dir / REFERENCE_FIGURES[profile] / f"{figure['name']}{suffix}", content)


def check(root: Path | None = None) -> list[str]:
    """What a checkout's notebooks, ledger, promises and quoted numbers get wrong, one line each.

    Args:
        root: the checkout; this one where None.
    """
    root = Path(root) if root is not None else paths.repo_root()
    course = notebook_files.course(root / "notebooks")
    found = [problem for path in course for problem in notebook_files.problems(path)]
    names = {path.stem for path in course}
    for ledger in sorted((root / "expected").glob("*.*.json")):
        name, _, profile = ledger.stem.partition(".")
        try:
            if profile == claims.BENCHMARK:
                if not (root / "benchmarks" / f"{name.removesuffix(claims.ON_GPU)}.py").is_file():
                    raise UserError(f"there is no benchmark {name!r}")
            else:
                if name not in names:
                    raise UserError(f"there is no notebook {name!r}")
                get_profile(profile)
            claims.expected(name, profile, root / "expected")
        except UserError as error:
            found.append(f"expected/{ledger.name}: {error}")
    try:
        for row in promises.judge({}, "cpu", root / "expected"):
            if row["value"] is None:
                found.append(f"expected/{promises.FILE}: no ledger has the claims of the promise {row['name']!r}")
    except UserError as error:
        found.append(str(error))
    return found + quotes.check_quotes(root)
