"""Every state change of a job, one module per verb: the only writers of job records.

Runs no task and keeps no loop.
"""
