"""Adaptive gradient clipping: the public function, its execution before each step, and the classifier."""
