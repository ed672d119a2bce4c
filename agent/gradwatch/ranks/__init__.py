"""Several ranks of one training: what each measures of a sharded model, and how the parts are put together."""
