-- Sagas and their journals.

-- :name register : make a type known. No target: of workers that do so at once, one may meet the other's name first,
-- another its number
INSERT INTO soma.saga_types (type_id, name, version, fingerprint, shape, pivots, seen_at)
VALUES ($1::bigint, $2::text, $3::integer, $4::text, $5::text::json, $6::text[], soma.now())
ON CONFLICT DO NOTHING

-- :name seen : that there is a worker for a type; the fingerprint that it was first seen with
UPDATE soma.saga_types t SET seen_at = soma.now() WHERE t.type_id = $1::bigint RETURNING t.fingerprint, t.shape::text, t.name

-- :name start : begin sagas; those whose key is known are not returned
INSERT INTO soma.sagas (saga_id, type_id, name, version, tenant_id, saga_key, status, priority, wake_at, deadline, input,
                        correlation_id, traceparent, tracestate, created_at)
SELECT g.saga_id, g.type_id, g.name, g.version, g.tenant_id, g.saga_key, 'pending', g.priority, n.now,
       n.now + make_interval(secs => g.deadline), g.input::json, g.correlation_id, g.traceparent, g.tracestate, n.now
FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::integer[], $5::text[], $6::text[], $7::smallint[], $8::float8[],
            $9::text[], $10::text[], $11::text[], $12::text[])
     AS g (saga_id, type_id, name, version, tenant_id, saga_key, priority, deadline, input, correlation_id, traceparent,
           tracestate)
CROSS JOIN (SELECT soma.now() AS now) AS n
ON CONFLICT (tenant_id, name, saga_key) WHERE saga_key IS NOT NULL DO NOTHING
RETURNING saga_id

-- :name by_keys : sagas that were started under these keys
SELECT k.ordinal, s.saga_id, s.input::text
FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS k (tenant_id, name, saga_key, ordinal)
JOIN soma.sagas s ON (s.tenant_id, s.name, s.saga_key) = (k.tenant_id, k.name, k.saga_key)
ORDER BY k.ordinal

-- :name claim : take sagas that are due
SELECT c.saga_id, c.type_id, c.tenant_id, c.status, c.length, c.epoch, c.claims, c.was_owned, c.signals, c.asked,
       c.left_seconds, c.input::text, c.correlation_id, c.traceparent, c.tracestate
FROM soma.claim_sagas($1::uuid, $2::bigint[], $3::integer[], $4::float8) AS c

-- :name take_over : take sagas whose owners fell silent
SELECT c.saga_id, c.type_id, c.tenant_id, c.status, c.length, c.epoch, c.claims, c.was_owned, c.signals, c.asked,
       c.left_seconds, c.input::text, c.correlation_id, c.traceparent, c.tracestate
FROM soma.take_over_sagas($1::uuid, $2::bigint[], $3::integer, $4::float8, $5::integer, $6::boolean) AS c

-- :name take_again : a new epoch of a saga that this worker has: what it may have under way will be refused. Waits for
-- a transaction that is just writing it
UPDATE soma.sagas s SET epoch = s.epoch + 1, wake_at = soma.now() + make_interval(secs => $4::float8)
WHERE s.saga_id = $1::uuid AND s.epoch = $2::bigint AND s.owner = $3::uuid
RETURNING s.saga_id, s.type_id, s.tenant_id, s.status, s.length, s.epoch, s.claims, true, s.signals, s.asked,
          extract(epoch FROM s.deadline - soma.now())::float8, s.input::text, s.correlation_id, s.traceparent, s.tracestate

-- :name hold : renew leases. What is not returned was lost, or is just being written (see held)
UPDATE soma.sagas s SET wake_at = soma.now() + make_interval(secs => $4::float8)
FROM (SELECT k.saga_id FROM soma.sagas k
      JOIN unnest($1::uuid[], $2::bigint[]) AS h (saga_id, epoch) ON k.saga_id = h.saga_id AND k.epoch = h.epoch
      WHERE k.owner = $3::uuid FOR UPDATE OF k SKIP LOCKED) AS h
WHERE s.saga_id = h.saga_id
RETURNING s.saga_id, s.asked, s.signals

-- :name held : of these, those that the worker still has
SELECT s.saga_id FROM soma.sagas s
JOIN unnest($1::uuid[], $2::bigint[]) AS h (saga_id, epoch) ON s.saga_id = h.saga_id AND s.epoch = h.epoch
WHERE s.owner = $3::uuid

-- :name leave : a worker ends. What it had in the middle of a step may be taken over at once
UPDATE soma.sagas s SET wake_at = soma.now() WHERE s.owner = $1::uuid

-- :name suspects : whether there are sagas that were claimed again and again without progress
SELECT EXISTS (
    SELECT FROM soma.sagas s WHERE s.claims >= $2::integer AND s.owner IS NOT NULL AND s.wake_at <= (SELECT soma.now())
      AND s.type_id = ANY ($1::bigint[]))

-- :name journal : entries of sagas, in order
SELECT j.saga_id, j.step, j.what, j.attempt, j.result::text, j.error_type, j.error,
       extract(epoch FROM j.due - soma.now())::float8
FROM soma.saga_steps j WHERE j.saga_id = ANY ($1::uuid[]) ORDER BY j.saga_id, j.number

-- :name record : write entries of sagas that this worker has, and how each goes on; what is not returned was lost: another
-- worker has it, or its journal has less than was written (a standby that lagged took over).
-- The commit waits for the disk, whatever the session's default is: what a step rests on is written before it begins.
-- A saga that is given back is due at once when somebody asked for something, or a signal came, that the worker has not seen
WITH held AS (
    UPDATE soma.sagas s
    SET length = s.length + g.entries, claims = 0, status = coalesce(g.status, s.status),
        owner = CASE WHEN g.kept THEN s.owner END,
        wake_at = CASE WHEN g.kept THEN s.wake_at
                       WHEN g.status IN ('completed', 'compensated', 'stuck') THEN NULL
                       WHEN s.asked IS DISTINCT FROM g.asked OR s.signals > g.signals THEN soma.now()
                       ELSE soma.now() + make_interval(secs => g.wake_in) END,
        result = coalesce(g.result::json, s.result),
        reason = CASE WHEN g.turns THEN g.reason ELSE s.reason END,
        error_type = CASE WHEN g.turns THEN g.error_type ELSE s.error_type END,
        error = CASE WHEN g.turns THEN g.error ELSE s.error END,
        ended_at = CASE WHEN g.status IN ('completed', 'compensated') THEN soma.now() ELSE s.ended_at END
    FROM unnest($1::uuid[], $2::bigint[], $3::integer[], $4::integer[], $5::text[], $6::boolean[], $7::float8[],
                $8::integer[], $9::text[], $10::text[], $11::boolean[], $12::text[], $13::text[], $14::text[]) WITH ORDINALITY
         AS g (saga_id, epoch, known, entries, status, kept, wake_in, signals, asked, result, turns, reason, error_type, error,
               ordinal)
    WHERE s.saga_id = g.saga_id AND s.epoch = g.epoch AND s.owner = $15::uuid AND s.length >= g.known
    RETURNING g.ordinal, s.saga_id, s.length - g.entries AS base, s.epoch, s.asked, s.signals
), written AS (
    INSERT INTO soma.saga_steps (saga_id, number, step, what, attempt, at, due, took, epoch, result, error_type, error,
                                 stack, why)
    SELECT h.saga_id, h.base + e.place, e.step, e.what, e.attempt, soma.now(),
           soma.now() + make_interval(secs => e.due_in), e.took, h.epoch, e.result::json, e.error_type, e.error, e.stack,
           e.why
    FROM unnest($16::bigint[], $17::integer[], $18::text[], $19::text[], $20::integer[], $21::float8[], $22::float8[],
                $23::text[], $24::text[], $25::text[], $26::text[], $27::text[])
         AS e (ordinal, place, step, what, attempt, due_in, took, result, error_type, error, stack, why)
    JOIN held h USING (ordinal)
)
SELECT h.ordinal, h.asked, h.signals, h.base, set_config('synchronous_commit', 'on', true) FROM held h

-- :name record_one : the same for one saga and one entry, and what follows from that (its name and why)
WITH held AS (
    UPDATE soma.sagas s
    SET length = s.length + CASE WHEN $26::text IS NULL THEN 1 ELSE 2 END, claims = 0, status = coalesce($4::text, s.status),
        owner = CASE WHEN $5::boolean THEN s.owner END,
        wake_at = CASE WHEN $5::boolean THEN s.wake_at
                       WHEN $4::text IN ('completed', 'compensated', 'stuck') THEN NULL
                       WHEN s.asked IS DISTINCT FROM $8::text OR s.signals > $7::integer THEN soma.now()
                       ELSE soma.now() + make_interval(secs => $6::float8) END,
        result = coalesce($9::text::json, s.result),
        reason = CASE WHEN $10::boolean THEN $11::text ELSE s.reason END,
        error_type = CASE WHEN $10::boolean THEN $12::text ELSE s.error_type END,
        error = CASE WHEN $10::boolean THEN $13::text ELSE s.error END,
        ended_at = CASE WHEN $4::text IN ('completed', 'compensated') THEN soma.now() ELSE s.ended_at END
    WHERE s.saga_id = $1::uuid AND s.epoch = $2::bigint AND s.owner = $14::uuid AND s.length >= $3::integer
    RETURNING s.saga_id, s.length - CASE WHEN $26::text IS NULL THEN 1 ELSE 2 END AS base, s.epoch, s.asked, s.signals
), written AS (
    INSERT INTO soma.saga_steps (saga_id, number, step, what, attempt, at, due, took, epoch, result, error_type, error,
                                 stack, why)
    SELECT h.saga_id, h.base + 1, $15::text, $16::text, $17::integer, soma.now(),
           soma.now() + make_interval(secs => $18::float8), $19::float8, h.epoch, $20::text::json, $21::text, $22::text,
           $23::text, $24::text FROM held h
    UNION ALL
    SELECT h.saga_id, h.base + 2, '', $26::text, 0, soma.now(), NULL, NULL, h.epoch, NULL, NULL, NULL, NULL,
           $25::text FROM held h WHERE $26::text IS NOT NULL
)
SELECT 1, h.asked, h.signals, h.base, set_config('synchronous_commit', 'on', true) FROM held h

-- :name next_signal : the first signal of a name that was not taken
SELECT n.signal_id, n.payload::text FROM soma.saga_signals n
WHERE n.saga_id = $1::uuid AND n.name = $2::text AND n.taken IS NULL ORDER BY n.number LIMIT 1

-- :name take_signal : it is taken by an entry of the journal; 0: it was refused
UPDATE soma.saga_signals n SET taken = $3::integer WHERE n.saga_id = $1::uuid AND n.signal_id = $2::text

-- :name signal : leave a signal for a saga; its status. The same signal twice is one. A choreography takes none
WITH saga AS (
    SELECT s.saga_id, s.status, s.version FROM soma.sagas s WHERE s.saga_id = $1::uuid FOR NO KEY UPDATE
), new AS (
    INSERT INTO soma.saga_signals (saga_id, signal_id, number, name, payload, at, who)
    SELECT g.saga_id, $2::text, 1 + (SELECT count(*) FROM soma.saga_signals k WHERE k.saga_id = g.saga_id), $3::text,
           $4::text::json, soma.now(), $5::text
    FROM saga g WHERE g.status NOT IN ('completed', 'compensated') AND g.version > 0
    ON CONFLICT (saga_id, signal_id) DO NOTHING
    RETURNING saga_id
), woken AS (
    UPDATE soma.sagas s SET signals = s.signals + 1,
        wake_at = CASE WHEN s.owner IS NULL AND s.status <> 'stuck' THEN soma.now() ELSE s.wake_at END
    FROM new WHERE s.saga_id = new.saga_id
)
SELECT g.status, EXISTS (SELECT FROM new), g.version FROM saga g

-- :name unstick : a stuck saga goes on
SELECT soma.unstick_saga($1::uuid, $2::text, $3::text::json, $4::text, $5::text)

-- :name ask : a saga is to turn around; no row, or null, where there is none. Nobody conducts a choreography
SELECT CASE s.version WHEN 0 THEN 'choreography' ELSE soma.ask_saga(s.saga_id, $2::text, $3::text, $4::text) END, s.name
FROM soma.sagas s WHERE s.saga_id = $1::uuid

-- :name ends : how sagas ended; those that are stuck, too
SELECT s.saga_id, s.name, s.version, s.status, s.result::text, s.reason, s.error_type, s.error
FROM soma.sagas s WHERE s.saga_id = ANY ($1::uuid[]) AND s.status IN ('completed', 'compensated', 'stuck')

-- :name status : of one saga
SELECT s.status, s.reason, s.name, s.version,
       EXISTS (SELECT FROM soma.saga_steps j WHERE j.saga_id = s.saga_id AND j.what = 'turned')
FROM soma.sagas s WHERE s.saga_id = $1::uuid

-- :name ended_before : sagas that can be forgotten; and whether that moment has not come yet
SELECT count(*), $1::timestamptz > soma.now() FROM soma.sagas s WHERE s.ended_at < $1::timestamptz

-- :name forget : remove so many of them, with all that belongs to them; how many
SELECT soma.forget_sagas($1::timestamptz, $2::integer)

-- :name known : definitions that workers have, or had
SELECT t.name, t.version, t.shape::text, t.seen_at FROM soma.saga_types t ORDER BY t.name, t.version

-- :name columns : a saga without its journal, as sagas/views.py reads it
SELECT s.saga_id, s.name, s.version, s.tenant_id, s.saga_key, s.status, s.priority, s.reason, s.error_type, s.error, s.asked,
       s.owner IS NOT NULL, EXISTS (SELECT FROM soma.saga_types t WHERE t.type_id = s.type_id), s.wake_at, s.deadline,
       s.created_at, s.ended_at, s.correlation_id, split_part(s.traceparent, '-', 2), s.length, l.step, l.what

-- :name content : the rest of it
, s.input::text, s.result::text

-- :name source : where sagas are, each with the last entry of its journal that is of a step
FROM soma.sagas s
LEFT JOIN LATERAL (SELECT j.step, j.what FROM soma.saga_steps j WHERE j.saga_id = s.saga_id AND j.step <> ''
                   ORDER BY j.number DESC LIMIT 1) AS l ON true

-- :name by_id : one saga
WHERE s.saga_id = $1::uuid

-- :name entries : the journal of a saga, as people see it
SELECT j.number, j.at, j.step, j.what, j.attempt, j.took, j.due, j.result::text, j.error_type, j.error, j.stack, j.who, j.why
FROM soma.saga_steps j WHERE j.saga_id = $1::uuid ORDER BY j.number

-- :name where_tenant_id : filter
s.tenant_id = $n::text
-- :name where_name : filter
s.name = $n::text
-- :name where_statuses : filter
s.status = ANY ($n::text[])
-- :name where_correlation_id : filter
s.correlation_id = $n::text
-- :name where_saga_key : filter
s.saga_key = $n::text
-- :name where_since : filter, inclusive
s.created_at >= $n::timestamptz
-- :name where_until : filter, exclusive
s.created_at < $n::timestamptz
-- :name where_before : keyset, newest first
s.saga_id < $n::uuid
-- :name newest_first : order; ids are made of the time
ORDER BY s.saga_id DESC LIMIT $n::integer
