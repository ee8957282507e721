"""Whose things a command is about: those of a tenant, or of all."""

from __future__ import annotations

import click

from soma_common.events.store import ALL_TENANTS, AllTenants


def whose(what: str, tenant: str | None, everyone: bool) -> str | AllTenants:
    """What ``--tenant`` and ``--all-tenants`` say. One of them is wanted: some commands change what they find.

    Raises:
        click.UsageError: both were given, or neither.
    """
    if everyone and tenant is not None:
        raise click.UsageError("--tenant and --all-tenants exclude each other.")
    if everyone:
        return ALL_TENANTS
    if not tenant:
        raise click.UsageError(f"Whose {what}? Name a --tenant, or pass --all-tenants.")
    return tenant
