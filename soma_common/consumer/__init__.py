"""Consuming: each event's effect exactly once, in one PostgreSQL transaction."""
