"""The life cycle of alerts: silences, inhibition, routing to receivers, checks for stalled runs."""
