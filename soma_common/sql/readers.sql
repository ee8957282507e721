-- :name tick : the newest tick, made now when something changed; a transaction of its own; and whether a tick of
-- before is still part of this history
SELECT tick_id, token, snapshot, position_before, position_after, era, era_start,
       EXISTS (SELECT FROM soma.ticks k WHERE k.tick_id = $1::bigint AND k.token = $2::bigint)
FROM soma.tick()

-- :name tick_by_id : one tick
SELECT tick_id, token, snapshot::text, position_before, position_after, era, era_start FROM soma.ticks WHERE tick_id = $1

-- :name last_of_era : the closing tick of an era
SELECT tick_id, token, snapshot::text, position_before, position_after, era, era_start FROM soma.ticks
WHERE era = $1 ORDER BY tick_id DESC LIMIT 1

-- :name first_of_era : the opening tick of an era
SELECT tick_id, token, snapshot::text, position_before, position_after, era, era_start FROM soma.ticks
WHERE era = $1 ORDER BY tick_id LIMIT 1

-- :name isolation : how this transaction sees the data
SELECT current_setting('transaction_isolation')

-- :name register : a reader and its shards, if they are new
INSERT INTO soma.shards (reader, shard, from_tick, from_token)
SELECT $1::text, n, $3::bigint, $4::bigint FROM generate_series(0, $2::integer - 1) AS n
ON CONFLICT DO NOTHING

-- :name alive : this worker is alive; forget those that are long gone
WITH gone AS (DELETE FROM soma.workers WHERE reader = $1::text AND alive_until < soma.now() - interval '1 minute')
INSERT INTO soma.workers (reader, worker, alive_until)
VALUES ($1::text, $2::text, soma.now() + $3::interval)
ON CONFLICT (reader, worker) DO UPDATE SET alive_until = excluded.alive_until

-- :name census : live workers, and this reader's shards
SELECT (SELECT count(*) FROM soma.workers WHERE reader = $1::text AND alive_until > soma.now()),
       (SELECT count(*) FROM soma.shards WHERE reader = $1::text)

-- :name renew : keep what this worker holds; a shard that is not returned is lost. By epoch: a worker that came back
-- under its old name must not keep alive what it does not know to be its own.
-- Like all that changes several shards it locks them in their order, so that no two can deadlock.
WITH locked AS MATERIALIZED (
    SELECT l.shard FROM soma.shards l
    WHERE l.reader = $1::text AND l.owner = $2::text AND l.shard = ANY ($4::smallint[])
    ORDER BY l.shard FOR NO KEY UPDATE
)
UPDATE soma.shards s SET leased_until = soma.now() + $3::interval
FROM locked JOIN unnest($4::smallint[], $5::bigint[]) AS held (shard, epoch) USING (shard)
WHERE s.reader = $1::text AND s.owner = $2::text AND s.leased_until > soma.now()
  AND s.shard = locked.shard AND s.epoch = held.epoch
RETURNING s.shard

-- :name claim : take free or expired shards, at most so many
UPDATE soma.shards s SET owner = $2::text, epoch = s.epoch + 1, leased_until = soma.now() + $3::interval
FROM (SELECT f.shard FROM soma.shards f
      WHERE f.reader = $1::text AND (f.owner IS NULL OR f.leased_until <= soma.now())
      ORDER BY f.leased_until, f.shard LIMIT $4::integer FOR UPDATE SKIP LOCKED) AS free
WHERE s.reader = $1::text AND s.shard = free.shard
RETURNING s.shard, s.epoch, s.from_tick, s.from_token, s.to_tick, s.to_token, s.after_position

-- :name release : give shards back at once; null: all of this worker's
WITH locked AS MATERIALIZED (
    SELECT l.shard FROM soma.shards l
    WHERE l.reader = $1::text AND l.owner = $2::text AND ($3::smallint[] IS NULL OR l.shard = ANY ($3::smallint[]))
    ORDER BY l.shard FOR NO KEY UPDATE
)
UPDATE soma.shards s SET owner = NULL, leased_until = '-infinity'
FROM locked
WHERE s.reader = $1::text AND s.owner = $2::text AND s.shard = locked.shard

-- :name leave : this worker is gone
DELETE FROM soma.workers WHERE reader = $1::text AND worker = $2::text

-- :name save : move cursors to ticks of this history, fenced by owner and epoch, and where the caller names the cursor
-- that was there (was_from is not null) by that too; a shard that is not returned was lost
WITH locked AS MATERIALIZED (
    SELECT l.shard FROM soma.shards l
    WHERE l.reader = $1::text AND l.owner = $2::text AND l.shard = ANY ($3::smallint[])
    ORDER BY l.shard FOR NO KEY UPDATE
)
UPDATE soma.shards s SET from_tick = c.from_tick, from_token = c.from_token, to_tick = c.to_tick,
       to_token = c.to_token, after_position = c.after_position, moved_at = soma.now()
FROM locked JOIN unnest($3::smallint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[],
                        $10::bigint[], $11::bigint[], $12::bigint[], $13::bigint[], $14::bigint[])
     AS c (shard, epoch, from_tick, from_token, to_tick, to_token, after_position,
           was_from, was_token, was_to, was_to_token, was_after) USING (shard)
WHERE s.reader = $1::text AND s.owner = $2::text AND s.shard = locked.shard AND s.epoch = c.epoch
  AND (c.was_from IS NULL
       OR ((s.from_tick, s.from_token, s.after_position) = (c.was_from, c.was_token, c.was_after)
           AND (s.to_tick, s.to_token) IS NOT DISTINCT FROM (c.was_to, c.was_to_token)))
  AND EXISTS (SELECT FROM soma.ticks t WHERE t.tick_id = c.from_tick AND t.token = c.from_token)
  AND (c.to_tick IS NULL OR EXISTS (SELECT FROM soma.ticks t WHERE t.tick_id = c.to_tick AND t.token = c.to_token))
RETURNING s.shard

-- :name reclaim : begin a new epoch of the shards a worker owns; waits for a transaction that is moving them
WITH locked AS MATERIALIZED (
    SELECT l.shard FROM soma.shards l
    WHERE l.reader = $1::text AND l.owner = $2::text
    ORDER BY l.shard FOR NO KEY UPDATE
)
UPDATE soma.shards s SET epoch = s.epoch + 1, leased_until = soma.now() + $3::interval
FROM locked
WHERE s.shard = locked.shard AND s.reader = $1::text AND s.owner = $2::text AND s.leased_until > soma.now()
RETURNING s.shard, s.epoch, s.from_tick, s.from_token, s.to_tick, s.to_token, s.after_position

-- :name cursors : where a reader's shards stand
SELECT shard, owner, epoch, leased_until > soma.now(), from_tick, from_token, to_tick, to_token, after_position, moved_at
FROM soma.shards WHERE reader = $1::text ORDER BY shard

-- :name maintain_events : partitions ahead of need
SELECT soma.maintain_events()

-- :name clean_outbox : partitions that every relay has passed
SELECT soma.clean_outbox()

-- :name merge_ticks : ticks that every cursor has passed
SELECT soma.merge_ticks()

-- :name passed : whether every shard of a reader has passed a tick
SELECT coalesce(min(from_tick) >= $2::bigint, false) FROM soma.shards WHERE reader = $1::text

-- :name guard_transaction : commit to disk; end the transaction of a process that falls silent in it
-- Between the parts of one statement (parse, execute) silence does not count: from PostgreSQL 17 on the whole transaction
-- has a bound, too, unless that is null.
SELECT set_config('synchronous_commit', 'on', true), set_config('idle_in_transaction_session_timeout', $1::text, true),
       CASE WHEN $2::text IS NOT NULL AND current_setting('transaction_timeout', true) IS NOT NULL
            THEN set_config('transaction_timeout', $2::text, true) END
