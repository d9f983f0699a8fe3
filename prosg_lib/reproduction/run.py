"""Runs the course's notebooks in order, compares their claims with the ledger, and writes the report."""

import os
import re
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prosg_lib import files, paths
from prosg_lib.config import Profile, get_profile
from prosg_lib.errors import UserError
from prosg_lib.reproduction import ledger, links, notebook_files, promises, quotes, report

# Only these runs' figures are kept in the repository, and where.
REFERENCE_FIGURES = {"cpu": ".", "gpu": "gpu"}
FOLDERS = ("PROSG_RUNS", "PROSG_TEST_DATA")
INTERRUPTED = "it was interrupted"
AGAIN_S = 10.0


def interrupt(number: int, frame: object) -> None:
    """Signal handler: raises KeyboardInterrupt, and again every `AGAIN_S` until a notebook has ended by it.

    Python prints and drops one that is raised while an object is being deleted.
    """
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    raise KeyboardInterrupt


def select(course: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The notebooks of those names in the course's order; all where no name is given.

    Args:
        names: each a notebook's name, its number (3 or 03), or the first letters of one notebook alone.
    Raises:
        UserError: a name of no notebook, or of several; lists those that it may mean.
    """
    wanted = {_find([path.stem for path in course], name.removesuffix(".ipynb")) for name in names}
    return [path for path in course if not names or path.stem in wanted]


def _find(known: Sequence[str], name: str) -> str:
    number = re.sub(r"^(\d)(?!\d)", r"0\1", name)
    for fits in (
        [stem for stem in known if stem == name],
        [stem for stem in known if stem.partition("_")[0] == number],
        [stem for stem in known if name and stem.startswith(name)],
    ):
        if len(fits) == 1:
            return fits[0]
    if fits:
        raise UserError(f"{name!r} may be {' or '.join(fits)}; write more of the name.")
    raise UserError(f"There is no notebook {name!r}; the course has {', '.join(known)}.")


def bind(selected: Sequence[Path], given: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What each notebook is started with, by its name: of all values those that it takes.

    Args:
        given: profile, seed and retrain.
        texts: values of the notebooks' own parameters; all of them are texts.
    Raises:
        UserError: no selected notebook takes such a parameter (papermill would only warn).
    """
    defaults = {path.stem: notebook_files.parameters(path) for path in selected}
    known = {name for own in defaults.values() for name, value in own.items() if isinstance(value, str)} - given.keys()
    for name in texts.keys() - known:
        others = ", ".join(sorted(known)) or "nothing else"
        raise UserError(
            f"No notebook takes a text {name!r}; they take --profile, --seed and --retrain, and with --param {others}."
        )
    values = {**texts, **given}
    return {notebook: {name: values[name] for name in own if name in values} for notebook, own in defaults.items()}


def reproduce(
    profile: Profile,
    *,
    seed: int = 0,
    retrain: bool = False,
    names: Sequence[str] = (),
    parameters: Mapping[str, str] | None = None,
    update_expected: bool = False,
) -> int:
    """Runs notebooks, reports their progress on the terminal, and writes runs/<profile>/report.{json,html}.

    A notebook is finished when papermill executed it *and* it left its claims. The first one that fails ends the run,
    because later ones may need it; what was finished stays, and the report is written of it. What a notebook's earlier
    run recorded stays until it starts again.

    Args:
        retrain: let the notebooks train what they need, in the place of what was trained here before; what an
            interrupted retraining trained is not trained again.
        names: only these notebooks; what others of the profile recorded before stays in the report. All where empty.
        parameters: values of the notebooks' own parameters, which are texts.
        update_expected: write the ledger from this run (`ledger.update`), and for the reference profiles the figures.
    Returns:
        0, or 1 where a notebook failed, or where `show` says so of those that ran.
    Raises:
        UserError: unknown notebook or parameter; nothing was run.
        KeyboardInterrupt: after the running notebook was stopped and the report written.
    """
    selected = select(notebook_files.course(), names)
    given = {"profile": profile.name, "seed": seed, "retrain": retrain}
    arguments = bind(selected, given, parameters or {})
    for name in FOLDERS:  # relative ones would be looked for in the notebooks' folder
        if folder := os.environ.get(name):
            os.environ[name] = str(paths.expanded(folder).absolute())
    run_dir = paths.runs_dir(profile.name)
    files.check_writable(run_dir, "PROSG_RUNS")
    if update_expected:
        files.check_writable(paths.expected_dir(), "a checkout of your own")
    with files.lock(run_dir / "reproduce.lock", f"The folder {run_dir}"):
        if retrain:
            from prosg_lib.training import checkpoints

            checkpoints.begin_retraining(profile)
        ran, error = _run_all(profile, selected, arguments)
        if update_expected and not error:
            for written in ledger.update(profile.name, ran):
                print(f"ledger: {written}")
            _keep_figures(profile, ran)
        if retrain and not error:
            checkpoints.end_retraining(profile)
    ended = show(profile, only=ran)
    if not error:
        return ended
    # The ledger is written by a run as a whole.
    left = selected if update_expected else selected[len(ran) - 1 :]
    print(
        f"\n{ran[-1]} failed: {error}\n"
        f"Its executed copy: {run_dir / 'notebooks' / ran[-1]}.ipynb\n"
        f"What was finished is kept. To go on: {_command(given, parameters or {}, arguments, left, update_expected)}"
        + ("\nThe ledger was not touched, because the run was not finished." if update_expected else "")
    )
    if error == INTERRUPTED:
        raise KeyboardInterrupt
    return 1


def _run_all(
    profile: Profile, selected: Sequence[Path], arguments: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], str | None]:
    """Runs notebooks to the first that fails; the names of those that were run, and what went wrong with the last."""
    ran = []
    for path in selected:
        ran.append(path.stem)
        label = f"[{len(ran)}/{len(selected)}] {path.stem}"
        print(f"{label} ...", flush=True)
        _forget(profile, path.stem)
        record = _run(path, profile, arguments[path.stem])
        run_dir = paths.runs_dir(profile.name)
        files.write_json(run_dir / report.RUN_FILE, report.load_records(run_dir) | {path.stem: record})
        peak = "" if record["peak_mb"] is None else f", peak {record['peak_mb']:.0f} MB"
        print(f"{label} {record['status']}: {record['seconds']:.0f} s{peak}", flush=True)
        if record["error"]:
            return ran, record["error"]
    return ran, None


def _command(
    given: Mapping[str, Any],
    texts: Mapping[str, str],
    arguments: Mapping[str, Mapping[str, Any]],
    notebooks: Sequence[Path],
    update_expected: bool,
) -> str:
    """The command that runs these notebooks as this one did; of --param what they take."""
    words = ["prosg", "reproduce", "--profile", given["profile"]]
    words += ["--seed", str(given["seed"])] if given["seed"] else []
    words += ["--retrain"] if given["retrain"] else []
    words += ["--update-expected"] if update_expected else []
    for name, text in texts.items():
        if any(name in arguments[path.stem] for path in notebooks):
            words += ["--param", f"{name}={text}"]
    return shlex.join([*words, *(word for path in notebooks for word in ("--notebook", path.stem))])


def show(profile: Profile, only: Sequence[str] | None = None) -> int:
    """Writes the report of what runs/<profile> holds, and prints its promises and whatever does not hold.

    Args:
        only: the notebooks whose claims decide the result; all where None.
    Returns:
        0, or 1 where a measurement is too far from the reference run's, or a promise is broken that the reference run
        kept. One that the reference run broke as well is listed, and changes nothing.
    Raises:
        UserError: nothing was run.
    """
    built = report.build(profile)
    page = report.write(built, paths.runs_dir(profile.name))

    print()
    for row in built["promises"]:
        state = "newly broken" if row["newly_broken"] else "kept" if row["kept"] else "broken"
        bar = f"{row['relation'].replace('_', ' ')} {row['bar']:g}"
        print(f"{state}: {row['sentence']} ({ledger.number_text(row['value'])}, {bar}; {row['source']})")
    broken = [row for row in built["promises"] if row["newly_broken"] and (only is None or row["notebook"] in only)]
    wrong = [row for row in built["claims"] if row["holds"] is False and (only is None or row["notebook"] in only)]
    print(f"\n{report.verdict(built)}")
    for row in wrong:
        value = "not measured" if row["value"] is None else f"measured {ledger.number_text(row['value'])}"
        print(f"  {row['notebook']} {row['name']}: {value}, expected {ledger.expected_text(row)}")
    if any(row["expected"] is None for row in wrong):
        print("Claims that are not in the ledger are added to it with --update-expected.")
    print(f"\nreport: {page}", flush=True)
    return 1 if wrong or broken else 0


def _forget(profile: Profile, notebook: str) -> None:
    """Removes what a notebook's earlier run recorded, when it starts again, so that nothing stale is reported.

    Checkpoints stay: whether one fits is for the notebooks to decide.
    """
    run_dir = paths.runs_dir(profile.name)
    for figure in report.figures(run_dir):
        if figure["notebook"] == notebook:
            for suffix in (".png", ".json"):
                (run_dir / "figures" / f"{figure['name']}{suffix}").unlink()
    ledger.measured_path(notebook, profile.name).unlink(missing_ok=True)
    records = report.load_records(run_dir)
    files.write_json(run_dir / report.RUN_FILE, {name: record for name, record in records.items() if name != notebook})


def _run(path: Path, profile: Profile, values: Mapping[str, Any]) -> dict[str, Any]:
    """Executes one notebook; returns its record."""
    started = time.time()
    error, found = None, None
    try:
        notebook_files.execute(path, paths.runs_dir(profile.name) / "notebooks" / path.name, values)
        found = ledger.measured(path.stem, profile.name)
        if found is None:
            error = "it ended without claims.finish(), so its claims are not known; let its last cell call it"
    except UserError as caught:
        error = str(caught)
    except KeyboardInterrupt:
        error = INTERRUPTED
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
    if error:
        ledger.measured_path(path.stem, profile.name).unlink(missing_ok=True)  # a cell after finish() may have failed
    return {
        "notebook": path.stem,
        "status": "failed" if error else "finished",
        "seconds": round(time.time() - started, 2),
        "peak_mb": found and found["peak_mb"],
        "seed": values["seed"],
        "parameters": dict(values),
        "error": error,
    }


def _keep_figures(profile: Profile, names: Sequence[str]) -> None:
    """Copies a reference run's figures with their sidecars into the repository."""
    if profile.name not in REFERENCE_FIGURES:
        return
    run_dir, kept = paths.runs_dir(profile.name), paths.figures_dir() / REFERENCE_FIGURES[profile.name]
    for figure in report.figures(run_dir):
        if figure["notebook"] in names:
            for suffix in (".png", ".json"):
                content = (run_dir / "figures" / f"{figure['name']}{suffix}").read_bytes()
                files.write_bytes(kept / f"{figure['name']}{suffix}", content)


def check() -> list[str]:
    """What the checkout's notebooks, ledger, promises, quoted numbers and links get wrong, one line each."""
    course = notebook_files.course()
    found = [problem for path in course for problem in notebook_files.problems(path)]
    names = {path.stem for path in course}
    for path in sorted(paths.expected_dir().glob("*.*.json")):
        name, _, profile = path.stem.partition(".")
        try:
            if profile == ledger.BENCHMARK:
                if not (paths.repo_root() / "benchmarks" / f"{name.removesuffix(ledger.ON_GPU)}.py").is_file():
                    raise UserError(f"there is no benchmark {name!r}")
            else:
                if name not in names:
                    raise UserError(f"there is no notebook {name!r}")
                get_profile(profile)
            ledger.expected(name, profile)
        except UserError as error:
            found.append(f"expected/{path.name}: {error}")
    try:
        for row in promises.judge({}, "cpu"):
            if row["value"] is None:
                found.append(f"expected/{promises.FILE}: no ledger has the claims of the promise {row['name']!r}")
    except UserError as error:
        found.append(str(error))
    return found + quotes.check_quotes() + links.check_links()
