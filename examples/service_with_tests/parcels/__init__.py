"""Parcels: a small service on soma-common."""
