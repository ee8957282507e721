"""Sagas on Temporal (the extra ``temporal``): the same definitions, driven by its server instead of PostgreSQL."""
