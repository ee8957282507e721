-- :name server : the server and this session's settings
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::integer AS number,
       pg_is_in_recovery() AS standby, current_setting('default_transaction_isolation') AS isolation,
       current_setting('default_transaction_read_only') AS read_only, current_setting('synchronous_commit') AS synchronous,
       current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_pages,
       current_setting('TimeZone') AS zone, current_setting('autovacuum') AS autovacuum,
       current_setting('max_connections')::integer AS most,
       (SELECT count(*) FROM pg_stat_activity a WHERE a.backend_type = 'client backend')::integer AS connections,
       current_user::text AS role, current_setting('is_superuser') AS superuser,
       pg_database_size(current_database()) AS bytes,
       (SELECT age(d.datfrozenxid) FROM pg_database d WHERE d.datname = current_database()) AS age

-- :name backend : who answers
SELECT pg_backend_pid()

-- :name clock : what time it is there
SELECT clock_timestamp()

-- :name schema : whether there is a schema, and this role may look into it
SELECT n.oid IS NOT NULL, coalesce(has_schema_privilege(n.oid, 'USAGE'), false)
FROM (SELECT 1) AS one LEFT JOIN pg_namespace n ON n.nspname = 'soma'

-- :name rights : what an application needs and this role lacks
SELECT n.privilege || ' on ' || n.name
FROM (VALUES ('soma.events', 'SELECT'), ('soma.events', 'INSERT'), ('soma.outbox', 'INSERT'), ('soma.streams', 'INSERT'),
             ('soma.streams', 'UPDATE'), ('soma.ticks', 'INSERT'), ('soma.shards', 'UPDATE'), ('soma.workers', 'DELETE'),
             ('soma.inbox', 'INSERT'), ('soma.consumer_offsets', 'UPDATE'), ('soma.dead_letters', 'INSERT'),
             ('soma.sagas', 'UPDATE'), ('soma.saga_steps', 'INSERT')) AS n (name, privilege)
WHERE to_regclass(n.name) IS NOT NULL AND NOT has_table_privilege(n.name, n.privilege)

-- :name cluster : raises when the transaction ids of the log are another cluster's
SELECT soma.check_cluster()

-- :name old_transactions : sessions whose transaction has been open for so many seconds; what they hold is not read by anybody
SELECT a.pid, coalesce(a.usename::text, '') AS role, a.application_name AS program, coalesce(a.state, '') AS state,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS seconds, a.backend_xid IS NOT NULL AS writes
FROM pg_stat_activity a
WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.backend_type = 'client backend'
  AND a.xact_start < clock_timestamp() - make_interval(secs => $1::float8)
ORDER BY a.xact_start LIMIT 20

-- :name prepared : transactions that were prepared so many seconds ago and neither committed nor rolled back
SELECT p.gid, p.owner::text AS role, extract(epoch FROM clock_timestamp() - p.prepared)::float8 AS seconds
FROM pg_prepared_xacts p
WHERE p.database = current_database() AND p.prepared < clock_timestamp() - make_interval(secs => $1::float8)
ORDER BY p.prepared LIMIT 20

-- :name slots : replication slots that nobody reads, and the bytes of WAL that each holds back
SELECT s.slot_name::text AS name, coalesce(s.wal_status, '') AS status,
       coalesce(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END,
                                s.restart_lsn), 0)::bigint AS bytes
FROM pg_replication_slots s WHERE NOT s.active ORDER BY s.slot_name LIMIT 20

-- :name readers : relays and consumers of the log: live workers, seconds since their cursor moved, events behind it (at most
-- 10,001 are counted) and the age of the oldest of these, and how far ahead the longest lease ends
SELECT r.reader, r.workers, r.idle, b.behind, b.oldest, r.lease
FROM (
    SELECT s.reader, min(greatest(coalesce(t.position_after, 0), s.after_position)) AS done,
           extract(epoch FROM soma.now() - max(s.moved_at))::float8 AS idle,
           coalesce(extract(epoch FROM max(s.leased_until) FILTER (WHERE s.owner IS NOT NULL) - soma.now()), 0)::float8 AS lease,
           (SELECT count(*)::integer FROM soma.workers w WHERE w.reader = s.reader AND w.alive_until > soma.now()) AS workers
    FROM soma.shards s LEFT JOIN soma.ticks t ON t.tick_id = s.from_tick AND t.token = s.from_token
    GROUP BY s.reader
) AS r
CROSS JOIN LATERAL (
    SELECT count(*)::integer AS behind, coalesce(extract(epoch FROM soma.now() - min(e.recorded_at)), 0)::float8 AS oldest
    FROM (SELECT e.recorded_at FROM soma.events e WHERE e.position > r.done ORDER BY e.position LIMIT 10001) AS e
) AS b
ORDER BY r.reader

-- :name waiting : rows of the outbox (at most 10,001 are counted), and the age of the oldest of them
SELECT count(*)::integer, coalesce(extract(epoch FROM soma.now() - min(o."timestamp")), 0)::float8
FROM (SELECT o."timestamp" FROM soma.outbox o LIMIT 10001) AS o

-- :name parked : rows that the relay has put aside, by relay
SELECT p.reader, count(*)::integer FROM soma.outbox_parked p GROUP BY p.reader ORDER BY p.reader

-- :name offsets : where consumers of Kafka stand
SELECT c.name, o.topic, o.partition, o.next_offset
FROM soma.consumer_offsets o JOIN soma.consumers c USING (consumer_id) ORDER BY c.name, o.topic, o.partition

-- :name sagas : sagas that have not ended well
SELECT s.status, count(*)::integer FROM soma.sagas s WHERE s.status NOT IN ('completed', 'compensated')
GROUP BY s.status ORDER BY s.status

-- :name ahead : how many seconds the newest tick is ahead of the server's clock
SELECT coalesce(extract(epoch FROM max(t.made_at) - clock_timestamp()), 0)::float8
FROM (SELECT made_at FROM soma.ticks ORDER BY tick_id DESC LIMIT 1) AS t

-- :name log : the newest position that was handed out
SELECT soma.last_position()
