"""``gradwatch health``: whether a running server is ready, as an exit code for health checks."""

from collections.abc import Sequence

from gradwatch_server.cli.client import check_health
from gradwatch_server.cli.command import print_line, run_command, server_parser


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch health``; return 0 if the server is ready and 1 otherwise."""
    options = server_parser("health", "Ask a running server whether it is ready.").parse_args(arguments)

    def work() -> int:
        print_line(check_health(options))
        return 0

    return run_command("health", work)
