"""The `prosg` command. What is slow to import is imported where it is used, so that `prosg --help` is not."""

import argparse
import signal
import sys
from collections.abc import Sequence

from prosg_lib.errors import UserError

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where something was measured and found wrong (a claim, a notebook, a check); 2 for a mistake the user can
        put right; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"prosg: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("prosg: interrupted.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prosg", description="Runs the course, trains its models, and checks its numbers.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run, summary: str, details: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}")
        added.set_defaults(run=run)
        return added

    reproduce = command(
        "reproduce",
        _reproduce,
        "run the notebooks in order and compare their claims with the ledger",
        "Ends with exit code 1 where a notebook failed or a claim does not hold.",
    )
    _add_sizes(reproduce, default="cpu")
    reproduce.add_argument(
        "--notebook", action="append", default=[], metavar="NAME", help="only this one, e.g. 00_tour; repeatable"
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
    report.add_argument("--profile", default="cpu", help="which run (default: cpu)")

    command("check", _check, "check that notebooks are clean and that quoted numbers are the ledger's")

    data = command("data", _data, "build the data that the repository ships, or check that it is what would be built")
    data.add_argument("action", choices=("build", "check"))

    chat = command(
        "chat",
        _chat,
        "talk to a model that keeps what it was asked to remember",
        "Ends with /quit, the end of input or Ctrl-C; /help within the chat lists what else it can do.",
    )
    chat.add_argument(
        "--model", default="rwkv4-dialogue", help="shipped name, path or hub id (default: rwkv4-dialogue)"
    )
    chat.add_argument("--generator", metavar="NAME", help="shipped name or file (default: the model's own, if shipped)")
    chat.add_argument(
        "--remember", action="append", default=[], metavar="TEXT", help="write it into the weights first; repeatable"
    )
    chat.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest answer; above: drawn (default: 0)"
    )
    chat.add_argument(
        "--refresh", type=int, metavar="N", help="write in what was said, too, after every N tokens of conversation"
    )

    train = command("train", _train, "train one model, or load the checkpoint that fits")
    train.add_argument("stage", choices=("lm", "final", "token", "static", "adapter"), help="what to train")
    _add_sizes(train, default="cpu")
    return parser


def _add_sizes(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--profile", default=default, help=f"smoke, cpu, gpu or paper (default: {default})")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--retrain", action="store_true", help="train anew where a checkpoint would fit")


def _reproduce(options: argparse.Namespace) -> int:
    from prosg_lib.reproduce import reproduce

    # Being told to end is like Ctrl-C: the running notebook is stopped, and the report is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parameters = {}
    for text in options.param:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"--param takes NAME=VALUE, not {text!r}.")
        parameters[name] = value
    return reproduce(
        options.profile,
        seed=options.seed,
        retrain=options.retrain,
        names=options.notebook,
        parameters=parameters,
        update_expected=options.update_expected,
    )


def _report(options: argparse.Namespace) -> int:
    from prosg_lib.reproduce import show

    return show(options.profile)


def _check(options: argparse.Namespace) -> int:
    from prosg_lib.reproduce import check

    problems = check()
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "notebooks, ledger and quoted numbers are in order")
    return FAILED if problems else 0


def _data(options: argparse.Namespace) -> int:
    from prosg_lib.tasks import build

    if options.action == "check":
        return 0 if build.check() else FAILED
    build.build()
    return 0


def _chat(options: argparse.Namespace) -> int:
    from prosg_lib.chat import run

    run(
        options.model,
        options.generator,
        options.remember,
        options.temperature,
        options.refresh,
        sys.stdin,
        sys.stdout,
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    from prosg_lib.stages import forget, load_or_train

    if options.retrain:
        forget(options.profile, (options.stage,))
    load_or_train(options.stage, options.profile, options.seed, options.retrain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
