-- :name lock : one upgrade at a time in this database
SELECT pg_advisory_lock(hashtextextended('soma.migrate', 0))

-- :name unlock : let the next one in
SELECT pg_advisory_unlock(hashtextextended('soma.migrate', 0))

-- :name exists : whether anything was ever applied
SELECT to_regclass('soma.migrations') IS NOT NULL

-- :name create : the journal of what was applied
CREATE SCHEMA IF NOT EXISTS soma;
CREATE TABLE IF NOT EXISTS soma.migrations (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)

-- :name applied : what was applied, in order
SELECT version, name, checksum, applied_at FROM soma.migrations ORDER BY version

-- :name record : one more
INSERT INTO soma.migrations (version, name, checksum) VALUES ($1, $2, $3)

-- :name grant : the rights of an application's role
SELECT soma.grant_runtime($1::text::name)

-- :name repair : start a new era after a restore
SELECT old_cluster, new_cluster, history_until, new_era FROM soma.repair()
