"""Roll-ups: samples of a run aggregated into buckets at coarser and coarser levels."""
