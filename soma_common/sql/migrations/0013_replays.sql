-- Replays: one row per run, with its cursor. The runtime role writes through the functions only, so that who asked for
-- a run, and why, cannot be changed afterwards.

-- Events with a timestamp before the horizon may have lost their inbox row. Whoever deletes from the inbox commits a
-- new horizon first: a replay that finds a row gone then sees the horizon too.
ALTER TABLE soma.consumers ADD COLUMN inbox_horizon timestamptz;

CREATE TABLE soma.replays (
    run_id         uuid PRIMARY KEY,
    consumer_id    integer NOT NULL REFERENCES soma.consumers,
    inbox_id       integer NOT NULL REFERENCES soma.consumers, -- whose inbox it fills; another one in a rebuild
    mode           text NOT NULL CHECK (mode IN ('missing', 'rebuild', 'force')),
    source         text NOT NULL CHECK (source IN ('log', 'kafka')),
    filter         json NOT NULL,
    since          timestamptz,
    state          text NOT NULL DEFAULT 'planned'
                   CHECK (state IN ('planned', 'running', 'paused', 'cancelled', 'done', 'failed')),
    epoch          bigint NOT NULL DEFAULT 0,     -- rises with every claim: a former process's batch is refused
    owner          uuid,                          -- the process that is at it, by a random number
    leased_until   timestamptz NOT NULL DEFAULT '-infinity',
    end_tick       bigint NOT NULL,
    end_token      bigint NOT NULL,
    first_position bigint NOT NULL,
    last_position  bigint NOT NULL,
    from_tick      bigint NOT NULL DEFAULT 0,
    from_token     bigint NOT NULL DEFAULT 0,
    to_tick        bigint,
    to_token       bigint,
    after_position bigint NOT NULL DEFAULT 0,
    read           bigint NOT NULL DEFAULT 0,
    applied        bigint NOT NULL DEFAULT 0,
    repeated       bigint NOT NULL DEFAULT 0,
    skipped        bigint NOT NULL DEFAULT 0,
    held           bigint NOT NULL DEFAULT 0,
    rate           double precision CHECK (rate > 0),
    requested_by   text NOT NULL,
    reason         text NOT NULL,
    error          text,
    created_at     timestamptz NOT NULL,
    started_at     timestamptz,
    ended_at       timestamptz,
    CHECK ((to_tick IS NULL) = (to_token IS NULL)),
    CONSTRAINT replays_audit_check CHECK (mode <> 'force' OR (requested_by <> '' AND reason <> ''))
) WITH (fillfactor = 50);
CREATE INDEX replays_consumer_idx ON soma.replays (consumer_id, created_at);

-- Records a run. Its row in soma.shards keeps the end tick from being merged away while the run is open.
CREATE FUNCTION soma.open_replay(
    p_run uuid, p_consumer integer, p_inbox integer, p_mode text, p_source text, p_filter json, p_since timestamptz,
    p_end_tick bigint, p_end_token bigint, p_first bigint, p_last bigint, p_rate double precision, p_by text,
    p_reason text
) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    INSERT INTO soma.shards (reader, shard, from_tick, from_token)
    VALUES ('replay:' || p_run, 0, p_end_tick, p_end_token);
    INSERT INTO soma.replays (run_id, consumer_id, inbox_id, mode, source, filter, since, end_tick, end_token,
                              first_position, last_position, rate, requested_by, reason, created_at)
    VALUES (p_run, p_consumer, p_inbox, p_mode, p_source, p_filter, p_since, p_end_tick, p_end_token, p_first, p_last,
            p_rate, p_by, p_reason, soma.now())
$$;

-- Takes a run that nobody else is at; the new epoch, null when somebody is, or when it is over.
-- Waits for a batch that is being committed.
CREATE FUNCTION soma.claim_replay(p_run uuid, p_owner uuid, p_lease interval) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE soma.replays r
    SET state = 'running', owner = p_owner, epoch = r.epoch + 1, leased_until = soma.now() + p_lease, error = NULL, ended_at = NULL,
        started_at = coalesce(r.started_at, soma.now())
    WHERE r.run_id = p_run
      AND (r.state = 'planned' OR (r.state = 'running' AND (r.leased_until <= soma.now() OR r.owner = p_owner)))
    RETURNING r.epoch
$$;

-- Keeps (or with '0' gives up) the lease; whether the run is still the caller's.
CREATE FUNCTION soma.renew_replay(p_run uuid, p_epoch bigint, p_lease interval) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH renewed AS (
        UPDATE soma.replays r SET leased_until = soma.now() + p_lease
        WHERE r.run_id = p_run AND r.epoch = p_epoch AND r.state = 'running' RETURNING 1
    )
    SELECT EXISTS (SELECT FROM renewed)
$$;

-- Moves a run's cursor in the transaction of its batch; false when the run is not the caller's any more, was paused or
-- cancelled, or would go behind the inbox's horizon.
CREATE FUNCTION soma.save_replay(
    p_run uuid, p_epoch bigint, p_lease interval, p_from_tick bigint, p_from_token bigint, p_to_tick bigint,
    p_to_token bigint, p_position bigint, p_read bigint, p_applied bigint, p_repeated bigint, p_skipped bigint,
    p_held bigint
) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH saved AS (
        UPDATE soma.replays r
        SET leased_until = soma.now() + p_lease, from_tick = p_from_tick, from_token = p_from_token,
            to_tick = p_to_tick, to_token = p_to_token, after_position = p_position, read = r.read + p_read,
            applied = r.applied + p_applied, repeated = r.repeated + p_repeated, skipped = r.skipped + p_skipped,
            held = r.held + p_held
        WHERE r.run_id = p_run AND r.epoch = p_epoch AND r.state = 'running'
          AND (r.mode <> 'missing' OR NOT EXISTS (
              SELECT FROM soma.consumers c
              WHERE c.consumer_id = r.inbox_id AND c.inbox_horizon > coalesce(r.since, '-infinity')))
        RETURNING 1
    )
    SELECT EXISTS (SELECT FROM saved)
$$;

-- Turns a run from one of some states to another, under an epoch (null: under any); whether it did.
CREATE FUNCTION soma.turn_replay(p_run uuid, p_from text[], p_to text, p_epoch bigint, p_error text) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH turned AS (
        UPDATE soma.replays r
        SET state = p_to, error = p_error, leased_until = '-infinity',
            ended_at = CASE WHEN p_to IN ('done', 'cancelled', 'failed') THEN soma.now() END
        WHERE r.run_id = p_run AND r.state = ANY (p_from) AND (p_epoch IS NULL OR r.epoch = p_epoch)
        RETURNING 1
    ), freed AS (
        DELETE FROM soma.shards s USING turned
        WHERE s.reader = 'replay:' || p_run AND p_to IN ('done', 'cancelled')
    )
    SELECT EXISTS (SELECT FROM turned)
$$;

-- The horizon moves forward only.
CREATE FUNCTION soma.raise_inbox_horizon(p_consumer integer, p_horizon timestamptz) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE soma.consumers SET inbox_horizon = greatest(inbox_horizon, p_horizon) WHERE consumer_id = p_consumer
$$;

REVOKE EXECUTE ON FUNCTION
    soma.open_replay(uuid, integer, integer, text, text, json, timestamptz, bigint, bigint, bigint, bigint,
                     double precision, text, text),
    soma.claim_replay(uuid, uuid, interval), soma.renew_replay(uuid, bigint, interval),
    soma.save_replay(uuid, bigint, interval, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint, bigint,
                     bigint),
    soma.turn_replay(uuid, text[], text, bigint, text), soma.raise_inbox_horizon(integer, timestamptz) FROM PUBLIC;
