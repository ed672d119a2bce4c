"""A labelled set of small real trainings, healthy and sick, against which the diagnosis is measured."""
