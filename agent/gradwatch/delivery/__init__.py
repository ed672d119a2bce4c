"""Delivering measurements to the server: the spool on disk, the sender's thread, ``gradwatch flush``."""
