"""Retention: old events go into archives, and old rows beside the log go in small steps."""
