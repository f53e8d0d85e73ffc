"""The command line, ``python -m marlin_w4a16 <command>``: finds the command, runs it, tells the user's errors."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import marlin_w4a16

# Modules of `marlin_w4a16.cli` with `add_arguments(parser)` and `run(args)`, an exit code; imported when chosen. One
# that sets ``rest`` finds the arguments there that are not its own.
COMMANDS = {
    "inspect": "say what FP4 weights a checkpoint holds, from its files alone",
    "doctor": "check this machine: versions, GPUs, kernels, a compiled model",
    "bench": "measure a checkpoint on this machine",
    "serve": "serve checkpoints over HTTP: transformers serve with this plugin",
}
_EXIT_CODES = "exit codes: 0 all is well, 1 a problem was found, 2 the command line is wrong"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the command line without the program; that of the process by default.

    Returns:
        0 where all is well, 1 where the command found a problem or could not do what it was asked to, 130 where it was
        interrupted.

    Raises:
        SystemExit: with 2 for a wrong command line, with 0 after ``--help`` and ``--version``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in words if not word.startswith("-")), None)
    try:
        command = import_module(f"marlin_w4a16.cli.{name}") if name in COMMANDS else None
        args = _parsed(_parser(name, command), words)
        code = int(command.run(args)) if command else 2  # the parser has left by then
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"marlin_w4a16 {name}: interrupted", file=sys.stderr)
        return 130  # as shells say of a program that SIGINT ended
    except BrokenPipeError:  # who read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        if "--debug" in words:
            raise
        print(f"marlin_w4a16 {name}: error: {_told(error)}", file=sys.stderr)
        return 1
    return code


def _parser(chosen: str | None, command: ModuleType | None) -> argparse.ArgumentParser:
    """The parser of all commands; only the chosen one is imported and has its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m marlin_w4a16",
        description="FP4 models (NVFP4, MXFP4) with 16-bit activations, from plain PyTorch.",
        epilog=f"{_EXIT_CODES}; 'python -m marlin_w4a16 <command> --help' has the arguments of a command",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"marlin_w4a16 {marlin_w4a16.__version__}")
    commands = parser.add_subparsers(metavar="<command>", required=True)
    for name, text in COMMANDS.items():
        own = command if name == chosen else None
        one = commands.add_parser(
            name,
            help=text,
            description=(own and own.__doc__) or text,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        one.add_argument("--json", action="store_true", help="print JSON for programs instead of text for people")
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if own:
            own.add_arguments(one)
    return parser


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    args, rest = parser.parse_known_args(words)
    if "rest" in args:
        args.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _told(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
