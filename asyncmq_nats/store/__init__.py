"""One queue's logs: its assets, its reads, the repetition of writes.

Decides nothing about a job.
"""
