"""Measurements of gradwatch on real trainings."""
