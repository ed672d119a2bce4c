"""The subcommands of ``gradwatch`` that need the server's package, one module each; ``serve`` stands beside it."""
