"""One queue's logs: what exists, what is read, how a write is repeated.

Decides nothing about a job.
"""
