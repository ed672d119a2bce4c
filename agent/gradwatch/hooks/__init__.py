"""Listening to torch: patches, hooks and weak tensor references."""
