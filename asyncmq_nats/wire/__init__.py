"""The bytes on the server, as docs/protocol.md describes them: keys, tokens, JSON.

No I/O, no jobs, no rules.
"""
