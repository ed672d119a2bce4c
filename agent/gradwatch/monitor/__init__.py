"""Listening to one training: hooks become events of the step core, and its actions become operators."""
