-- Steps whose saga is driven by Temporal.

-- :name begin : claim a step for an attempt; no row where an earlier one did it, or this one was given up
INSERT INTO soma.step_effects AS e (key, attempt, at) VALUES ($1::text, $2::integer, soma.now())
ON CONFLICT (key) DO UPDATE SET attempt = excluded.attempt, at = excluded.at
    WHERE e.result IS NULL AND e.attempt < excluded.attempt
RETURNING e.key

-- :name result : what an earlier attempt came to; null where this one was given up
SELECT e.result::text FROM soma.step_effects e WHERE e.key = $1::text

-- :name keep : the outcome, in the transaction of the effect
UPDATE soma.step_effects SET result = $2::json WHERE key = $1::text

-- :name settle : find out whether a step was done; from now on this attempt, and those before it, do nothing more
INSERT INTO soma.step_effects AS e (key, attempt, at) VALUES ($1::text, $2::integer, soma.now())
ON CONFLICT (key) DO UPDATE SET attempt = greatest(e.attempt, excluded.attempt)
RETURNING e.result::text

-- :name forget : the oldest outcomes from before a moment, so many at once
WITH old AS (
    SELECT o.key FROM soma.step_effects o WHERE o.at < soma.now() - make_interval(secs => $1::float8)
    LIMIT $2::integer FOR UPDATE SKIP LOCKED
)
DELETE FROM soma.step_effects e USING old WHERE e.key = old.key
RETURNING 1
