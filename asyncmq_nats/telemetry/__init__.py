"""What other programs read of queues and workers: Prometheus, OpenTelemetry, log records.

Values of the public modules go out by the formats of others; nothing here changes a job.
"""
