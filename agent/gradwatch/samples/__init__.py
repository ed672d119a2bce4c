"""Building samples from recorded norms, off the training thread."""
