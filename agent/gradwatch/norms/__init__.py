"""Unit norms of many tensors in few operators."""
