"""``gradwatch run``: attaching to a program whose code is untouched."""
