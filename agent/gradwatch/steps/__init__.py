"""Which gradients, losses and clippings belong to which optimizer step, and which steps are sampled: pure, no torch."""
