"""Telemetry for other programs: Prometheus, OpenTelemetry, log records.

Nothing here changes a job.
"""
