"""The boards, one a module: each exports ``build``."""
