"""How every benchmark begins and ends: its options, the one JSON line, and the ledger of what texts quote.

With `--keep` a result goes into the ledger, `expected/<benchmark>.benchmark.json`, as a notebook's measurements do, one
from a GPU into `expected/<benchmark>-cuda.benchmark.json`: a ratio is shown and not judged, a count is exact. Goals
that were promised stand in `expected/promises.json`. Texts quote a result as `NUMBER<!--claim benchmark NAME RATIO-->`,
and `prosg check` compares the two. `make benchmarks` runs, and keeps, all that README quotes.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from prosg_lib import files, paths, provenance
from prosg_lib.errors import UserError
from prosg_lib.reproduction import ledger


class _Options(argparse.ArgumentParser):
    """Says what is missing when the options are read, before anything runs."""

    needs: Sequence[str] = ()

    def parse_args(self, *arguments):
        options = super().parse_args(*arguments)
        missing = [package for package in self.needs if find_spec(package) is None]
        if missing:
            self.error(f"{' and '.join(missing)} missing; install with: pip install {' '.join(missing)}")
        if options.keep:
            files.check_writable(paths.expected_dir(), "a checkout of your own")
        return options


def parser(doc: str, needs: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A benchmark's options, of which `--keep` is every one's.

    Args:
        doc: its docstring, whose first line says what it does.
        needs: packages that are not among the project's requirements.
    """
    made = _Options(description=doc.partition("\n")[0])
    made.needs = needs
    made.add_argument("--keep", action="store_true", help="write the result into the ledger, for texts to quote")
    return made


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; what the user can correct is one sentence, as it is of the `prosg` command."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def line(ratios: Mapping[str, float], goals: Mapping[str, float], lower_is_better: bool) -> str:
    """Ratios beside their goals, and what they were measured on."""
    facts = provenance.facts()
    return json.dumps(
        {
            "ratios": {name: round(ratios[name], 2) for name in goals},
            "goals": goals,
            "lower_is_better": lower_is_better,
            "device": facts["device"],
            "versions": facts["versions"],
            "threads": torch.get_num_threads(),
        }
    )


def finish(
    ratios: Mapping[str, float],
    goals: Mapping[str, float],
    lower_is_better: bool,
    keep: bool = False,
    counts: Mapping[str, int] | None = None,
) -> None:
    """Print the JSON line, last; before it, if asked to, keep the result.

    Args:
        ratios: what was measured, with goals or without.
        counts: what was counted, and is the same on every machine.
    """
    if keep:
        entries = {name: {"reference": round(ratio, 4), "shown": True} for name, ratio in ratios.items()}
        entries |= {name: {"reference": count, "exact": True} for name, count in (counts or {}).items()}
        script = Path(sys.argv[0])
        name = script.stem + (ledger.ON_GPU if torch.cuda.is_available() else "")
        path = ledger.path_of(name, ledger.BENCHMARK)
        facts = provenance.facts()
        files.write_json(
            path,
            {
                "benchmark": script.stem,
                "command": shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]),
                "device": facts["device"],
                "threads": torch.get_num_threads(),
                "versions": facts["versions"],
                "claims": entries,
            },
        )
        print(f"kept in {path.parent.name}/{path.name}")
    print(line(ratios, goals, lower_is_better))
