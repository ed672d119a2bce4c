"""Unit norms of many tensors in few operators, and the buffers that carry them to the host."""
