"""A simulated accelerator: a backend of PyTorch that does to an agent what a GPU does."""
