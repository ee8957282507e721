-- :name rates : when the newest events were recorded, in slices of ten seconds: 0 is the last one; none older than ten minutes
SELECT (extract(epoch FROM soma.now() - r.recorded_at) / 10)::integer, count(*)
FROM (SELECT e.recorded_at FROM soma.events e ORDER BY e.position DESC LIMIT $1::integer) r
WHERE r.recorded_at > soma.now() - interval '10 minutes' GROUP BY 1 ORDER BY 1

-- :name rates_of_tenant : the same of one tenant
SELECT (extract(epoch FROM soma.now() - r.recorded_at) / 10)::integer, count(*)
FROM (SELECT e.recorded_at FROM soma.events e WHERE e.tenant_id = $2::text ORDER BY e.position DESC LIMIT $1::integer) r
WHERE r.recorded_at > soma.now() - interval '10 minutes' GROUP BY 1 ORDER BY 1

-- :name letters : open letters by status, counted as far as a bound, and when the oldest was parked. Pairs are compared, and
-- not the status alone: of one that no letter has, the planner would read all letters in their order to find the first
SELECT s.status, (SELECT count(*) FROM (SELECT FROM soma.dead_letters l WHERE l.status = s.status LIMIT $1::integer) n),
       (SELECT f.parked_at FROM (SELECT l.status, l.parked_at FROM soma.dead_letters l
                                 WHERE (l.status, l.place) >= (s.status, 0) ORDER BY l.status, l.place LIMIT 1) f
        WHERE f.status = s.status)
FROM unnest(ARRAY['dead', 'retrying', 'blocked', 'redriving']) AS s (status)

-- :name letters_of_tenant : the same of one tenant
SELECT s.status,
       (SELECT count(*) FROM (SELECT FROM soma.dead_letters l
                              WHERE l.tenant_id = $2::text AND l.status = s.status
                                AND l.status IN ('retrying', 'blocked', 'dead', 'redriving') LIMIT $1::integer) n),
       (SELECT min(l.parked_at) FROM (SELECT l.parked_at FROM soma.dead_letters l
                                      WHERE l.tenant_id = $2::text AND l.status = s.status
                                        AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
                                      LIMIT $1::integer) l)
FROM unnest(ARRAY['dead', 'retrying', 'blocked', 'redriving']) AS s (status)

-- :name sagas : those that did not end, by status, counted as far as a bound, and when the oldest began
SELECT s.status,
       (SELECT count(*) FROM (SELECT FROM soma.sagas g WHERE g.status = s.status
                                AND g.status NOT IN ('completed', 'compensated') LIMIT $1::integer) n),
       (SELECT f.created_at FROM (SELECT g.status, g.created_at FROM soma.sagas g
                                  WHERE (g.status, g.saga_id) >= (s.status, '00000000-0000-0000-0000-000000000000'::uuid)
                                    AND g.status NOT IN ('completed', 'compensated')
                                  ORDER BY g.status, g.saga_id LIMIT 1) f
        WHERE f.status = s.status)
FROM unnest(ARRAY['pending', 'running', 'compensating', 'stuck']) AS s (status)

-- :name sagas_of_tenant : the same of one tenant, among the first so many
SELECT s.status, n.count, n.oldest
FROM unnest(ARRAY['pending', 'running', 'compensating', 'stuck']) AS s (status)
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE g.tenant_id = $2::text) AS count,
           min(g.created_at) FILTER (WHERE g.tenant_id = $2::text) AS oldest
    FROM (SELECT g.tenant_id, g.created_at FROM soma.sagas g
          WHERE g.status = s.status AND g.status NOT IN ('completed', 'compensated')
          ORDER BY g.saga_id LIMIT $1::integer) g) n

-- :name kinds : kinds of open letters (consumer, status, fingerprint), each found by one step along the index; how many
-- there are of each, as far as a bound; its newest letter, and when the oldest was parked
WITH RECURSIVE kind AS (
    (SELECT l.consumer_id, l.status, coalesce(l.fingerprint, '') AS print FROM soma.dead_letters l
     WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving')
     ORDER BY l.consumer_id, l.status, coalesce(l.fingerprint, '') LIMIT 1)
    UNION ALL
    SELECT n.* FROM kind k CROSS JOIN LATERAL (
        SELECT l.consumer_id, l.status, coalesce(l.fingerprint, '') FROM soma.dead_letters l
        WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving')
          AND (l.consumer_id, l.status, coalesce(l.fingerprint, '')) > (k.consumer_id, k.status, k.print)
        ORDER BY l.consumer_id, l.status, coalesce(l.fingerprint, '') LIMIT 1) n
), listed AS MATERIALIZED (SELECT * FROM kind LIMIT $1::integer)
SELECT c.name, s.status, nullif(s.print, ''), n.count, o.parked_at, w.parked_at, w.letter_id, w.error_type, w.message, w.event_type
FROM listed s JOIN soma.consumers c ON c.consumer_id = s.consumer_id
CROSS JOIN LATERAL (
    SELECT count(*) FROM (
        SELECT FROM soma.dead_letters l
        WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.consumer_id = s.consumer_id
          AND l.status = s.status AND coalesce(l.fingerprint, '') = s.print
        LIMIT $2::integer / greatest(1, (SELECT count(*)::integer FROM listed))) b) n
CROSS JOIN LATERAL (
    SELECT l.parked_at FROM soma.dead_letters l
    WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.consumer_id = s.consumer_id
      AND l.status = s.status AND coalesce(l.fingerprint, '') = s.print
    ORDER BY l.place LIMIT 1) o
CROSS JOIN LATERAL (
    SELECT l.parked_at, l.letter_id, l.error_type, left(l.error_message, 200) AS message, l.event_type
    FROM soma.dead_letters l
    WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.consumer_id = s.consumer_id
      AND l.status = s.status AND coalesce(l.fingerprint, '') = s.print
    ORDER BY l.place DESC LIMIT 1) w

-- :name kinds_of_tenant : the same of one tenant
WITH RECURSIVE kind AS (
    (SELECT l.consumer_id, l.status, coalesce(l.fingerprint, '') AS print FROM soma.dead_letters l
     WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.tenant_id = $3::text
     ORDER BY l.consumer_id, l.status, coalesce(l.fingerprint, '') LIMIT 1)
    UNION ALL
    SELECT n.* FROM kind k CROSS JOIN LATERAL (
        SELECT l.consumer_id, l.status, coalesce(l.fingerprint, '') FROM soma.dead_letters l
        WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.tenant_id = $3::text
          AND (l.consumer_id, l.status, coalesce(l.fingerprint, '')) > (k.consumer_id, k.status, k.print)
        ORDER BY l.consumer_id, l.status, coalesce(l.fingerprint, '') LIMIT 1) n
), listed AS MATERIALIZED (SELECT * FROM kind LIMIT $1::integer)
SELECT c.name, s.status, nullif(s.print, ''), n.count, o.parked_at, w.parked_at, w.letter_id, w.error_type, w.message, w.event_type
FROM listed s JOIN soma.consumers c ON c.consumer_id = s.consumer_id
CROSS JOIN LATERAL (
    SELECT count(*) FROM (
        SELECT FROM soma.dead_letters l
        WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.tenant_id = $3::text
          AND l.consumer_id = s.consumer_id AND l.status = s.status AND coalesce(l.fingerprint, '') = s.print
        LIMIT $2::integer / greatest(1, (SELECT count(*)::integer FROM listed))) b) n
CROSS JOIN LATERAL (
    SELECT l.parked_at FROM soma.dead_letters l
    WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.tenant_id = $3::text
      AND l.consumer_id = s.consumer_id AND l.status = s.status AND coalesce(l.fingerprint, '') = s.print
    ORDER BY l.place LIMIT 1) o
CROSS JOIN LATERAL (
    SELECT l.parked_at, l.letter_id, l.error_type, left(l.error_message, 200) AS message, l.event_type
    FROM soma.dead_letters l
    WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.tenant_id = $3::text
      AND l.consumer_id = s.consumer_id AND l.status = s.status AND coalesce(l.fingerprint, '') = s.print
    ORDER BY l.place DESC LIMIT 1) w

-- :name sequence : the open letters of a letter's sequence, in order, the first so many
SELECT l.letter_id, l.status, l.event_type, l.parked_at, l.attempts, l.tenant_id
FROM soma.dead_letters o JOIN soma.dead_letters l ON l.consumer_id = o.consumer_id AND l.sequence = o.sequence
WHERE o.letter_id = $1::uuid AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
ORDER BY l.place LIMIT $2::integer

-- :name strangers : whether open letters of another tenant stand in the sequence of a letter
SELECT EXISTS (
    SELECT FROM soma.dead_letters o JOIN soma.dead_letters l ON l.consumer_id = o.consumer_id AND l.sequence = o.sequence
    WHERE o.letter_id = $1::uuid AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
      AND l.tenant_id IS DISTINCT FROM $2::text)

-- :name strangers_of_tenant : whether they stand in any sequence in which this tenant has open letters
SELECT EXISTS (
    SELECT FROM soma.dead_letters o JOIN soma.dead_letters l ON l.consumer_id = o.consumer_id AND l.sequence = o.sequence
    WHERE o.tenant_id = $1::text AND o.status IN ('retrying', 'dead')
      AND l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND l.tenant_id IS DISTINCT FROM $1::text)

-- :name markable : how many letters of a filter another try could be asked for, counted as far as a bound
SELECT count(*) FROM (SELECT FROM soma.dead_letters l JOIN soma.consumers c ON c.consumer_id = l.consumer_id

-- :name markable_end : the bound
LIMIT $n::integer) n

-- :name letters_of_events : letters of events, for the pages that show these
SELECT l.event_id, l.letter_id, l.status, c.name FROM soma.dead_letters l JOIN soma.consumers c ON c.consumer_id = l.consumer_id
WHERE l.event_id = ANY ($1::uuid[]) ORDER BY l.place LIMIT 500

-- :name consumer_names : all consumers, for lists to choose from
SELECT c.name FROM soma.consumers c ORDER BY c.name LIMIT 500

-- :name readers : shards of readers of the log and of relays: owners, and up to which position each has read
SELECT s.reader, s.shard, s.owner, s.epoch, s.leased_until > soma.now(), s.moved_at,
       greatest(s.after_position, CASE WHEN s.to_tick IS NULL THEN t.position_after ELSE t.position_before END, 0),
       soma.last_position()
FROM soma.shards s LEFT JOIN soma.ticks t ON t.tick_id = s.from_tick
WHERE s.reader NOT LIKE 'replay:%' ORDER BY s.reader, s.shard LIMIT 5000

-- :name next_after : when the first event behind a position was recorded, for several positions
SELECT p.position, (SELECT e.recorded_at FROM soma.events e WHERE e.position > p.position ORDER BY e.position LIMIT 1)
FROM unnest($1::bigint[]) AS p (position)

-- :name workers : how many workers of each reader are alive
SELECT w.reader, count(*) FROM soma.workers w WHERE w.alive_until > soma.now() GROUP BY w.reader

-- :name offsets : where consumers of Kafka stand
SELECT c.name, o.topic, o.partition, o.next_offset, o.epoch, o.moved_at
FROM soma.consumer_offsets o JOIN soma.consumers c ON c.consumer_id = o.consumer_id
ORDER BY c.name, o.topic, o.partition LIMIT 5000

-- :name parked : rows that relays put aside, counted as far as a bound
SELECT r.reader, (SELECT count(*) FROM (SELECT FROM soma.outbox_parked p WHERE p.reader = r.reader LIMIT 10001) n)
FROM (SELECT DISTINCT s.reader FROM soma.shards s WHERE s.reader LIKE 'relay:%') r ORDER BY r.reader

-- :name topics : how many partitions each relay counts on
SELECT t.reader, t.topic, t.partitions FROM soma.relay_topics t ORDER BY t.reader, t.topic LIMIT 1000

-- :name database : which server this is, and since when
SELECT current_setting('server_version'), pg_postmaster_start_time(), pg_is_in_recovery(), soma.last_position()
