"""A shop in Django: orders, and the jobs that they need. See docs/frameworks.md."""
