-- :name owns : whether this role may remove: only the owner of the tables
SELECT pg_has_role(current_user, c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = 'soma.events'::regclass

-- :name claim : become the one retention run; no row: another one is at it. No lease reaches a day ahead: such a one was
-- written by a clock that has been set back since, and what its owner still does is fenced
UPDATE soma.retention_lease l SET owner = $1::uuid, who = $2::text, leased_until = soma.now() + $3::interval
WHERE l.leased_until <= soma.now() OR l.leased_until > soma.now() + interval '1 day' OR l.owner = $1::uuid
RETURNING l.owner

-- :name holder : who is at it, and until when at least
SELECT l.who, l.leased_until FROM soma.retention_lease l

-- :name renew : stay it; no row: another one took over
UPDATE soma.retention_lease l SET leased_until = soma.now() + $2::interval
WHERE l.owner = $1::uuid
RETURNING l.owner

-- :name release : let the next one in at once
UPDATE soma.retention_lease l SET leased_until = '-infinity' WHERE l.owner = $1::uuid

-- :name fence : for this transaction: the lease is ours
SELECT soma.fence_retention($1::uuid)

-- :name about : the log's id, the newest migration, and the time
SELECT s.log_id, (SELECT max(m.version) FROM soma.migrations m), soma.now() FROM soma.log_start s

-- :name partitions : the partitions that the position sequence has left, and who has not passed them
SELECT p.name, p.lower_position, p.upper_position, p.bytes, t.tick_id,
       CASE WHEN t.tick_id IS NOT NULL THEN soma.not_passed(t.tick_id, p.lower_position, p.upper_position) END
FROM soma.event_partitions() p CROSS JOIN LATERAL (SELECT soma.complete_tick(p.upper_position)) AS t (tick_id)
WHERE p.upper_position <= soma.last_position()

-- :name types : the types of a partition, and when each was recorded last; along the index on types, a look per type
WITH RECURSIVE types AS (
    (SELECT e.event_type FROM soma.events e WHERE e.position >= $1::bigint AND e.position < $2::bigint
     ORDER BY e.event_type LIMIT 1)
    UNION ALL
    SELECT (SELECT e.event_type FROM soma.events e
            WHERE e.position >= $1::bigint AND e.position < $2::bigint AND e.event_type > t.event_type
            ORDER BY e.event_type LIMIT 1)
    FROM types t WHERE t.event_type IS NOT NULL
)
SELECT t.event_type, newest.recorded_at
FROM types t CROSS JOIN LATERAL (
    SELECT e.recorded_at FROM soma.events e
    WHERE e.event_type = t.event_type AND e.position >= $1::bigint AND e.position < $2::bigint
    ORDER BY e.position DESC LIMIT 1) newest
WHERE t.event_type IS NOT NULL

-- :name reach : where the next page of so many rows and bytes ends. Nothing is decompressed for it: what is compressed counts
-- as thirty times its size, and nothing as more than an event may have
SELECT max(s.position) FROM (
    SELECT w.position, sum(w.size) OVER (ORDER BY w.position) - w.size AS before FROM (
        SELECT e.position,
               least(1000000, pg_column_size(e.payload)
                              * CASE WHEN pg_column_compression(e.payload) IS NULL THEN 1 ELSE 30 END)
             + least(100000, pg_column_size(e.metadata)
                             * CASE WHEN pg_column_compression(e.metadata) IS NULL THEN 1 ELSE 30 END) + 500 AS size
        FROM soma.events e
        WHERE e.position > $1::bigint AND e.position < $2::bigint
          AND ($3::text[] IS NULL OR e.event_type = ANY ($3::text[]))
        ORDER BY e.position LIMIT $4::bigint) w) s
WHERE s.before < $5::bigint

-- :name page : the next events of some types of a partition; without types, of all
WHERE e.position > $1::bigint AND e.position < $2::bigint AND ($3::text[] IS NULL OR e.event_type = ANY ($3::text[]))
ORDER BY e.position LIMIT $4::bigint

-- :name count : how many there are
SELECT count(*) FROM soma.events e
WHERE e.position >= $1::bigint AND e.position < $2::bigint AND ($3::text[] IS NULL OR e.event_type = ANY ($3::text[]))

-- :name open : note an archive before anything of it is written
INSERT INTO soma.archives (archive_id, lower_position, upper_position, event_types, whole, location, tick_id, made_by,
                           started_at)
VALUES ($1::uuid, $2::bigint, $3::bigint, $4::text[], $5::boolean, $6::text, $7::bigint, $8::text, soma.now())

-- :name relocate : begin it anew at another place, as nothing of it has left the log
UPDATE soma.archives SET location = $2::text, started_at = soma.now(), state = 'exporting', manifest_sha256 = NULL
WHERE archive_id = $1::uuid AND state IN ('exporting', 'verified')
RETURNING archive_id

-- :name verified : it is whole, and was read back
UPDATE soma.archives
SET state = 'verified', verified_at = soma.now(), events = $2::bigint, bytes = $3::bigint, first_position = $4::bigint,
    last_position = $5::bigint, first_timestamp = $6::timestamptz, last_timestamp = $7::timestamptz,
    manifest_sha256 = $8::text
WHERE archive_id = $1::uuid AND state = 'exporting'
RETURNING archive_id

-- :name abandon : forget an archive of which nothing was removed yet
DELETE FROM soma.archives WHERE archive_id = $1::uuid AND state IN ('exporting', 'verified') RETURNING archive_id

-- :name begin : move the log's start behind an archive; the readers that forbid it
SELECT soma.begin_removal($1::uuid, $2::uuid, $3::text, $4::text)

-- :name drop : drop the partition that an archive holds
SELECT soma.drop_archived($1::uuid, $2::uuid)

-- :name thin : delete some events of a type that an archive holds
SELECT removed, last_position FROM soma.thin_archived($1::uuid, $2::uuid, $3::text, $4::bigint, $5::integer)

-- :name removed : nothing of an archive is left in the log
UPDATE soma.archives SET state = 'removed', removed_at = soma.now()
WHERE archive_id = $1::uuid AND state = 'removing'
RETURNING archive_id

-- :name columns : an archive as retention/catalog.py reads it
SELECT a.archive_id, a.lower_position, a.upper_position, a.event_types, a.whole, a.state, a.location, a.tick_id,
       a.events, a.bytes, a.first_position, a.last_position, a.manifest_sha256, a.made_by, a.started_at, a.verified_at,
       a.removed_at, a.forced_by, a.forced_why, a.overtaken
FROM soma.archives a

-- :name unfinished : those of which something is left to do
WHERE a.state <> 'removed' ORDER BY a.lower_position

-- :name all : every one
ORDER BY a.lower_position, a.started_at

-- :name gone : archives of which something of a type was removed between two positions, the first one excluded
SELECT a.archive_id, a.location, a.manifest_sha256, a.tick_id FROM soma.archives a
WHERE a.state IN ('removing', 'removed') AND a.last_position > $1::bigint AND a.first_position <= $2::bigint
  AND ($3::text IS NULL OR $3::text = ANY (a.event_types))

-- :name gone_of : those of a type and a time
SELECT a.archive_id, a.location, a.manifest_sha256, a.tick_id, a.last_position FROM soma.archives a
WHERE a.state IN ('removing', 'removed') AND ($1::text IS NULL OR $1::text = ANY (a.event_types))
  AND ($2::timestamptz IS NULL OR a.last_timestamp >= $2::timestamptz)
  AND ($3::timestamptz IS NULL OR a.first_timestamp < $3::timestamptz)

-- :name still_there : of these positions, those that the log has
SELECT e.position FROM soma.events e WHERE e.position = ANY ($1::bigint[])

-- :name require_kept : nothing between two positions was removed
SELECT soma.require_kept($1::bigint, $2::bigint, $3::text)

-- :name accept : a reader goes on with what is left
INSERT INTO soma.reader_gaps (reader, tick_id, accepted_by, reason, accepted_at)
SELECT $1::text, s.tick_id, $2::text, $3::text, soma.now() FROM soma.log_start s
ON CONFLICT (reader) DO UPDATE
SET tick_id = excluded.tick_id, accepted_by = excluded.accepted_by, reason = excluded.reason,
    accepted_at = excluded.accepted_at
RETURNING tick_id

-- :name mark : remember which transactions have ended by now, once an hour; marks before the one that counts go. One of the
-- future, by a clock that has been set back since, does not stand against a new one
WITH old AS (
    DELETE FROM soma.retention_marks m
    WHERE m.made_at < (SELECT max(c.made_at) FROM soma.retention_marks c WHERE c.made_at <= soma.now() - $1::interval)
)
INSERT INTO soma.retention_marks (made_at, ended_xid, era)
SELECT soma.now(), pg_snapshot_xmin(pg_current_snapshot()), (SELECT era FROM soma.ticks ORDER BY tick_id DESC LIMIT 1)
WHERE NOT EXISTS (SELECT FROM soma.retention_marks m
                  WHERE m.made_at > soma.now() - interval '1 hour' AND m.made_at <= soma.now())

-- :name marked : the newest mark that is at least so old
SELECT m.ended_xid::text, m.made_at FROM soma.retention_marks m
WHERE m.made_at <= soma.now() - $1::interval AND m.era = (SELECT era FROM soma.ticks ORDER BY tick_id DESC LIMIT 1)
ORDER BY m.made_at DESC LIMIT 1

-- :name maintain_inbox : partitions of the inbox ahead of need
SELECT soma.maintain_inbox()

-- :name inbox : partitions of the inbox that hold rows and end before a moment; no id is older than 1970, and uuid_at knows
-- nothing before that
SELECT p.name, p.from_id, p.until_id FROM soma.inbox_partitions() p
WHERE p.until_id <= soma.uuid_at(greatest($1::timestamptz, 'epoch')) AND p.bytes > 0

-- :name latest : when the last event of a range of ids was stamped: ids are made before that, sometimes long before
SELECT max(e."timestamp") FROM soma.events e WHERE e.event_id >= $1::uuid AND e.event_id < $2::uuid

-- :name horizon : before anything goes: say how far back the inboxes are whole
SELECT soma.raise_inbox_horizon(c.consumer_id, $1::timestamptz) FROM soma.consumers c

-- :name empty_inbox : empty a partition but for rows written since a mark
SELECT soma.empty_inbox($1::text, $2::uuid, $3::text::xid8)

-- :name old_inbox_keys : places of expired keys, by the index on time
SELECT k.ctid::text FROM soma.inbox_keys k WHERE k.applied_at < $1::timestamptz LIMIT $2::bigint

-- :name delete_inbox_keys : some of them; what lies there may be another row by now
WITH gone AS (DELETE FROM soma.inbox_keys k WHERE k.ctid = ANY ($1::text[]::tid[]) AND k.applied_at < $2::timestamptz
              RETURNING 1)
SELECT count(*) FROM gone

-- :name old_idempotency_keys : the same of keys that callers gave
SELECT k.ctid::text FROM soma.idempotency_keys k WHERE k.recorded_at < $1::timestamptz LIMIT $2::bigint

-- :name delete_idempotency_keys : some of them
WITH gone AS (DELETE FROM soma.idempotency_keys k
              WHERE k.ctid = ANY ($1::text[]::tid[]) AND k.recorded_at < $2::timestamptz RETURNING 1)
SELECT count(*) FROM gone

-- :name delete_letters : settled letters with their history, oldest first
WITH old AS MATERIALIZED (
    SELECT l.letter_id FROM soma.dead_letters l
    WHERE l.status IN ('resolved', 'discarded') AND l.changed_at < $1::timestamptz
    ORDER BY l.changed_at LIMIT $2::bigint FOR UPDATE SKIP LOCKED
), history AS (
    DELETE FROM soma.dead_letter_history h WHERE h.letter_id = ANY (ARRAY(SELECT old.letter_id FROM old))
), gone AS (
    DELETE FROM soma.dead_letters l WHERE l.letter_id = ANY (ARRAY(SELECT old.letter_id FROM old)) RETURNING 1
)
SELECT count(*) FROM gone

-- :name delete_replays : replays that are over, with their offsets; forced ones stay as an audit, and so do rebuilds
WITH old AS MATERIALIZED (
    SELECT r.run_id FROM soma.replays r
    WHERE r.state IN ('done', 'cancelled') AND r.mode = 'missing' AND r.ended_at < $1::timestamptz LIMIT $2::bigint
), offsets AS (
    DELETE FROM soma.replay_offsets o WHERE o.run_id = ANY (ARRAY(SELECT old.run_id FROM old))
), gone AS (
    DELETE FROM soma.replays r WHERE r.run_id = ANY (ARRAY(SELECT old.run_id FROM old)) RETURNING 1
)
SELECT count(*) FROM gone

-- :name expired : how many rows beside the log are past their times; a null time counts none
SELECT (SELECT count(*) FROM soma.inbox_keys k WHERE k.applied_at < $1::timestamptz),
       (SELECT count(*) FROM soma.idempotency_keys k WHERE k.recorded_at < $2::timestamptz),
       (SELECT count(*) FROM soma.dead_letters l
        WHERE l.status IN ('resolved', 'discarded') AND l.changed_at < $3::timestamptz),
       (SELECT count(*) FROM soma.replays r
        WHERE r.state IN ('done', 'cancelled') AND r.mode = 'missing' AND r.ended_at < $4::timestamptz),
       (SELECT count(*) FROM soma.inbox_partitions() p
        WHERE p.until_id <= soma.uuid_at(greatest($1::timestamptz, 'epoch')) AND p.bytes > 0)
