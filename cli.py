"""The command line: ``squeezoo --help``. Exit codes: 0 done, 1 refused or failed (one message), 2 wrong usage."""

from . import cli_make, cli_sweep, cli_measure, cli_bench, cli_zoo  # noqa: F401, I001  (importing registers them, in this order)
from .terminal import app

__all__ = ["app", "main"]


def main() -> None:
    app()


if __name__ == "__main__":
    main()
