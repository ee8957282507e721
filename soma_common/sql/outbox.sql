-- :name ordered : for this transaction: read pages along the index. Without statistics the planner takes a whole backlog
--                 for a handful of rows and would sort all of it for every page
SELECT set_config('enable_sort', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_seqscan', 'off', true)

-- :name pages : what one tick adds to another, for several groups at once, in order; casts are made once per group
WITH wanted AS MATERIALIZED (
    SELECT g.shard, g.low, g.high, g.base_xmax::xid8 AS base_xmax, g.target::pg_snapshot AS target
    FROM unnest($1::smallint[], $2::bigint[], $3::bigint[], $4::text[], $5::text[])
         AS g (shard, low, high, base_xmax, target)
)
SELECT o.position, o.key_hash, o.topic, o.key, o.event_id, o.event_type, o.version, o.timestamp_ms, o.value, o.headers,
       g.shard
FROM wanted g CROSS JOIN LATERAL (
    SELECT r.position, r.key_hash, r.topic, r.key, r.event_id, r.event_type, r.version,
           trunc(extract(epoch FROM r."timestamp") * 1000)::bigint AS timestamp_ms, r.value, r.headers
    FROM soma.outbox r
    WHERE r.shard = g.shard AND r.position > g.low AND r.position <= g.high AND r.xid >= g.base_xmax
      AND pg_visible_in_snapshot(r.xid, g.target)
    ORDER BY r.position LIMIT $6::bigint
) AS o

-- :name stragglers : rows of transactions that were still running at the first tick and have ended by the second;
-- by transaction id alone: "+ 0" keeps the planner from walking a group's whole backlog instead
WITH wanted AS MATERIALIZED (
    SELECT g.shard, g.after, g.high, g.late::xid8[] AS late
    FROM unnest($1::smallint[], $2::bigint[], $3::bigint[], $4::text[]) AS g (shard, after, high, late)
)
SELECT o.position, o.key_hash, o.topic, o.key, o.event_id, o.event_type, o.version, o.timestamp_ms, o.value, o.headers,
       g.shard
FROM wanted g CROSS JOIN LATERAL (
    SELECT r.position, r.key_hash, r.topic, r.key, r.event_id, r.event_type, r.version,
           trunc(extract(epoch FROM r."timestamp") * 1000)::bigint AS timestamp_ms, r.value, r.headers
    FROM soma.outbox r
    WHERE r.xid = ANY (g.late) AND r.shard + 0 = g.shard AND r.position + 0 > g.after AND r.position + 0 <= g.high
    ORDER BY r.position + 0 LIMIT $5::bigint
) AS o

-- :name park : put rows aside, the outbox keeps its own; a row that is parked already stays as it is
INSERT INTO soma.outbox_parked (reader, position, topic, key, key_hash, event_id, event_type, version, "timestamp", value,
                                headers, reason, parked_at)
SELECT $1::text, r.position, r.topic, r.key, r.key_hash, r.event_id, r.event_type, r.version, r."timestamp", r.value,
       r.headers, p.reason, soma.now()
FROM unnest($2::smallint[], $3::bigint[], $4::text[]) AS p (shard, position, reason)
JOIN soma.outbox r ON r.shard = p.shard AND r.position = p.position
ON CONFLICT DO NOTHING

-- :name blocked : keys of some groups that have parked rows
SELECT DISTINCT (key_hash & 7)::smallint, topic, key FROM soma.outbox_parked
WHERE reader = $1::text AND (key_hash & 7) = ANY ($2::smallint[])

-- :name parked_counts : parked rows by group
SELECT (key_hash & 7)::smallint, count(*) FROM soma.outbox_parked WHERE reader = $1::text GROUP BY 1

-- :name parked : what is parked, oldest first
SELECT position, topic, key, event_id, event_type, version, reason, parked_at, wanted, octet_length(value)
FROM soma.outbox_parked
WHERE reader = $1::text AND position > $2::bigint AND ($3::text IS NULL OR topic = $3::text)
ORDER BY position LIMIT $4::bigint

-- :name unpark : ask for another try of whole keys, by topic and by position of one of their rows
SELECT soma.unpark($1::text, $2::text, $3::bigint[])

-- :name wanted : parked rows of keys that somebody asked to try again, in order
SELECT p.position, p.key_hash, p.topic, p.key, p.event_id, p.event_type, p.version,
       trunc(extract(epoch FROM p."timestamp") * 1000)::bigint AS timestamp_ms, p.value, p.headers,
       (p.key_hash & 7)::smallint AS shard
FROM soma.outbox_parked p
WHERE p.reader = $1::text AND (p.key_hash & 7) = ANY ($2::smallint[])
  AND EXISTS (SELECT FROM soma.outbox_parked w
              WHERE w.reader = p.reader AND w.topic = p.topic AND w.key = p.key AND w.wanted)
ORDER BY p.position LIMIT $3::bigint

-- :name attempt : name a try of parked rows before they are sent, so that it is known whether they were
SELECT soma.mark_parked($1::text, $2::bigint[], $3::uuid)

-- :name refuse_again : a try failed for good: keep these rows, with the new reason, until somebody asks again
SELECT soma.refuse_parked($1::text, $2::bigint[], $3::text[])

-- :name unparked : rows that were sent after all
DELETE FROM soma.outbox_parked WHERE reader = $1::text AND position = ANY ($2::bigint[])

-- :name attempted : rows of a try that was committed by the broker
DELETE FROM soma.outbox_parked WHERE reader = $1::text AND attempt = $2::uuid

-- :name pin : the number of partitions a topic has for this relay; the first one that is seen stays
SELECT soma.pin_topic($1::text, $2::text, $3::integer)

-- :name accept_partitions : an operator's word that the topic has so many partitions from now on
SELECT soma.accept_partitions($1::text, $2::text, $3::integer)

-- :name pins : what is pinned
SELECT topic, partitions FROM soma.relay_topics WHERE reader = $1::text ORDER BY topic
