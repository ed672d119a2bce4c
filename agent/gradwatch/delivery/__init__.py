"""Delivering what was written: the spool on disk and the sender thread."""
