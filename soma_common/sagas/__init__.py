"""Sagas: business transactions of several steps, each with the way to undo it, that survive every crash."""
