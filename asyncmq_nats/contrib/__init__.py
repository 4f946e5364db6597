"""Bridges to other libraries, each with an extra of its own; the rest of the package imports none of them."""
