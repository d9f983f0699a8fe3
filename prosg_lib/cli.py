"""The `prosg` command. What is slow to import is imported where it is used, so that `prosg --help` is not."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial

from prosg_lib.config import get_profile
from prosg_lib.errors import Diverged, UserError

FAILED, USAGE, INTERRUPTED = 1, 2, 130

_LAUNCH = """\
With several GPUs or machines, let accelerate start it:

  accelerate launch --num_processes 8 -m prosg_lib.cli train token --profile paper

Every process takes its part of each batch, so that the result is that of one process, but for rounding and dropout. A
training that was interrupted goes on with any number of them. The launcher calls processes GPUs; to have some on a
machine without any: accelerate launch --multi_gpu --num_processes 2 ..."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where something was measured and found wrong (a claim, a notebook, a check); 2 for a mistake the user can
        put right; 130 after Ctrl-C.
    """
    try:
        options = _parser().parse_args(arguments)
        options.words = sys.argv[1:] if arguments is None else list(arguments)
        return options.run(options)
    except UserError as error:
        # Of several processes all raise this one, with the same words; the first says them.
        if not isinstance(error, Diverged) or os.environ.get("RANK", "0") == "0":
            print(f"prosg: {error}", file=sys.stderr, flush=True)
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
    _add_sizes(reproduce)
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
    _add_profile(report)

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

    _add_evaluated(
        command(
            "evaluate",
            _evaluate,
            "measure on established tests what a model keeps, or compute all numbers again from kept predictions",
            "Writes predictions.jsonl.gz, results.json, results.md and figures.",
        )
    )

    train = command("train", _train, "train one model, or load the checkpoint that fits")
    train.formatter_class, train.epilog = argparse.RawDescriptionHelpFormatter, _LAUNCH
    _add_trained(train.add_subparsers(title="what to train", metavar="WHAT", dest="what", required=True))
    return parser


def _add_evaluated(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="shipped name, path or hub id of what is measured")
    source.add_argument("--from-predictions", metavar="FILE", help="measure nothing: a file that was written before")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where results are written; made if need be")
    parser.add_argument("--suite", choices=("forgetting",), default="forgetting", help="default: forgetting")
    parser.add_argument(
        "--generator", metavar="NAME", help="shipped name or file (default: the model's own, if shipped)"
    )
    _add_profile(parser)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], metavar="N", help="of the items (default: 0)")
    parser.add_argument("--items", type=_positive, metavar="N", help="a cell and seed (default: the profile's)")


def _add_trained(whats) -> None:
    every = argparse.ArgumentParser(add_help=False)
    _add_sizes(every)
    every.add_argument(
        "--at-once", type=_positive, metavar="N", help="hold so many examples in memory at a time, and add up gradients"
    )
    every.add_argument(
        "--recompute", action="store_true", help="keep fewer activations, and compute them again in the backward pass"
    )
    for name, summary in {
        "lm": "the language model of the dialogues",
        "token": "the token-wise generator for it",
        "final": "the final-state generator for it",
        "static": "the control: one change of its weights for all prompts",
        "adapter": "an adapter for it, in which a real gradient step is taken",
        "transformer": "a transformer of the dialogues, to compare with, that can look back",
        "supervised": "the token-wise generator, first taught to predict true gradients",
        "mend": "the generator that transforms a prompt's true gradient",
        "pairs-recurrent": "the recurrent model that knows the tasks of context and query",
        "pairs-transformer": "the transformer that knows them",
        "pairs-reader": "that transformer after more of prose, for the cloze and SQuAD",
        "suite-recurrent": "the recurrent model that knows the established tests",
        "suite-transformer": "the transformer that knows them",
        "suite-token": "the token-wise generator for the recurrent one",
        "suite-adapter": "an adapter for it, in which a real gradient step is taken",
        "suite": "all four, and asks them the tests",
        "ablation": "a generator that is another than the profile's in some respects, or of another seed",
        "ablations": "all generators of the study of ablations, and measures them",
        "way": "a way to take a context in, for one of those models or another",
    }.items():
        way = whats.add_parser(name, help=summary, description=f"Trains {summary}.", parents=[every])
    varied = whats.choices["ablation"]
    varied.add_argument("--stage", required=True, help="token, final, supervised or mend")
    varied.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="e.g. rank=8 or layers=0,1; repeatable"
    )
    # The last one has more options.
    way.add_argument("--method", required=True, help="adapter, maps, weights, weights-RANK, token or final")
    way.add_argument("--task", action="append", required=True, metavar="NAME", help="trained on it; repeatable")
    way.add_argument("--after", action="append", default=[], metavar="NAME", help="trained on it before; repeatable")
    way.add_argument("--objective", choices=("LC", "LG"), default="LC", help="default: LC")
    way.add_argument("--contexts", type=_positive, default=1, metavar="N", help="of every query (default: 1)")
    way.add_argument(
        "--backbone",
        default="recurrent",
        help="recurrent (default), transformer, reader, or a model's hub id or folder",
    )


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", type=get_profile, default="cpu", help="smoke, cpu, gpu or paper (default: cpu)")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    _add_profile(parser)
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--retrain", action="store_true", help="train anew where a checkpoint would fit")


def _reproduce(options: argparse.Namespace) -> int:
    from prosg_lib.reproduction.run import reproduce

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
    from prosg_lib.reproduction.run import show

    return show(options.profile)


def _check(options: argparse.Namespace) -> int:
    from prosg_lib.reproduction.run import check

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

    run(options.model, options.generator, options.remember, options.temperature, sys.stdin, sys.stdout)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from prosg_lib.reproduction import suite_report

    if options.from_predictions is not None:
        if options.generator is not None:
            raise UserError("--generator goes with --model; kept predictions name their own")
        suite_report.recompute(options.from_predictions, options.out)
    else:
        how = (options.model, options.generator, options.profile, options.seed, options.items, options.out)
        suite_report.evaluate(*how, command=shlex.join(["prosg", *options.words]))
    print(f"written to {options.out}: results.md has the tables")
    return 0


def _train(options: argparse.Namespace) -> int:
    from prosg_lib.evaluation import ablation_study, memory_tests
    from prosg_lib.training import ablations, distributed, pair_stages, stages, suite_stages, transformer_stages

    distributed.accelerator()
    profile, what = options.profile, options.what
    if what == "ablations":
        names = [variant.name(profile) for variant in ablation_study.variants(profile, options.seed)]
        train = ablation_study.measure
    elif what == "suite":
        names, train = memory_tests.study_names(profile), memory_tests.study
    elif what == "way":
        tasks, after = tuple(options.task), tuple(options.after)
        spec = pair_stages.WaySpec(options.method, tasks, options.objective, options.contexts, after)
        names = [pair_stages.way_name(spec, options.backbone, profile, options.seed)]
        train = partial(pair_stages.pair_way, spec, options.backbone)
    elif what == "transformer":
        names, train = [transformer_stages.checkpoint_name(profile)], transformer_stages.dialogue_transformer
    elif what == "ablation":
        varied = ablations.Ablation.of(options.stage, options.set)
        names = [ablations.checkpoint_name(varied, profile, options.seed)]
        train = partial(ablations.ablated, varied)
    elif what.startswith("suite-"):
        part = what.removeprefix("suite-")
        names = [suite_stages.checkpoint_name(part, profile)]
        train = partial(suite_stages.suite_model if part in suite_stages.MODELS else suite_stages.suite_way, part)
    elif what.startswith("pairs-"):
        backbone = what.removeprefix("pairs-")
        names, train = [pair_stages.model_name(backbone, profile)], partial(pair_stages.pair_model, backbone)
    else:
        names, train = [stages.checkpoint_name(what, profile)], partial(stages.load_or_train, what)
    try:
        if options.retrain:
            stages.forget(profile, names)
        train(profile, options.seed, options.retrain, stages.Thrift(options.at_once, options.recompute))
    finally:
        distributed.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
