"""The parameters of the watched models."""
