"""The `prosg` command. What is slow to import is imported where it is used, so that `prosg --help` is not."""

import argparse
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence

from prosg_lib.config import get_profile
from prosg_lib.errors import Diverged, UserError

FAILED, USAGE, INTERRUPTED, UNREAD = 1, 2, 130, 141

_LAUNCH = """\
With several GPUs or machines, let accelerate start it:

  accelerate launch --num_processes 8 -m prosg_lib.cli train rwkv4-dialogue-token

Every process takes its part of each batch, so that the result is that of one process, but for rounding and dropout. A
training that was interrupted goes on with any number of them. The launcher calls processes GPUs; to have some on a
machine without any: accelerate launch --multi_gpu --num_processes 2 ..."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where something was measured and found wrong (a claim, a notebook, a check); 2 for a mistake the user can
        put right, and where the system refuses something; 130 after Ctrl-C; 141 where nobody reads the output any more
        (`prosg ... | head`).
    """
    _prepare_streams()
    try:
        try:
            options = _parser().parse_args(arguments)
            options.words = sys.argv[1:] if arguments is None else list(arguments)
            return options.run(options)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return UNREAD
    except UserError as error:
        # Every process of a training raises Diverged with the same message; only the first prints it.
        return _refused(error) if not isinstance(error, Diverged) or os.environ.get("RANK", "0") == "0" else USAGE
    except OSError as error:  # not named closer to its cause: a full terminal, a name too long, too many open files
        return _refused(f"{error.filename or 'the output, or a file'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("allocate|out of memory", str(error)):
            raise
        return _refused("the memory is full; take smaller sizes, or train with --recompute and --at-once 1.")
    except KeyboardInterrupt:
        print("prosg: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _prepare_streams() -> None:
    """A closed stream becomes an empty one; a character that the terminal cannot show does not end the command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _refused(why: object) -> int:
    print(f"prosg: {why}", file=sys.stderr, flush=True)
    return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prosg", description="Runs the course, trains its models, and checks its numbers.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str, details: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}", allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    reproduce = command(
        "reproduce",
        _reproduce,
        "run the notebooks in order and compare their claims with the ledger",
        "Ends with exit code 1 where a notebook failed or a claim does not hold.",
    )
    _add_sizes(reproduce)
    reproduce.add_argument(
        "--notebook", action="append", default=[], metavar="NAME", help="only this one: 03 or 03_low...; repeatable"
    )
    reproduce.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help="a notebook's own parameter; repeatable"
    )
    reproduce.add_argument(
        "--update-expected",
        action="store_true",
        help="write the measured numbers into the ledger as references; bars that are there stay as they are",
    )

    report = command("report", _report, "write the report again from what a run recorded, running nothing")
    _add_profile(report)

    command(
        "doctor",
        _doctor,
        "say whether this machine has what the course needs, and what to do where it has not",
        "Ends with exit code 1 where something has to be fixed.",
    )
    command("check", _check, "check that notebooks are clean, quoted numbers the ledger's, and links right")

    chat = command(
        "chat",
        _chat,
        "talk to a model that keeps what it was asked to remember",
        "Ends with /quit, the end of input or Ctrl-C; /help within the chat lists what else it can do.",
    )
    chat.add_argument(
        "--model", default="rwkv4-dialogue", help="shipped name, path or hub id (default: rwkv4-dialogue)"
    )
    chat.add_argument(
        "--window", type=int, default=256, metavar="N", help="tokens that a transformer sees; 0: all (default: 256)"
    )
    chat.add_argument("--generator", metavar="NAME", help="shipped name or file (default: the model's own, if shipped)")
    chat.add_argument(
        "--remember", action="append", default=[], metavar="TEXT", help="write it into the weights first; repeatable"
    )
    chat.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest answer; above: drawn (default: 0)"
    )
    _add_evaluated(
        command(
            "evaluate",
            _evaluate,
            "measure on established tests what a model keeps, or compute all numbers again from kept predictions",
            "Writes predictions.jsonl.gz, results.json, results.md and figures.",
        )
    )

    course = command(
        "course",
        _course,
        "write a copy of the notebooks for a class, or a lecture",
        "The students' copy has no solutions. The instructor's has them, with timings, questions to discuss, and "
        "typical wrong answers with the check's reply. The deck is a lecture in one HTML file, with the pictures of "
        "what `prosg reproduce` ran.",
    )
    course.add_argument("kind", choices=("student", "instructor", "deck"), help="whose copy, or the lecture")
    course.add_argument("out", metavar="OUT", help="the folder to write to; made if need be")
    course.add_argument("--overwrite", action="store_true", help="replace copies that are there")
    _add_profile(course)

    site = command(
        "site",
        _site,
        "build the executed course as a site that opens without a network",
        "Shows what `prosg reproduce` wrote. Ends with exit code 1 where a link leads nowhere, or the like.",
    )
    site.add_argument("out", metavar="OUT", help="the folder to write to; made if need be")
    _add_profile(site)
    site.add_argument("--overwrite", action="store_true", help="build over a site that is there")

    train = command("train", _train, "train one model, generator or gradient step, or load the checkpoint that fits")
    train.formatter_class, train.epilog = argparse.RawDescriptionHelpFormatter, _LAUNCH
    _add_trained(train)
    return parser


def _add_evaluated(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="shipped name, path or hub id of what is measured")
    source.add_argument("--from-predictions", metavar="FILE", help="measure nothing: a file that was written before")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where results are written; made if need be")
    parser.add_argument(
        "--generator", metavar="NAME", help="shipped name or file (default: the model's own, if shipped)"
    )
    _add_profile(parser)
    parser.add_argument("--seed", type=_whole, nargs="+", default=[0], metavar="N", help="of the items (default: 0)")
    parser.add_argument("--items", type=_positive, metavar="N", help="a cell and seed (default: the profile's)")


def _add_trained(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="NAME", help="of a recipe, e.g. rwkv4-dialogue-token")
    what.add_argument("--list", action="store_true", help="show all recipes: name, what it is, time, sizes, shipped")
    _add_sizes(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, e.g. training.steps=300, size.rank=8 or size.layers=0,1; repeatable",
    )
    parser.add_argument(
        "--at-once", type=_positive, metavar="N", help="hold N examples in memory at a time, and add up gradients"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="keep fewer activations, and compute them again in the backward pass"
    )


def _whole(text: str, least: int = 0) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:  # torch takes 64 bits, and some places add to a seed
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to 10^18")
    return int(text)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", type=get_profile, default="cpu", help="smoke, cpu, gpu or paper (default: cpu)")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    _add_profile(parser)
    parser.add_argument("--seed", type=_whole, default=0, help="default: 0")
    parser.add_argument("--retrain", action="store_true", help="train anew, in the place of what was trained before")


def _reproduce(options: argparse.Namespace) -> int:
    from prosg_lib.reproduction.run import interrupt, reproduce

    # SIGTERM acts like Ctrl-C: the running notebook is stopped, and the report is written.
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    return reproduce(
        options.profile,
        seed=options.seed,
        retrain=options.retrain,
        names=options.notebook,
        parameters=_assignments("--param", options.param),
        update_expected=options.update_expected,
    )


def _report(options: argparse.Namespace) -> int:
    from prosg_lib.reproduction.run import show

    return show(options.profile)


def _doctor(options: argparse.Namespace) -> int:
    from prosg_lib import doctor

    return 0 if doctor.examine() else FAILED


def _check(options: argparse.Namespace) -> int:
    from prosg_lib.reproduction.run import check

    problems = check()
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "notebooks, ledger, quoted numbers and links are in order")
    return FAILED if problems else 0


def _chat(options: argparse.Namespace) -> int:
    from prosg_lib.chat import run

    how = (options.model, options.generator, options.remember, options.temperature)
    run(*how, sys.stdin, sys.stdout, options.window)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from prosg_lib.reproduction import suite_report

    if options.from_predictions is not None:
        if options.generator is not None:
            raise UserError("--generator goes with --model; kept predictions name their own")
        suite_report.recompute(options.from_predictions, options.out)
    else:
        seeds = list(dict.fromkeys(options.seed))  # the same items twice would make an interval too narrow
        how = (options.model, options.generator, options.profile, seeds, options.items, options.out)
        suite_report.evaluate(*how, command=shlex.join(["prosg", *options.words]))
    print(f"written to {options.out}: results.md has the tables")
    return 0


def _course(options: argparse.Namespace) -> int:
    if options.kind == "deck":
        from prosg_lib.pages import deck

        print(deck.write(options.profile, options.out, options.overwrite))
        return 0
    from prosg_lib.exercises import copies

    for path in copies.write(options.kind, options.out, options.overwrite):
        print(path)
    return 0


def _site(options: argparse.Namespace) -> int:
    from prosg_lib.pages import site

    warnings = site.write(options.profile, options.out, options.overwrite)
    for warning in warnings:
        print(warning)
    print(f"{options.out}/index.html is the first page")
    return FAILED if warnings else 0


def _train(options: argparse.Namespace) -> int:
    from prosg_lib.training import recipes

    profile, name = options.profile, options.name
    changes = _assignments("--set", options.set)
    if options.list:
        print(recipes.table(profile))
        return 0
    recipes.recipe(name, profile, changes)  # refuses what is unknown or impossible, without torch

    from prosg_lib.training import distributed, load_or_train

    distributed.accelerator()
    try:
        memory, anew = load_or_train.MemoryBudget(options.at_once, options.recompute), options.retrain
        load_or_train.load_or_train(name, profile, options.seed, anew, changes, memory=memory, anew=anew)
    finally:
        distributed.leave()
    return 0


def _assignments(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts as a dictionary."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"{option} takes NAME=VALUE, not {text!r}.")
        if name in found:
            raise UserError(f"{option} sets {name} twice; leave one out.")
        found[name] = value
    return found


if __name__ == "__main__":
    sys.exit(main())
