-- :name find : a consumer's number
SELECT consumer_id FROM soma.consumers WHERE name = $1::text

-- :name register : a consumer's number, made when it is new
INSERT INTO soma.consumers (name) VALUES ($1::text)
ON CONFLICT (name) DO UPDATE SET name = excluded.name
RETURNING consumer_id

-- :name place : which database this is
SELECT (SELECT c.system_identifier FROM pg_control_system() c),
       (SELECT d.oid::bigint FROM pg_database d WHERE d.datname = current_database())

-- :name claim : enter events into the inbox, and tell which are fresh and whether the consumer has open letters
SELECT fresh, letters FROM soma.claim(
    $1::integer, $2::bigint, $3::bigint, $4::text, $5::uuid[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[])

-- :name behind : which of these sequences have open letters, by their place from 0
SELECT s.number - 1 FROM unnest($2::bytea[]) WITH ORDINALITY AS s (sequence, number)
JOIN soma.dead_sequences d ON d.consumer_id = $1::integer AND d.sequence = s.sequence

-- :name count_batch : a lane begins one more batch
SELECT soma.count_batch($1::bigint, $2::bigint)

-- :name complete_batch : the last statement of a batch's transaction, without which it cannot be committed
SELECT soma.complete_batch()

-- :name make_lanes : a row per lane of a worker; those of workers that died long ago go (one that still lives begins anew)
WITH old AS (
    DELETE FROM soma.consumer_lanes l
    WHERE l.consumer_id = $1::integer AND l.made_at < clock_timestamp() - interval '30 days'
)
INSERT INTO soma.consumer_lanes (consumer_id) SELECT $1::integer FROM generate_series(1, $2::integer)
RETURNING lane_id

-- :name leave_lanes : the worker leaves
DELETE FROM soma.consumer_lanes l WHERE l.lane_id = ANY ($1::bigint[])

-- :name end_silent : end transactions for which a statement of ours waits and whose client was silent for so many seconds.
-- PostgreSQL's own timeout sees a client that is silent between statements; not one that was stopped between the messages
-- of a single statement, while it is being prepared.
SELECT pg_terminate_backend(b.pid)
FROM pg_stat_activity w
CROSS JOIN LATERAL unnest(pg_blocking_pids(w.pid)) AS p (pid)
JOIN pg_stat_activity b ON b.pid = p.pid
WHERE w.datname = current_database() AND w.usename = current_user AND w.wait_event_type = 'Lock' AND w.query LIKE '%soma.%'
  AND b.datname = current_database() AND b.usename = current_user AND b.state = 'active' AND b.wait_event = 'ClientRead'
  AND b.state_change < clock_timestamp() - make_interval(secs => $1::float8)

-- :name lanes_behind : lanes that are not where their worker knows them: the database was set back
SELECT g.lane FROM unnest($1::bigint[], $2::bigint[]) AS g (lane, batches)
WHERE NOT EXISTS (SELECT FROM soma.consumer_lanes l WHERE l.lane_id = g.lane AND l.batches >= g.batches)

-- :name take_partitions : count that partitions are taken; how often that was since they moved
INSERT INTO soma.consumer_claims AS c (consumer_id, topic, partition, claims)
SELECT $1::integer, t.topic, t.number, 1 FROM unnest($2::text[], $3::integer[]) AS t (topic, number)
ORDER BY t.topic, t.number
ON CONFLICT (consumer_id, topic, partition) DO UPDATE SET claims = c.claims + 1
RETURNING c.topic, c.partition, c.claims

-- :name partitions_moved : they move, or their owner leaves in good order; attempts of settled events go
WITH moved AS MATERIALIZED (
    SELECT c.topic, c.partition, t.settled FROM unnest($2::text[], $3::integer[], $4::bigint[]) AS t (topic, number, settled)
    JOIN soma.consumer_claims c ON c.consumer_id = $1::integer AND c.topic = t.topic AND c.partition = t.number
    ORDER BY c.topic, c.partition FOR NO KEY UPDATE OF c
), cleaned AS (
    DELETE FROM soma.consumer_attempts a USING moved m
    WHERE a.consumer_id = $1::integer AND a.topic = m.topic AND a.partition = m.partition
      AND a.record_offset <= m.settled
)
UPDATE soma.consumer_claims c SET claims = 0 FROM moved m
WHERE c.consumer_id = $1::integer AND c.topic = m.topic AND c.partition = m.partition AND c.claims > 0

-- :name begin_together : events of suspect partitions are begun, several at once
INSERT INTO soma.consumer_attempts (consumer_id, topic, partition, record_offset, attempts)
SELECT $1::integer, t.topic, t.number, t.place, 0
FROM unnest($2::text[], $3::integer[], $4::bigint[]) AS t (topic, number, place)
ON CONFLICT DO NOTHING

-- :name begin_alone : one is begun alone; how often that was
INSERT INTO soma.consumer_attempts AS a (consumer_id, topic, partition, record_offset, attempts)
VALUES ($1::integer, $2::text, $3::integer, $4::bigint, 1)
ON CONFLICT (consumer_id, topic, partition, record_offset) DO UPDATE SET attempts = a.attempts + 1
RETURNING a.attempts

-- :name attempts_left : events at which owners of these partitions died; how often alone
SELECT a.topic, a.partition, a.record_offset, a.attempts
FROM unnest($2::text[], $3::integer[]) AS t (topic, number)
JOIN soma.consumer_attempts a ON a.consumer_id = $1::integer AND a.topic = t.topic AND a.partition = t.number

-- :name withdraw_attempts : their owner leaves alive
WITH ours AS MATERIALIZED (
    SELECT t.topic, t.number, t.place FROM unnest($2::text[], $3::integer[], $4::bigint[]) AS t (topic, number, place)
), first AS (
    DELETE FROM soma.consumer_attempts a USING ours o
    WHERE a.consumer_id = $1::integer AND a.topic = o.topic AND a.partition = o.number
      AND a.record_offset = o.place AND a.attempts <= 1
)
UPDATE soma.consumer_attempts a SET attempts = a.attempts - 1 FROM ours o
WHERE a.consumer_id = $1::integer AND a.topic = o.topic AND a.partition = o.number
  AND a.record_offset = o.place AND a.attempts > 1

-- :name end_attempts : they ended, well or not
DELETE FROM soma.consumer_attempts a
USING unnest($2::text[], $3::integer[], $4::bigint[]) AS t (topic, number, place)
WHERE a.consumer_id = $1::integer AND a.topic = t.topic AND a.partition = t.number AND a.record_offset = t.place

-- :name log_page : what one tick adds to another for some shards, in order. array_position and not ANY: of that the planner
-- thinks that it leaves next to nothing, and reads and sorts all that is newer for every page
WHERE (SELECT soma.require_read($8::text, $9::bigint))
  AND e.position > $1::bigint AND e.position <= $2::bigint AND e.xid >= $3::text::xid8
  AND pg_visible_in_snapshot(e.xid, (SELECT $4::text::pg_snapshot))
  AND array_position($7::integer[], e.key_hash & $6::integer) IS NOT NULL
ORDER BY e.position LIMIT $5::bigint

-- :name log_stragglers : events of transactions that were still running at the first tick and have ended by the second;
-- by transaction id alone: "+ 0" keeps the planner from walking all positions instead
WHERE (SELECT soma.require_read($7::text, $8::bigint))
  AND e.xid = ANY ((SELECT $1::text[]::xid8[])::xid8[]) AND e.position + 0 > $2::bigint AND e.position + 0 <= $3::bigint
  AND (e.key_hash & $5::integer) = ANY ($6::integer[])
ORDER BY e.position + 0 LIMIT $4::bigint

-- :name claim_offsets : begin a new epoch of assigned partitions; waits for a transaction that is moving them
INSERT INTO soma.consumer_offsets AS o (consumer_id, topic, partition, next_offset, epoch, moved_at, topic_id)
SELECT $1::integer, c.topic, c.number, c.earliest, 1, soma.now(), c.topic_id
FROM unnest($2::text[], $3::integer[], $4::bigint[], $5::uuid[]) AS c (topic, number, earliest, topic_id)
ORDER BY c.topic, c.number
ON CONFLICT (consumer_id, topic, partition)
    DO UPDATE SET epoch = o.epoch + 1, topic_id = coalesce(o.topic_id, excluded.topic_id)
RETURNING o.topic, o.partition, o.next_offset, o.epoch, o.topic_id

-- :name save_offsets : move offsets, fenced by epoch and the offset that was there; what is not returned was refused.
-- Locks in the order in which claim_offsets does, so that a former owner and the next cannot deadlock.
WITH moves AS MATERIALIZED (
    SELECT l.topic, l.partition, c.next_offset
    FROM unnest($2::text[], $3::integer[], $4::bigint[], $5::bigint[], $6::bigint[])
         AS c (topic, number, epoch, was_offset, next_offset)
    JOIN soma.consumer_offsets l ON l.consumer_id = $1::integer AND l.topic = c.topic AND l.partition = c.number
    WHERE l.epoch = c.epoch AND l.next_offset = c.was_offset
    ORDER BY l.topic, l.partition FOR NO KEY UPDATE OF l
)
UPDATE soma.consumer_offsets o SET next_offset = m.next_offset, moved_at = soma.now()
FROM moves m
WHERE o.consumer_id = $1::integer AND o.topic = m.topic AND o.partition = m.partition
RETURNING o.topic, o.partition

-- :name offsets : where a consumer stands
SELECT topic, partition, next_offset, epoch, moved_at FROM soma.consumer_offsets
WHERE consumer_id = $1::integer ORDER BY topic, partition
