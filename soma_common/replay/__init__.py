"""Replay: a consumer's events again, from the log, each with its effect exactly once."""
