"""Tracing: the context that travels with an event, and the spans around the library's work."""
