-- The journals of choreographies: rows of soma.sagas that no worker claims (no owner, never due), and their entries.

-- :name open : the row of a choreography, locked until the transaction ends; made where there is none
WITH type AS (
    INSERT INTO soma.saga_types (type_id, name, version, fingerprint, shape, pivots, seen_at)
    VALUES ($2::bigint, 'choreography.' || $3::text, 1, '', '[]', '{}', soma.now())
    ON CONFLICT DO NOTHING
)
INSERT INTO soma.sagas AS s (saga_id, type_id, name, version, tenant_id, status, priority, deadline, input,
                             correlation_id, traceparent, tracestate, created_at)
VALUES ($1::uuid, $2::bigint, $3::text, 0, $4::text, 'running', 3, '9999-12-31 00:00:00+00', 'null', $5::text, $6::text,
        $7::text, soma.now())
ON CONFLICT (saga_id) DO UPDATE SET length = s.length
RETURNING s.length

-- :name entries : what its journal says, in order. Asked behind the lock: what others wrote meanwhile is seen
SELECT j.step, j.what FROM soma.saga_steps j WHERE j.saga_id = $1::uuid ORDER BY j.number

-- :name results : with what a step began, or what it gave
SELECT j.result::text FROM soma.saga_steps j
WHERE j.saga_id = $1::uuid AND j.step = $2::text AND j.what = $3::text ORDER BY j.number LIMIT 1

-- :name write : entries, and where it stands after them
WITH saga AS (
    UPDATE soma.sagas s
    SET length = s.length + cardinality($6::text[]), status = $2::text, reason = coalesce(s.reason, $3::text),
        error_type = coalesce(s.error_type, $4::text), error = coalesce(s.error, $5::text),
        ended_at = CASE WHEN $2::text IN ('completed', 'compensated') THEN soma.now() END
    WHERE s.saga_id = $1::uuid
    RETURNING s.saga_id, s.length - cardinality($6::text[]) AS base
)
INSERT INTO soma.saga_steps (saga_id, number, step, what, attempt, at, took, epoch, result, error_type, error, stack, who,
                             why)
SELECT s.saga_id, s.base + e.place, e.step, e.what, e.attempt, soma.now(), e.took, 0, e.result::json, e.error_type, e.error,
       e.stack, e.who, e.why
FROM saga s
CROSS JOIN unnest($6::text[], $7::text[], $8::integer[], $9::float8[], $10::text[], $11::text[], $12::text[], $13::text[],
                  $14::text[], $15::text[]) WITH ORDINALITY
     AS e (step, what, attempt, took, result, error_type, error, stack, who, why, place)
