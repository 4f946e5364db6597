"""Runs one queue's jobs in this process: loops, slots, signals. Writes no job record itself."""
