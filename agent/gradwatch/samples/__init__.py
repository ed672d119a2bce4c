"""Samples: building them from recorded norms off the training thread, the origin of non-finite numbers, loggers."""
