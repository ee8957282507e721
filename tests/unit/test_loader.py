"""SQL as named blocks and numbered files."""

from __future__ import annotations

from soma_common.sql.loader import blocks, migrations


def test_blocks_are_found_by_name() -> None:
    for file in ("store", "readers", "migrate"):
        found = blocks(file)
        assert found
        for name, sql in found.items():
            assert sql, name
            assert "-- :name" not in sql
    assert blocks("store")["stream_version"].startswith("SELECT s.version")


def test_migrations_are_numbered_in_order_and_named() -> None:
    numbers = [migration.version for migration in migrations()]
    assert numbers == sorted(set(numbers))
    assert numbers[:6] == [1, 2, 3, 4, 5, 6]
    for migration in migrations():
        assert migration.name.replace("_", "").isalnum()
        assert migration.sql.startswith("-- ")
