-- :name consumer : a consumer's number and how far back its inbox is whole
SELECT consumer_id, inbox_horizon FROM soma.consumers WHERE name = $1::text

-- :name passed : the newest tick that every shard of a reader has passed; null when it has no shards
SELECT s.from_tick, s.from_token FROM soma.shards s WHERE s.reader = $1::text ORDER BY s.from_tick LIMIT 1

-- :name reads_kafka : whether a consumer has positions in Kafka
SELECT EXISTS (SELECT FROM soma.consumer_offsets WHERE consumer_id = $1::integer)

-- :name topic_ids : which topics a consumer has read in Kafka, by their ids
SELECT DISTINCT ON (o.topic) o.topic, o.topic_id FROM soma.consumer_offsets o
WHERE o.consumer_id = $1::integer AND o.topic_id IS NOT NULL ORDER BY o.topic

-- :name open : record a run
SELECT soma.open_replay($1::uuid, $2::integer, $3::integer, $4::text, $5::text, $6::json, $7::timestamptz, $8::bigint,
                        $9::bigint, $10::bigint, $11::bigint, $12::double precision, $13::text, $14::text)

-- :name claim : take a run that nobody is at
SELECT soma.claim_replay($1::uuid, $2::uuid, $3::interval)

-- :name renew : keep a run
SELECT soma.renew_replay($1::uuid, $2::bigint, $3::interval)

-- :name save : move a run's cursor in the transaction of its batch
SELECT soma.save_replay($1::uuid, $2::bigint, $3::interval, $4::bigint, $5::bigint, $6::bigint, $7::bigint, $8::bigint,
                        $9::bigint, $10::bigint, $11::bigint, $12::bigint, $13::bigint)

-- :name save_offset : the same in a partition of Kafka
SELECT soma.save_replay_offset($1::uuid, $2::bigint, $3::interval, $4::text, $5::integer, $6::bigint, $7::bigint,
                               $8::bigint, $9::bigint, $10::bigint, $11::bigint)

-- :name open_offsets : where a run that reads Kafka begins and ends
SELECT soma.open_replay_offsets($1::uuid, $2::text[], $3::integer[], $4::bigint[], $5::bigint[])

-- :name offsets : where it stands
SELECT o.topic, o.partition, o.first_offset, o.next_offset, o.end_offset FROM soma.replay_offsets o
WHERE o.run_id = $1::uuid ORDER BY o.topic, o.partition

-- :name turn : change a run's state
SELECT soma.turn_replay($1::uuid, $2::text[], $3::text, $4::bigint, $5::text)

-- :name raise_horizon : say how far back a consumer's inbox is whole
SELECT soma.raise_inbox_horizon($1::integer, $2::timestamptz)

-- :name columns : a run as checkpoints.py reads it
SELECT r.run_id, c.name, r.mode, r.source, r.filter::text, r.state, r.consumer_id, r.inbox_id, r.epoch, r.end_tick,
       r.end_token, r.first_position, r.last_position, r.from_tick, r.from_token, r.to_tick, r.to_token,
       r.after_position, r.read, r.applied, r.repeated, r.skipped, r.held, r.rate, r.requested_by, r.reason, r.error,
       r.created_at, r.started_at, r.ended_at
FROM soma.replays r JOIN soma.consumers c USING (consumer_id)

-- :name by_id : one run
WHERE r.run_id = $1::uuid

-- :name newest : the latest runs
ORDER BY r.created_at DESC, r.run_id LIMIT $1::bigint

-- :name newest_of_tenant : the same of one tenant's events
WHERE r.filter ->> 'tenant_id' = $2::text ORDER BY r.created_at DESC, r.run_id LIMIT $1::bigint

-- :name page : what a tick shows of an era, above a position
e.position > $n::bigint
-- :name page_end : up to a position
e.position <= $n::bigint
-- :name page_visible : in a snapshot
pg_visible_in_snapshot(e.xid, (SELECT $n::text::pg_snapshot))

-- :name bounds : the positions between which the events of a time range lie; "+ 0" keeps the planner from walking the
-- positions from their beginning until it meets the first event of the range
SELECT coalesce(min(e.position + 0), 1), coalesce(max(e.position + 0), 0) FROM soma.events e

-- :name counts : how many events of a filter there are, and how many of them an inbox knows
SELECT e.event_type, e.service_id, (e."timestamp" AT TIME ZONE 'UTC')::date, count(*),
       count(*) FILTER (WHERE EXISTS (
           SELECT FROM soma.inbox i
           WHERE (i.event_id, i.tenant_id, i.service_id) = (e.event_id, e.tenant_id, e.service_id)
             AND i.consumer_id = (SELECT coalesce(c.inbox_id, c.consumer_id) FROM soma.consumers c WHERE c.consumer_id = $n::integer))
        OR EXISTS (
           SELECT FROM soma.inbox_keys k
           WHERE (k.idempotency_key, k.tenant_id, k.service_id) = (e.idempotency_key, e.tenant_id, e.service_id)
             AND k.consumer_id = (SELECT coalesce(c.inbox_id, c.consumer_id) FROM soma.consumers c WHERE c.consumer_id = $n::integer)))
FROM soma.events e

-- :name counted : by what
GROUP BY 1, 2, 3

-- :name held : of these events, by their numbers from 1, those with an open dead letter of the consumer, or whose key or
-- partition has one; while nothing is dead this is one look into an empty index
SELECT g.number FROM unnest($2::uuid[], $3::bytea[], $4::bytea[]) WITH ORDINALITY AS g (event_id, key, part, number)
WHERE EXISTS (SELECT FROM soma.dead_sequences d WHERE d.consumer_id = $1::integer)
  AND (EXISTS (SELECT FROM soma.dead_sequences d
               WHERE d.consumer_id = $1::integer AND d.sequence = ANY (ARRAY[g.key, g.part]))
       OR EXISTS (SELECT FROM soma.dead_letters l
                  WHERE l.event_id = g.event_id AND l.consumer_id = $1::integer
                    AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')))
