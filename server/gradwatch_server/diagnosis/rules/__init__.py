"""The rules of the diagnosis: one module for each."""
