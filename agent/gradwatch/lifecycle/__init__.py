"""How an agent lives in its process: names, notes to the launcher, shutdown."""
