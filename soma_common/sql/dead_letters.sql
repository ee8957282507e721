-- :name lock_sequence : make or lock the row of a sequence; a new one is due with its first letter
INSERT INTO soma.dead_sequences AS d (consumer_id, sequence, next_at, opened_at)
VALUES ($1::integer, $2::bytea, soma.now() + make_interval(secs => $3::float8), soma.now())
ON CONFLICT (consumer_id, sequence) DO UPDATE SET opened_at = d.opened_at

-- :name lock_open : lock sequences that have open letters, in one order; what is not returned was settled meanwhile
SELECT d.sequence FROM soma.dead_sequences d
WHERE d.consumer_id = $1::integer AND d.sequence = ANY ($2::bytea[])
ORDER BY d.sequence FOR UPDATE

-- :name write_letters : letters of locked sequences, in their order; those that were not there yet. Lists of a letter's
-- headers cannot differ in length within an array, so all headers come in one, and each letter has its part of it.
WITH given AS MATERIALIZED (
    SELECT g.*, sum(g.headers) OVER (ORDER BY g.number)::integer AS until
    FROM unnest($2::uuid[], $3::bytea[], $4::text[], $5::integer[], $6::bigint[], $7::bytea[], $8::bytea[],
                $9::integer[], $12::timestamptz[], $13::bytea[], $14::uuid[], $15::text[], $16::text[], $17::text[],
                $18::text[], $19::uuid[])
         WITH ORDINALITY AS g (id, sequence, topic, partition, record_offset, key, value, headers, record_time, digest,
                               event_id, event_type, tenant, service, idempotency_key, trace, number)
), written AS (
    INSERT INTO soma.dead_letters (
        letter_id, consumer_id, sequence, status, topic, partition, record_offset, record_key, value, header_names,
        header_values, record_time, digest, event_id, event_type, tenant_id, service_id, idempotency_key, trace_id,
        stage, error_type, error_message, error_stack, fingerprint, attempts, next_at, automatic_left, parked_at,
        changed_at)
    SELECT g.id, $1::integer, g.sequence, $20::text, g.topic, g.partition, g.record_offset, g.key, g.value,
           ($10::bytea[])[g.until - g.headers + 1 : g.until], ($11::bytea[])[g.until - g.headers + 1 : g.until],
           g.record_time, g.digest, g.event_id, g.event_type, g.tenant, g.service, g.idempotency_key, g.trace,
           $21::text, $22::text, $23::text, $24::text, $25::text, $26::integer,
           soma.now() + make_interval(secs => $27::float8), $28::integer, soma.now(), soma.now()
    FROM given g ORDER BY g.number
    ON CONFLICT ON CONSTRAINT dead_letters_record_key DO NOTHING
    RETURNING letter_id, status, error_message
), noted AS (
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
    SELECT letter_id, soma.now(), $29::text, status, left(error_message, 500) FROM written
)
SELECT letter_id FROM written

-- :name know_letters : records that have letters already are met again: those that knew no event learn it
SELECT soma.know_letters($1::integer, $2::text[], $3::integer[], $4::bigint[], $5::bytea[], $6::uuid[], $7::text[],
                         $8::text[], $9::text[], $10::text[], $11::uuid[])

-- :name lease_due : lease sequences whose first letter is due, longest waiting first; passes over what others hold
WITH due AS MATERIALIZED (
    SELECT d.sequence FROM soma.dead_sequences d
    WHERE d.consumer_id = $1::integer AND d.next_at <= (SELECT soma.now())
      AND (d.leased_until IS NULL OR d.leased_until <= (SELECT soma.now()))
    ORDER BY d.next_at LIMIT $2::integer
    FOR UPDATE SKIP LOCKED
)
UPDATE soma.dead_sequences d
SET lease = gen_random_uuid(), lease_owner = $3::text, leased_until = soma.now() + make_interval(secs => $4::float8), leases = d.leases + 1
WHERE d.consumer_id = $1::integer AND d.sequence = ANY (ARRAY(SELECT due.sequence FROM due))  -- a join reads all rows
RETURNING d.sequence, d.lease, d.leased_until, d.leases

-- :name any_due : whether letters of a consumer could be re-driven now
SELECT EXISTS (
    SELECT FROM soma.dead_sequences d JOIN soma.consumers c USING (consumer_id)
    WHERE c.name = $1::text AND d.next_at <= soma.now())

-- :name renew_lease : hold a lease longer; no row: it was lost
UPDATE soma.dead_sequences d SET leased_until = soma.now() + make_interval(secs => $4::float8)
WHERE d.consumer_id = $1::integer AND d.sequence = $2::bytea AND d.lease = $3::uuid AND d.leased_until > soma.now()
RETURNING d.leased_until

-- :name release_lease : give a sequence back
UPDATE soma.dead_sequences d SET lease = NULL, lease_owner = NULL, leased_until = NULL, leases = 0
WHERE d.consumer_id = $1::integer AND d.sequence = $2::bytea AND d.lease = $3::uuid

-- :name rest_lease : give a sequence back that nobody can try now: it stays due, behind all that are due, and rests
UPDATE soma.dead_sequences d
SET lease = NULL, lease_owner = NULL, leases = 0, next_at = soma.now(), leased_until = soma.now() + make_interval(secs => $4::float8)
WHERE d.consumer_id = $1::integer AND d.sequence = $2::bytea AND d.lease = $3::uuid

-- :name fail : a try of a letter failed
SELECT soma.fail_letter(
    $1::integer, $2::bytea, $3::uuid, $4::uuid, $5::integer, $6::text, make_interval(secs => $7::float8), $8::integer,
    $9::text, $10::text, $11::text, $12::text, $13::text)

-- :name resolve : several letters of a sequence were applied in one transaction
SELECT soma.resolve_letters($1::integer, $2::bytea, $3::uuid, $4::uuid[], $5::integer[], $6::text)

-- :name advance : when a locked sequence is due, or its end
SELECT soma.advance_sequence($1::integer, $2::bytea)

-- :name columns : a letter without its bytes, as dlq/rows.py reads it
SELECT l.place, l.letter_id, c.name, l.sequence, l.status, l.stage, l.topic, l.partition, l.record_offset,
       l.event_id, l.event_type, l.tenant_id, l.service_id, l.idempotency_key, l.trace_id, l.error_type,
       left(l.error_message, 500), l.fingerprint, l.attempts, l.next_at, l.automatic_left, l.edited_by, l.edited_at,
       l.revision, l.parked_at, l.changed_at, coalesce(octet_length(l.value), 0)

-- :name content : the rest of it
, l.record_key, l.value, l.header_names, l.header_values, l.record_time, l.error_message, l.error_stack, l.edited_value

-- :name source : where letters are
FROM soma.dead_letters l JOIN soma.consumers c ON c.consumer_id = l.consumer_id

-- :name by_id : one letter
WHERE l.letter_id = $1::uuid

-- :name of_lease : the letters of a leased sequence that may be re-driven now, in order: up to one that is dead or not due,
-- and no more than so many bytes of values; one at least
WHERE l.consumer_id = $1::integer AND l.sequence = $2::bytea
  AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
  AND EXISTS (SELECT FROM soma.dead_sequences d WHERE d.consumer_id = $1::integer AND d.sequence = $2::bytea
                AND d.lease = $3::uuid AND d.leased_until > (SELECT soma.now()))
  AND l.place < coalesce((
      SELECT s.place FROM soma.dead_letters s
      WHERE s.consumer_id = $1::integer AND s.sequence = $2::bytea
        AND s.status IN ('retrying', 'blocked', 'dead', 'redriving')
        AND (s.status = 'dead' OR (s.status = 'retrying' AND s.next_at > (SELECT soma.now())))
      ORDER BY s.place LIMIT 1), 9223372036854775807)
  AND l.place <= (
      SELECT max(t.place) FROM (
          SELECT f.place, sum(f.size) OVER (ORDER BY f.place) - f.size AS before FROM (
              SELECT b.place, coalesce(octet_length(b.value), 0) + coalesce(octet_length(b.edited_value), 0) AS size
              FROM soma.dead_letters b
              WHERE b.consumer_id = $1::integer AND b.sequence = $2::bytea
                AND b.status IN ('retrying', 'blocked', 'dead', 'redriving')
              ORDER BY b.place LIMIT $4::integer) f) t
      WHERE t.before < $5::bigint)
ORDER BY l.place LIMIT $4::integer

-- :name where_consumer : filter
l.consumer_id = (SELECT n.consumer_id FROM soma.consumers n WHERE n.name = $n::text)
-- :name where_tenant_id : filter
l.tenant_id = $n::text
-- :name where_statuses : filter
l.status = ANY ($n::text[])
-- :name where_stage : filter
l.stage = $n::text
-- :name where_fingerprint : filter
l.fingerprint = $n::text
-- :name where_event_type : filter
l.event_type = $n::text
-- :name where_event_id : filter
l.event_id = $n::uuid
-- :name where_trace_id : filter
l.trace_id = $n::uuid
-- :name where_error_type : filter
l.error_type = $n::text
-- :name where_since : filter, inclusive
l.parked_at >= $n::timestamptz
-- :name where_until : filter, exclusive
l.parked_at < $n::timestamptz
-- :name where_after : keyset, oldest first
l.place > $n::bigint
-- :name where_before : keyset, newest first
l.place < $n::bigint
-- :name oldest_first : order
ORDER BY l.place LIMIT $n::integer
-- :name newest_first : order
ORDER BY l.place DESC LIMIT $n::integer

-- :name summary : letters by consumer, status and fingerprint; the example is the newest
SELECT c.name, l.status, l.fingerprint, count(*), min(l.parked_at), max(l.parked_at),
       (array_agg(l.letter_id ORDER BY l.place DESC))[1], (array_agg(l.error_type ORDER BY l.place DESC))[1],
       (array_agg(left(l.error_message, 200) ORDER BY l.place DESC))[1],
       (array_agg(l.event_type ORDER BY l.place DESC))[1]

-- :name summary_groups : the largest groups first
GROUP BY c.name, l.status, l.fingerprint
ORDER BY count(*) DESC, c.name, l.status, l.fingerprint

-- :name redrive : ask for another try of the whole sequences of letters; the letters that changed
SELECT soma.retry_letters_of_sagas($1::uuid[], $2::text, $3::text)
UNION ALL
SELECT soma.redrive_any($1::uuid[], $2::text, $3::text)

-- :name can_retry : whether the sequence of an open letter has something for which another try can be asked
SELECT l.status IN ('retrying', 'blocked', 'dead', 'redriving') AND EXISTS (
    SELECT FROM soma.dead_letters s
    WHERE s.consumer_id = l.consumer_id AND s.sequence = l.sequence AND s.status IN ('retrying', 'dead'))
FROM soma.dead_letters l WHERE l.letter_id = $1::uuid

-- :name status : where a letter stands
SELECT l.status, l.revision FROM soma.dead_letters l WHERE l.letter_id = $1::uuid

-- :name edit : another value for an open letter; no row: it is settled, or of another revision
WITH edited AS (
    UPDATE soma.dead_letters l
    SET edited_value = $2::bytea, edited_by = $3::text, edited_at = soma.now(), revision = l.revision + 1,
        changed_at = soma.now()
    WHERE l.letter_id = $1::uuid AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
      AND l.revision = coalesce($5::integer, l.revision)
    RETURNING l.letter_id, l.revision
), noted AS (
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why, value)
    SELECT letter_id, soma.now(), $3::text, 'edited', $4::text, $2::bytea FROM edited
)
SELECT revision FROM edited

-- :name discard : give a letter up; its status before, or that the relay is sending it. That of a saga goes with the saga
SELECT CASE WHEN EXISTS (SELECT FROM soma.dead_letters l WHERE l.letter_id = $1::uuid AND l.partition = -2) THEN 'saga'
            ELSE soma.discard_any($1::uuid, $2::text, $3::text) END

-- :name history : what was done with a letter, oldest first
SELECT h.at, h.who, h.what, h.why, h.value FROM soma.dead_letter_history h
WHERE h.letter_id = $1::uuid ORDER BY h.history_id

-- :name gauges : open letters by consumer and status, and the age of the oldest in seconds
SELECT c.name, g.status, g.count, extract(epoch FROM soma.now() - g.oldest)::float8
FROM (
    SELECT l.consumer_id, l.status, count(*) AS count, min(l.parked_at) AS oldest FROM soma.dead_letters l
    WHERE l.status IN ('retrying', 'blocked', 'dead', 'redriving')
    GROUP BY l.consumer_id, l.status
) g JOIN soma.consumers c USING (consumer_id)

-- :name exists : whether a record has a letter
SELECT 1 FROM soma.dead_letters l
WHERE l.consumer_id = (SELECT n.consumer_id FROM soma.consumers n WHERE n.name = $1::text)
  AND l.topic = $2::text AND l.partition = $3::integer AND l.record_offset = $4::bigint AND l.digest = $5::bytea

-- :name outcomes : what became of letters, in the order in which it did; and whether their sequence stands still
SELECT l.letter_id, l.status, l.fingerprint,
       EXISTS (SELECT FROM soma.dead_sequences d WHERE d.consumer_id = l.consumer_id AND d.sequence = l.sequence
                 AND (d.next_at IS NULL OR d.next_at > (SELECT soma.now())))
FROM soma.dead_letters l WHERE l.letter_id = ANY ($1::uuid[]) ORDER BY l.changed_at

-- :name mirror : a copy of a letter on its way to Kafka, in the letter's transaction; its position is drawn under the lock of
-- the sequence, so copies of a sequence go in its order
INSERT INTO soma.outbox (position, xid, slot, shard, key_hash, topic, key, event_id, event_type, version, "timestamp", value,
                         headers)
SELECT p.position, pg_current_xact_id(), soma.outbox_slot(p.position), ($2::integer & 7)::smallint, $2::integer, $1::text,
       $3::bytea, $4::uuid, $5::text, 0, soma.now(), $6::bytea, $7::text
FROM (SELECT nextval('soma.event_position') AS position) p
