"""Servers that ``somastack up`` starts and ``somastack down`` ends."""
