"""`prosg reproduce` on small throw-away courses: what ran, what held, what failed, and what it said about it."""

import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from prosg_lib import cli, files, paths
from prosg_lib.config import get_profile
from prosg_lib.errors import UserError
from prosg_lib.reproduction import kernel, report
from prosg_lib.reproduction import notebook_files as notebooks
from prosg_lib.reproduction import run as reproduce

PACKAGE = Path(reproduce.__file__).parents[2]
PARAMETERS = 'profile = "smoke"\nseed = 0\nretrain = False\n'
BEGIN = """from prosg_lib.config import get_profile
from prosg_lib.reproduction import claims
from prosg_lib.reproduction.figures import save_figure
claims.begin({name!r}, profile=get_profile(profile), seed=seed)"""


def write_notebook(folder, name, *cells, parameters=PARAMETERS, begin=True):
    """A notebook that begins claims under its own name, runs `cells`, and nothing else."""
    made = [{"cell_type": "markdown", "source": f"# {name}", "metadata": {}}]
    for source in (parameters, *([BEGIN.format(name=name)] if begin else []), *cells):
        made.append({"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None})
    made[1]["metadata"]["tags"] = ["parameters"]
    for index, cell in enumerate(made):
        cell["id"] = f"{name}-{index}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.ipynb").write_text(
        json.dumps({"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})
    )


@contextlib.contextmanager
def runs_in(root):
    """What is run goes to the folder `runs` beside the course, and finds no books."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "repo_root", lambda: root)
        patch.setenv("PROSG_RUNS", str(root / "runs"))  # for the kernels, whose checkout is this one
        patch.delenv("PROSG_TEST_DATA", raising=False)
        yield


def run(root, *names, profile="smoke", **options):
    """Runs notebooks of a course; its exit code, what it printed, and the report."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), runs_in(root):
        code = reproduce.reproduce(get_profile(profile), names=names, **options)
    folder = root / "runs" / profile
    return SimpleNamespace(
        code=code,
        printed=printed.getvalue(),
        folder=folder,
        report=json.loads((folder / "report.json").read_text()),
        page=(folder / "report.html").read_text(),
    )


FIGURE = """
import matplotlib.pyplot as plt
from prosg_lib import plots
with plots.style():
    fig, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, 1], [0, 1], **plots.METHOD_STYLE["base"].kwargs())
save_figure(fig, "line", alt='A line "rises" & <ends>.', claims=["slope"])
plt.show()
"""


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Six notebooks: a fine one, one off the ledger, and four that fail or never run."""
    root = tmp_path_factory.mktemp("course")
    folder = root / "notebooks"
    extra = PARAMETERS + "length = ''\n"
    fine = ("claims.record('slope', 1.0, spread=0.1)\nclaims.record('length', len(length))", FIGURE, "claims.finish()")
    write_notebook(folder, "00_fine", *fine, parameters=extra)
    write_notebook(folder, "01_off", "claims.record('recall', 0.61)\nclaims.record('new', 2.0)", "claims.finish()")
    write_notebook(folder, "02_error", "1 + 1", "raise ValueError('first line\\nthe last line')", "2 + 2", begin=False)
    write_notebook(folder, "03_dead", "claims.record('a', 1)", "claims.finish()", "import os\nos._exit(0)", "2 + 2")
    write_notebook(folder, "04_silent", "claims.record('a', 1)")
    write_notebook(folder, "05_never", "claims.finish()")
    ledger = {
        "00_fine.smoke": {"slope": {"reference": 1.1, "spread": 0.1}, "length": {"reference": 3, "exact": True}},
        "01_off.smoke": {"recall": {"reference": 0.95, "spread": 0.02}},
    }
    (root / "expected").mkdir()
    for name, entries in ledger.items():
        (root / "expected" / f"{name}.json").write_text(json.dumps({"claims": entries}))
    promised = {"sentence": "It stays.", "since": "2026-11-29", "notebook": "01_off", "claims": ["recall"]}
    promises = [
        promised | {"name": "recalled", "relation": "at_least", "bar": 0.9},
        promised | {"name": "perfect", "sentence": "It is perfect.", "relation": "at_least", "bar": 1.0},
        promised | {"name": "more", "sentence": "It is more than nothing.", "relation": "at_least", "bar": 0.0},
    ]
    (root / "expected" / "promises.json").write_text(json.dumps(promises))
    return root


@pytest.fixture(scope="module")
def finished(course):
    """The first two notebooks, run with a parameter of the first."""
    return run(course, "01_off", "00_fine.ipynb", seed=7, parameters={"length": "1=2"})


class Page(HTMLParser):
    """The attributes of every element, and whether all are closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_what_is_off_fails_the_run_with_both_numbers(finished):
    """Exit code 1; the measurement and its reference are printed, for a new claim too, and every promise's verdict."""
    assert finished.code == 1
    assert "01_off recall: measured 0.61, expected 0.95 ± 0.06" in finished.printed
    assert "01_off new: measured 2, expected not in the ledger" in finished.printed
    assert "newly broken: It stays. (0.61, at least 0.9; this run)" in finished.printed
    assert "\nbroken: It is perfect. (0.61, at least 1; this run)" in finished.printed
    assert "\nkept: It is more than nothing. (0.61, at least 0; this run)" in finished.printed
    assert "1 of 3 promises are kept. 2 of 4 measurements agree" in finished.printed
    assert "--update-expected" in finished.printed
    assert f"report: {finished.folder / 'report.html'}" in finished.printed


def test_notebooks_run_in_the_courses_order_with_time_and_memory(finished):
    """Whatever order the names were given in; one line when one starts and one when it ends."""
    lines = [line for line in finished.printed.splitlines() if line.startswith("[")]
    assert lines[0] == "[1/2] 00_fine ..."
    assert re.fullmatch(r"\[1/2\] 00_fine finished: \d+ s, peak \d+ MB", lines[1])
    assert lines[2] == "[2/2] 01_off ..."
    memory = [notebook["peak_mb"] for notebook in finished.report["notebooks"][:2]]
    assert min(memory) > 20


def test_parameters_reach_the_notebooks_that_take_them(finished):
    """The seed and the retrain flag go to all, `length` to the one that has it."""
    fine, off = finished.report["notebooks"][:2]
    assert fine["parameters"] == {"profile": "smoke", "seed": 7, "retrain": False, "length": "1=2"}
    assert off["parameters"] == {"profile": "smoke", "seed": 7, "retrain": False}
    measured = {row["name"]: row["value"] for row in finished.report["claims"]}
    assert measured["length"] == 3


def test_report_has_claims_and_provenance(finished):
    """report.json holds each claim's row and where the numbers come from; what was not run is said."""
    assert finished.report["claims"][0] == {
        "notebook": "00_fine",
        "name": "slope",
        "value": 1.0,
        "source": None,
        "expected": 1.1,
        "tolerance": pytest.approx(0.3),
        "holds": True,
    }
    assert [row["holds"] for row in finished.report["claims"]] == [True, True, False, False]
    assert (finished.report["profile"], finished.report["seed"]) == ("smoke", 7)
    assert finished.report["commit"]
    assert finished.report["device"]
    assert finished.report["versions"].keys() == {"python", "torch", "transformers", "prosg_lib"}
    assert [notebook["status"] for notebook in finished.report["notebooks"]] == ["finished"] * 2 + ["not run"] * 4
    assert not finished.report["complete"]
    assert not finished.report["passed"]


def test_page_opens_without_a_network_and_shows_figures_with_their_alt_text(finished):
    """No address but data and the copies beside it; the image is there whole, its alt text as it was written."""
    page = Page(finished.page)
    assert page.open == []
    (image,) = [attributes for tag, attributes in page.found if tag == "img"]
    assert image["alt"] == 'A line "rises" & <ends>.'
    head, _, content = image["src"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content) == (finished.folder / "figures" / "line.png").read_bytes()
    links = [attributes["href"] for tag, attributes in page.found if tag == "a"]
    assert links == ["notebooks/00_fine.ipynb", "notebooks/01_off.ipynb"]
    assert all((finished.folder / link).is_file() for link in links)
    assert not [tag for tag, _ in page.found if tag in ("script", "link", "iframe")]
    assert "http" not in finished.page
    order = [finished.page.index(f"<h2>{title}</h2>") for title in ("Promises", "Figures", "Measurements", "Notebooks")]
    assert order == sorted(order)
    assert finished.page.index("It is perfect.") < finished.page.index("It is more than nothing.")


def test_figures_have_a_sidecar_and_a_readable_size(finished):
    """The sidecar says notebook, profile, seed, code, device, claims and alt text; 150 dots an inch."""
    sidecar = json.loads((finished.folder / "figures" / "line.json").read_text())
    assert sidecar.pop("versions")["torch"]
    assert sidecar.pop("commit")
    assert sidecar.pop("device")
    assert sidecar == {
        "notebook": "00_fine",
        "profile": "smoke",
        "seed": 7,
        "claims": ["slope"],
        "alt": 'A line "rises" & <ends>.',
    }
    width, height = struct.unpack(">II", (finished.folder / "figures" / "line.png").read_bytes()[16:24])
    assert (width, height) == (300, 150)


def test_the_executed_notebook_shows_the_figure_with_its_alt_text(finished):
    """The image that was saved, once; in the page that nbconvert makes of it, too."""
    copy = finished.folder / "notebooks" / "00_fine.ipynb"
    saved = base64.b64encode((finished.folder / "figures" / "line.png").read_bytes()).decode()
    (shown,) = [out for cell in json.loads(copy.read_text())["cells"] for out in cell.get("outputs", [])
                if "image/png" in out.get("data", {})]  # fmt: skip
    assert "".join(shown["data"]["image/png"]).strip() == saved
    assert shown["metadata"]["image/png"]["alt"] == 'A line "rises" & <ends>.'
    page, _ = pytest.importorskip("nbconvert").HTMLExporter().from_filename(str(copy))
    (image,) = pytest.importorskip("bs4").BeautifulSoup(page, "html.parser").find_all("img")
    shown = {"src": f"data:image/png;base64,{saved}", "alt": 'A line "rises" & <ends>.', "width": "200"}
    assert image.attrs == shown


def test_report_is_written_again_from_the_records(finished, course, capsys):
    """`prosg report` runs nothing and ends the same way."""
    (finished.folder / "report.html").unlink()
    with runs_in(course):
        assert reproduce.show(get_profile("smoke")) == 1
    assert "recall" in capsys.readouterr().out
    assert (finished.folder / "report.html").read_text() == finished.page


def test_a_failed_cell_ends_the_run_and_says_how_to_go_on(finished, course):
    """Which notebook, which cell, the error's last line, the command that continues; what was finished stays."""
    failed = run(course, "02_error", "05_never", seed=7)
    assert failed.code == 1
    assert "02_error failed: In [4] (`raise ValueError('first line\\nthe last line')`)" in failed.printed
    assert "ValueError: the last line" in failed.printed
    assert "prosg reproduce --profile smoke --seed 7 --notebook 02_error --notebook 05_never" in failed.printed
    assert "05_never ..." not in failed.printed
    status = {notebook["name"]: notebook["status"] for notebook in failed.report["notebooks"]}
    assert (status["00_fine"], status["02_error"], status["05_never"]) == ("finished", "failed", "not run")
    assert [row["name"] for row in failed.report["claims"]] == ["slope", "length", "recall", "new"]
    assert "ValueError: the last line" in failed.page


@pytest.mark.parametrize(
    ("failing", "options", "left"),
    [
        ("01_off", {"seed": 7}, ["01_off", "04_silent"]),
        ("00_fine", {"retrain": True, "parameters": {"length": "two words' end"}}, ["00_fine", "01_off", "04_silent"]),
        ("01_off", {"parameters": {"length": "x"}}, ["01_off", "04_silent"]),  # which take no length
        ("04_silent", {"update_expected": True}, ["00_fine", "01_off", "04_silent"]),  # written by a whole run only
    ],
)
def test_the_command_to_go_on_works(finished, course, tmp_path, monkeypatch, failing, options, left):
    """It runs what is left, as the first command would have."""
    ran, fail = [], True

    def execute(source, target, values):
        ran.append((source.stem, values))
        if fail and source.stem == failing:
            raise UserError("No.")
        kept = json.loads((finished.folder / "claims" / "00_fine.json").read_text()) | {"notebook": source.stem}
        files.write_json(root / "runs" / "smoke" / "claims" / f"{source.stem}.json", kept)

    monkeypatch.setattr(notebooks, "execute", execute)
    root = tmp_path / "course"
    shutil.copytree(course, root, ignore=shutil.ignore_patterns("runs"))
    for name in ("00_fine", "01_off", "04_silent"):  # of an earlier run; each stays until its notebook starts again
        files.write_text(root / "runs" / "smoke" / "claims" / f"{name}.json", "{}")
    printed = run(root, "00_fine", "01_off", "04_silent", **options).printed
    (command,) = re.findall("To go on: prosg (.*)", printed)
    after = [name for name in ("00_fine", "01_off", "04_silent") if name > failing]
    assert all((root / "runs" / "smoke" / "claims" / f"{name}.json").read_text() == "{}" for name in after)
    retraining = root / "runs" / "smoke" / "retraining.txt"
    assert retraining.exists() is options.get("retrain", False)
    intended, fail = {name: dict(values) for name, values in ran}, False
    ran.clear()
    with runs_in(root):
        cli.main(shlex.split(command))
    assert [name for name, _ in ran] == left
    assert not retraining.exists()
    assert all(values == intended.get(name, values) for name, values in ran)
    assert all(values["retrain"] is options.get("retrain", False) for _, values in ran)
    assert (root / "expected" / "04_silent.smoke.json").is_file() is options.get("update_expected", False)


def test_a_dead_kernel_fails_the_notebook_whatever_its_copy_says(course):
    """The kernel ends itself with exit code 0 after claims.finish(); the copy then calls every cell completed."""
    dead = run(course, "03_dead")
    copy = json.loads((dead.folder / "notebooks" / "03_dead.ipynb").read_text())
    assert {cell["metadata"]["papermill"]["status"] for cell in copy["cells"] if cell["cell_type"] == "code"} == {
        "completed"
    }
    assert dead.code == 1
    assert "03_dead failed: its kernel died" in dead.printed
    assert [row for row in dead.report["claims"] if row["notebook"] == "03_dead"] == []


def test_claims_of_an_earlier_run_do_not_count(course):
    """A notebook that does not finish its claims fails, also where an older run left a file of them."""
    stale = course / "runs" / "smoke" / "claims" / "04_silent.json"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text(json.dumps({"notebook": "04_silent", "claims": {"a": 1.0}}))
    silent = run(course, "04_silent")
    assert silent.code == 1
    assert "04_silent failed: it ended without claims.finish()" in silent.printed
    assert not stale.exists()


@contextlib.contextmanager
def started(root, *arguments, code=PACKAGE, **environment):
    """`prosg reproduce` of a course in a process of its own, with the package from the folder `code`."""
    script = (
        f"import sys; sys.path.insert(0, {str(code)!r}); from pathlib import Path; from prosg_lib import cli, paths\n"
        f"paths.repo_root = lambda: Path({str(root)!r})\n"
        "sys.exit(cli.main(['reproduce', '--profile', 'smoke', *sys.argv[1:]]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PROSG_RUNS": str(root / "runs"), "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup, around the tests, ignores
    )
    try:
        yield process
    finally:
        process.kill()


SLEEPS = "import time\ntime.sleep(100)"
HOLDS_THE_LOCK = "import re\nre.match('(a+)+$', 'a' * 60 + 'b')"  # no other Python thread runs, for years


@pytest.mark.parametrize(
    ("ending", "code", "busy"),
    [(signal.SIGTERM, 130, SLEEPS), (signal.SIGKILL, -9, HOLDS_THE_LOCK), (signal.SIGHUP, -1, HOLDS_THE_LOCK)],
)
def test_the_kernel_ends_with_the_command(tmp_path, ending, code, busy):
    """However it ends: asked to, as by Ctrl-C, it still writes the report, which says that it was interrupted."""
    tell = f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}}\\n')\n"
    write_notebook(tmp_path / "notebooks", "00_long", tell + busy, begin=False)
    with started(tmp_path) as process:
        wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().endswith("\n"))
        kernel = int((tmp_path / "pid").read_text())
        process.send_signal(ending)
        printed, said = process.communicate(timeout=120)
    assert process.returncode == code
    wait_until(lambda: not is_running(kernel))
    if ending == signal.SIGTERM:
        assert "00_long failed: it was interrupted" in printed
        assert "prosg: interrupted." in said
        built = json.loads((tmp_path / "runs" / "smoke" / "report.json").read_text())
        assert [notebook["status"] for notebook in built["notebooks"]] == ["failed"]


def test_an_interruption_that_is_lost_is_repeated(course, tmp_path, monkeypatch):
    """As by an object that is deleted just then; once it has ended a notebook, there are no more."""

    class Deleted:
        def __del__(self):
            reproduce.interrupt(signal.SIGTERM, None)

    def execute(source, target, values):
        monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)
        Deleted()
        time.sleep(100)

    monkeypatch.setattr(notebooks, "execute", execute)
    monkeypatch.setattr(reproduce, "AGAIN_S", 0.5)
    shutil.copytree(course, tmp_path / "course", ignore=shutil.ignore_patterns("runs"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "course", "00_fine")
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_kernel_runs_this_python_and_this_checkout_whatever_else_is_there(tmp_path):
    """Jupyter finds another `python3` first, and PYTHONPATH could not name the checkout's folder; a relative folder
    for runs is the command's."""
    checkout = tmp_path / "a: ü, two words"
    shutil.copytree(PACKAGE / "prosg_lib", checkout / "prosg_lib", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "pyproject.toml").touch()
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "", "language": "python"}))
    record = "import sys, prosg_lib\nprint(sys.executable, prosg_lib.__file__)\nclaims.finish()"
    write_notebook(checkout / "notebooks", "00_where", record)
    environment = {"JUPYTER_PATH": str(tmp_path / "jupyter"), "PROSG_RUNS": os.path.relpath(checkout / "runs")}
    with started(checkout, "--notebook", "00_where", code=checkout, **environment) as process:
        printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, printed + said
    copy = json.loads((checkout / "runs" / "smoke" / "notebooks" / "00_where.ipynb").read_text())
    (line,) = copy["cells"][-1]["outputs"][0]["text"]
    assert line == f"{sys.executable} {checkout / 'prosg_lib' / '__init__.py'}\n"


def test_what_a_cell_prints_without_end_is_left_out(tmp_path):
    """The next cell prints again, and of a line that is overwritten a thousand times the last is kept."""
    prints = ("print('x' * 5_000_000)", "for i in range(10_000):\n    print(f'\\r{i}', end='')", "print('well')")
    write_notebook(tmp_path, "00_long", *prints, begin=False)
    notebooks.execute(tmp_path / "00_long.ipynb", tmp_path / "copy.ipynb", {"seed": 1})
    *_, cut, counted, well = json.loads((tmp_path / "copy.ipynb").read_text())["cells"]
    text = "".join(cut["outputs"][0]["text"])
    assert text == "x" * kernel.ROOM + "\n[the rest was left out]\n"
    assert [cell["outputs"][0]["text"] for cell in (counted, well)] == [["9999"], ["well\n"]]


def test_a_cell_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "CELL_S", 3)
    write_notebook(tmp_path, "00_long", "import time\ntime.sleep(100)", begin=False)
    with pytest.raises(UserError, match=r"a cell ran for more than 0\.00\d+ hours and was ended"):
        notebooks.execute(tmp_path / "00_long.ipynb", tmp_path / "copy.ipynb", {"seed": 1})


def is_running(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_update_writes_ledger_and_reference_figures(tmp_path):
    """A new course in the profile cpu: the ledger and the figures appear, and the run holds against them."""
    write_notebook(tmp_path / "notebooks", "00_new", "claims.record('slope', 1.0)", FIGURE, "claims.finish()")
    done = run(tmp_path, profile="cpu", update_expected=True)
    assert done.code == 0
    assert done.report["passed"]
    ledger = json.loads((tmp_path / "expected" / "00_new.cpu.json").read_text())
    assert ledger["claims"] == {"slope": {"reference": 1.0, "spread": 0.0}}
    assert json.loads((tmp_path / "figures" / "line.json").read_text())["profile"] == "cpu"
    assert (tmp_path / "figures" / "line.png").is_file()


@pytest.mark.parametrize(
    ("names", "selected"),
    [
        (["06"], ["06_recall"]),
        (["6b", "0.ipynb"], ["00_tour", "06b_costs"]),
        (["06b_costs.ipynb", "06b_c", "06b"], ["06b_costs"]),
        ([], ["00_tour", "06_recall", "06b_costs", "07_steps"]),
    ],
)
def test_a_notebook_is_named_by_its_number_or_first_letters(names, selected):
    """In the course's order, each once; a number is that notebook's alone, though others begin with it."""
    course = [Path(f"{name}.ipynb") for name in ("00_tour", "06_recall", "06b_costs", "07_steps")]
    assert [path.stem for path in reproduce.select(course, names)] == selected
    with pytest.raises(UserError, match=r"^'06_' may be 06_one or 06_two; write more of the name\.$"):
        reproduce.select([Path("06_one.ipynb"), Path("06_two.ipynb")], ["06_"])


# What is refused before anything runs


def refused(root, *names, **options):
    with pytest.raises(UserError) as caught:
        run(root, *names, **options)
    return str(caught.value)


def test_unknown_profile_notebook_and_parameter_are_refused_with_the_known_ones(course):
    """papermill would only warn of a parameter; nothing is run, nothing recorded is lost."""
    before = sorted((course / "runs").rglob("*"))
    assert "smok" in refused(course, profile="smok")
    assert "no notebook '06_gone'; the course has 00_fine, 01_off" in refused(course, "06_gone")
    assert "no notebook ''" in refused(course, "")
    assert "'leng'" in refused(course, parameters={"leng": "1"})
    assert "--param length." in refused(course, "00_fine", parameters={"leng": "1"})
    assert "--param nothing else." in refused(course, "01_off", parameters={"length": "1"})
    assert "take --profile, --seed" in refused(course, parameters={"seed": "1"})
    assert sorted((course / "runs").rglob("*")) == before


def test_a_second_run_in_the_same_folder_is_refused(course):
    """It would remove the claims of the first, which holds the folder until it ends, however it does."""
    folder = course / "runs" / "smoke"
    with files.lock(folder / "reproduce.lock", "The folder"):
        said = refused(course, "00_fine")
    assert said.startswith(f"The folder {folder} is in use by process {os.getpid()} on ")


@pytest.mark.parametrize(("place", "option"), [("runs", "PROSG_RUNS"), ("expected", "a checkout of your own")])
def test_a_folder_that_cannot_be_written_to_is_found_out_before_the_work(course, tmp_path, monkeypatch, place, option):
    """A file stands in its place: what forbids writing to root as well."""
    monkeypatch.setattr(notebooks, "execute", None)
    root = tmp_path / "course"
    shutil.copytree(course, root, ignore=shutil.ignore_patterns("runs", "expected"))
    (root / place).touch()
    assert re.search(rf"{place}.* cannot be written to .*{option}", refused(root, update_expected=True))


def test_report_of_no_run_says_what_to_run(course):
    """An empty folder is no report."""
    with runs_in(course), pytest.raises(UserError, match="prosg reproduce --profile gpu"):
        report.build(get_profile("gpu"))


# Clean notebooks


def test_a_fresh_notebook_is_clean(course):
    """What the course's own notebooks have to look like."""
    assert notebooks.problems(course / "notebooks" / "00_fine.ipynb") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({2: {"outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}]}}, "cell 2 has outputs"),
        ({2: {"execution_count": 3}}, "cell 2 has outputs or an execution count"),
        ({"kernelspec": {"name": "conda-env-mine"}}, "kernelspec is not python3"),
        ({1: {"metadata": {}}}, "0 code cells tagged 'parameters'"),
        ({1: {"source": "profile = 'smoke'"}}, "does not set seed"),
        ({1: {"source": PARAMETERS + "steps = 2 * len(profile)"}}, "one `name = literal` a line"),
        ({index: {"id": str(index)} for index in range(4)}, "--keep-id"),
        ({index: {"id": "same"} for index in range(2)}, "two cells have the same id"),
        ({0: {"source": None}}, "not a valid notebook"),
    ],
)
def test_unclean_notebooks_are_named(tmp_path, changes, said):
    """Each way a notebook gets dirty is one sentence with the notebook's name."""
    write_notebook(tmp_path, "00_dirty", "claims.finish()")
    path = tmp_path / "00_dirty.ipynb"
    made = json.loads(path.read_text())
    for place, change in changes.items():
        (made["metadata"][place] if place == "kernelspec" else made["cells"][place]).update(change)
    path.write_text(json.dumps(made))
    found = notebooks.problems(path)
    assert any(re.search(said, problem) for problem in found), found
    assert all(problem.startswith("00_dirty.ipynb: ") for problem in found)


def test_check_finds_dirty_notebooks_orphaned_ledgers_and_wrong_quotes(tmp_path, monkeypatch):
    """One call looks at everything that a commit may break."""
    monkeypatch.setattr(paths, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(reproduce.links, "check_links", list)  # which test_links.py is about
    write_notebook(tmp_path / "notebooks", "00_new", "claims.finish()")
    assert reproduce.check() == []
    monkeypatch.setattr(reproduce.links, "check_links", lambda: ["README.md: a link"])
    (tmp_path / "expected").mkdir()
    (tmp_path / "expected" / "01_gone.smoke.json").write_text('{"claims": {}}')
    (tmp_path / "expected" / "00_new.smok.json").write_text('{"claims": {}}')
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "race.py").touch()
    for name in ("race", "race-cuda", "gone"):
        (tmp_path / "expected" / f"{name}.benchmark.json").write_text('{"claims": {}}')
    promise = {"name": "a", "sentence": "A.", "since": "", "notebook": "00_new", "claims": ["a"], "relation": "at_most"}
    (tmp_path / "expected" / "promises.json").write_text(json.dumps([promise | {"bar": 1}]))
    (tmp_path / "README.md").write_text("0.5<!--claim smoke 00_new a-->")
    found = reproduce.check()
    assert [problem.partition(":")[0] for problem in found] == [
        "expected/00_new.smok.json",
        "expected/01_gone.smoke.json",
        "expected/gone.benchmark.json",
        "expected/promises.json",
        "README.md, line 1",
        "README.md",
    ]
