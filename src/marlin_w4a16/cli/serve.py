"""Serves FP4 checkpoints over HTTP, as the OpenAI API: ``transformers serve`` with this plugin.

Every argument goes to it as it stands; ``transformers serve --help`` has them. It needs ``transformers[serving]``.

    python -m marlin_w4a16 serve PATH --compile
    python -m marlin_w4a16 serve PATH --continuous-batching
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Takes whatever stands behind the command."""
    parser.set_defaults(rest=[])


def run(args: argparse.Namespace) -> int:
    """Serves until it is stopped; leaves by SystemExit, as transformers does.

    Raises:
        ImportError: what a server needs is not installed.
    """
    from transformers.cli.transformers import app

    import marlin_w4a16.hf  # noqa: F401, the plugin

    app(["serve", *args.rest], prog_name="python -m marlin_w4a16")
    return 0
