"""Django: an app with settings, a worker and an outbox.

Put it into `INSTALLED_APPS`; see docs/frameworks.md.
"""
