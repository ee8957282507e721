-- :name find : a consumer's number
SELECT consumer_id FROM soma.consumers WHERE name = $1::text

-- :name register : a consumer's number, made when it is new
INSERT INTO soma.consumers (name) VALUES ($1::text)
ON CONFLICT (name) DO UPDATE SET name = excluded.name
RETURNING consumer_id

-- :name claim_ids : settings of the batch's transaction, and its events entered by id; returns those that are new
WITH settings AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'on', true),
           set_config('idle_in_transaction_session_timeout', $2::text, true)
)
INSERT INTO soma.inbox (event_id, consumer_id, tenant_id, service_id)
SELECT e.id, $1::integer, e.tenant, e.service
FROM settings, unnest($3::uuid[], $4::text[], $5::text[]) AS e (id, tenant, service)
ORDER BY e.id
ON CONFLICT DO NOTHING
RETURNING event_id, tenant_id, service_id

-- :name claim_keys : the same for events with a key that a caller gave
WITH settings AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'on', true),
           set_config('idle_in_transaction_session_timeout', $2::text, true)
)
INSERT INTO soma.inbox_keys (idempotency_key, consumer_id, tenant_id, service_id, applied_at)
SELECT e.key, $1::integer, e.tenant, e.service, soma.now()
FROM settings, unnest($3::text[], $4::text[], $5::text[]) AS e (key, tenant, service)
ORDER BY e.tenant COLLATE "C", e.service COLLATE "C", e.key COLLATE "C"
ON CONFLICT DO NOTHING
RETURNING idempotency_key, tenant_id, service_id

-- :name log_page : what one tick adds to another for some shards, in order. array_position and not ANY: of that the planner
-- thinks that it leaves next to nothing, and reads and sorts all that is newer for every page
WHERE e.position > $1::bigint AND e.position <= $2::bigint AND e.xid >= $3::text::xid8
  AND pg_visible_in_snapshot(e.xid, (SELECT $4::text::pg_snapshot))
  AND array_position($7::integer[], e.key_hash & $6::integer) IS NOT NULL
ORDER BY e.position LIMIT $5::bigint

-- :name log_stragglers : events of transactions that were still running at the first tick and have ended by the second;
-- by transaction id alone: "+ 0" keeps the planner from walking all positions instead
WHERE e.xid = ANY ((SELECT $1::text[]::xid8[])::xid8[]) AND e.position + 0 > $2::bigint AND e.position + 0 <= $3::bigint
  AND (e.key_hash & $5::integer) = ANY ($6::integer[])
ORDER BY e.position + 0 LIMIT $4::bigint

-- :name claim_offsets : begin a new epoch of assigned partitions; waits for a transaction that is moving them
INSERT INTO soma.consumer_offsets AS o (consumer_id, topic, partition, next_offset, epoch, moved_at)
SELECT $1::integer, c.topic, c.number, c.earliest, 1, soma.now()
FROM unnest($2::text[], $3::integer[], $4::bigint[]) AS c (topic, number, earliest)
ORDER BY c.topic, c.number
ON CONFLICT (consumer_id, topic, partition) DO UPDATE SET epoch = o.epoch + 1
RETURNING o.topic, o.partition, o.next_offset, o.epoch

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
