"""The SQL behind the panels: what a run was at a time, at which step, and which of its layers are looked at."""
