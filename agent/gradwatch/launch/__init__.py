"""``gradwatch run``: runs a training command with the agent attached, without a change to the program."""
