"""Telemetry: the Prometheus collectors behind ``/metrics`` and remote write to a time-series store."""
