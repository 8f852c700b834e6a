"""`pcl`: the command line, thin over the Python API. This file reads arguments, commands.py does what they say."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SOURCES = ("online-retail", "ml-1m", "events", "synthetic")
_RESUMED = ("pretrain", "learn", "encode", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done. 1: it ran, and what it checked does not hold. 2: it could not run, and says why."""
    try:
        import jsonargparse  # noqa: F401
        import torch

        from pcl_ext import commands, run
    except ImportError as error:
        if error.name is None or error.name.startswith("pcl_ext"):
            raise
        return _fail(f"the package {error.name} is missing: pip install '.[cli]' in the sources of pcl_ext")
    parser, subparsers = build_parser()
    name = ""
    try:
        settings = parser.parse_args(argv)
        name = settings.subcommand
        with _log_to_stderr():
            status = getattr(commands, name)(subparsers[name].instantiate(settings[name]))
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # whoever read the output has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to fail at exit
        return 128 + signal.SIGPIPE
    except argparse.ArgumentError as error:
        hint = _near(str(error), subparsers) + "--help says what is accepted"
        return _fail(f"pcl: {_as_typed(error, subparsers)}; {hint}")
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        return _fail(f"{f'pcl {name}'.strip()}: {error}")
    except torch.OutOfMemoryError as error:
        text = str(error).partition(". ")[0]
        return _fail(f"pcl {name}: {text}: a smaller batch_tokens of the settings needs less, and so does --device cpu")
    except run.ForgettingError as error:
        return _fail(f"pcl {name}: {error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted" + ("; the same command goes on where it stopped" if name in _RESUMED else ""))


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Inside, what the package logs is on stderr: one line an epoch where no progress bar is."""
    logger, handler = logging.getLogger("pcl_ext"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _as_typed(error: argparse.ArgumentError, subparsers: dict) -> str:
    """Its message, with missing arguments as they are typed: RUN and --data for evaluate.run and evaluate.data; of a
    --config that holds no settings only how it begins."""
    if found := re.match("Unexpected config: *([^\n]{0,60})", str(error)):
        return f"--config must be a file of settings in YAML or JSON, got {found[1]!r}"
    found = re.match("(the following arguments are required: )(.*)", str(error))
    if found is None:
        return str(error)
    names = []
    for word in found[2].split(", "):
        command, _, dest = word.partition(".")
        actions = subparsers[command]._actions if command in subparsers else []
        options = [action.option_strings for action in actions if action.dest == dest]
        names.append((options[0] or [dest.upper()])[0] if options else word)
    return found[1] + ", ".join(names)


def _near(message: str, subparsers: dict) -> str:
    """A known setting that is spelt like the one that an error is about; or where a stray value belongs."""
    if re.match("unrecognized arguments: [^-]", message):
        return "values come right behind their --option, the tasks of pcl learn before all options; "
    wrong = re.search(r"Subcommand '([^']+)' does not accept option '([^']+)'", message)
    known = [action.dest for action in subparsers[wrong[1]]._actions] if wrong else []
    found = difflib.get_close_matches(wrong[2], known, 1) if wrong else []
    return f"did you mean {found[0]}? " if found else ""


def _fail(message: str, status: int = 2) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return status


def build_parser():
    """The parser and those of its commands by name."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from pcl_ext import __version__

    class Help(DefaultHelpFormatter):
        def _get_type_str(self, action):  # otherwise the name of the class is shown
            kind = super()._get_type_str(action)
            return "path" if kind == "<class 'Path'>" else kind

    about = {"prog": "pcl", "description": "Teach one frozen user model task after task.", "version": __version__}
    parser = ArgumentParser(**about, exit_on_error=False, formatter_class=Help)
    commands, subparsers = parser.add_subcommands(required=True, metavar="COMMAND"), {}
    for name, (text, add_arguments) in _COMMANDS.items():
        subparsers[name] = ArgumentParser(description=text, exit_on_error=False)
        add_arguments(subparsers[name])
        commands.add_subcommand(name, subparsers[name], help=text)
    return parser, subparsers


def _prepare(parser) -> None:
    parser.add_argument("source", choices=SOURCES, help="what to read")
    parser.add_argument(
        "--from", dest="folder", type=Path, help="folder with the source's files (online-retail, ml-1m)"
    )
    parser.add_argument("--config", type=Path, help="TOML file that describes an event log (events)")
    parser.add_argument("--out", type=Path, required=True, help="dataset folder to write")
    parser.add_argument("--rotate", type=int, help="fold 0..4 of the rotated split instead of the fixed one")
    parser.add_argument("--users", type=int, help="users to generate, 3000 by default (synthetic)")
    parser.add_argument("--seed", type=int, help="of the generator, 0 by default (synthetic)")


def _pretrain(parser) -> None:
    from pcl_ext.model import BackboneConfig
    from pcl_ext.train import PretrainConfig

    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument("--out", type=Path, required=True, help="run folder to write; an interrupted run goes on")
    parser.add_argument("--max-len", type=int, default=200, help="how many of the newest events count")
    _device(parser, "trains; results are measured on the CPU")
    parser.add_argument("--config", action="config", help="file with any of the settings below (YAML or JSON)")
    parser.add_class_arguments(BackboneConfig, "backbone", skip={"num_items", "max_len"}, instantiate=False)
    parser.add_class_arguments(PretrainConfig, "pretrain")


def _learn(parser) -> None:
    from pcl_ext.model import MemoryConfig
    from pcl_ext.model.config import PLACEMENTS
    from pcl_ext.train import LearnConfig

    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "tasks",
        nargs="*",
        type=str,
        default=[],
        help="names of tasks, before the options, learned in this order; all when left out",
    )
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--placement", choices=PLACEMENTS, default="tail", help="where the tasks' prompts go")
    parser.add_argument("--prompt-len", type=int, default=MemoryConfig.prompt_len, help="rows of a prompt")
    _device(parser, "trains; results are measured on the CPU")
    parser.add_argument("--config", action="config", help="file with any of the settings below (YAML or JSON)")
    skip = {"placement", "prompt_len"}
    parser.add_class_arguments(MemoryConfig, "memory", skip=skip, instantiate=False)
    parser.add_class_arguments(LearnConfig, "learn")


def _device(parser, what: str) -> None:
    parser.add_argument("--device", type=str, default="cpu", help=f"device, such as cuda, that {what}")


def _evaluate(parser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--fold", choices=("test", "valid", "train"), default="test", help="whose users")
    parser.add_argument("--json", type=Path, help="file to write the results to")


def _predict(parser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--task", type=str, required=True, help="what to predict")
    parser.add_argument("--k", type=int, default=10, help="how many items (items tasks)")
    parser.add_argument("--skip-seen", action="store_true", help="leave out the items of the history (items tasks)")
    ids = "items.parquet of the dataset: item ids in and out are the log's own; left out: the dataset's, 1..V"
    parser.add_argument("--item-ids", type=Path, help=ids)
    whose = "dataset folder: predict for all its users, into --out; left out: for the histories on stdin, a line each: "
    whose += "a list of item ids, or an object with it as `items`, whose other keys come back"
    parser.add_argument("--data", type=Path, help=whose)
    parser.add_argument("--out", type=Path, help="Parquet file for --data; an interrupted job goes on")
    _device(parser, "computes")


def _report(parser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="folder for the page; RUN/report when left out")


def _verify(parser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data", type=Path, help="dataset folder; where the run's own lies when left out")


def _encode(parser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--tasks", nargs="+", type=str, help="names of tasks; all when left out")
    parser.add_argument("--out", type=Path, required=True, help="Parquet file to write; an interrupted job goes on")
    _device(parser, "computes")


def _export(parser) -> None:
    from pcl_ext.export import FORMATS

    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--task", type=str, required=True, help="name of a task")
    parser.add_argument("--out", type=Path, help="folder for the files; RUN/export when left out")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        help="what to write; all that can be made here when left out",
    )


def _info(parser) -> None:
    pass


def _demo(parser) -> None:
    parser.add_argument("--data", type=Path, help="dataset folder; synthetic users when left out")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the dataset, the run and the report")


_COMMANDS: dict[str, tuple[str, Callable]] = {
    "prepare": ("write a dataset folder from a source", _prepare),
    "pretrain": ("learn the backbone by predicting the next item", _pretrain),
    "learn": ("teach a run further tasks, one after another", _learn),
    "evaluate": ("measure every task of a run", _evaluate),
    "predict": ("predict for histories on stdin, JSON, one a line; or for all users of a dataset", _predict),
    "encode": ("write user vectors of all users of a dataset; under torchrun, in many processes", _encode),
    "report": ("write a page with results, curves and protocol", _report),
    "verify": ("prove that a run is whole and has forgotten nothing", _verify),
    "export": ("write a task as files that run without this package", _export),
    "info": ("say what is installed and which kernels run", _info),
    "demo": ("from nothing to a report in a minute or two", _demo),
}


if __name__ == "__main__":
    sys.exit(main())
