-- Sagas: where each stands, and its journal (decision 0014).

-- Definitions that sagas were started with. shape: the kinds and names of the parts, in order.
CREATE TABLE soma.saga_types (
    type_id     integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text NOT NULL,
    version     integer NOT NULL CHECK (version > 0),
    fingerprint text NOT NULL,
    shape       json NOT NULL,
    first_seen  timestamptz NOT NULL,
    UNIQUE (name, version)
);

-- One row per saga. A worker that has it is its owner; what it writes is fenced by the epoch, which rises with every
-- claim. wake_at: of a saga without owner, when it is due (null: it ended, or is stuck); of an owned one, when its lease
-- ends. type_id refers to soma.saga_types without a foreign key, whose locks every start would pay for.
CREATE TABLE soma.sagas (
    saga_id        uuid PRIMARY KEY,
    type_id        integer NOT NULL,
    name           text NOT NULL,
    tenant_id      text NOT NULL,
    saga_key       text,
    status         text NOT NULL
                   CHECK (status IN ('pending', 'running', 'compensating', 'completed', 'compensated', 'stuck')),
    priority       smallint NOT NULL CHECK (priority BETWEEN 1 AND 5),
    length         integer NOT NULL DEFAULT 0,    -- entries of its journal
    epoch          bigint NOT NULL DEFAULT 0,
    owner          uuid,
    wake_at        timestamptz,
    claims         integer NOT NULL DEFAULT 0,    -- since something was written, or it was given back in good order
    signals        integer NOT NULL DEFAULT 0,    -- how many came
    asked          text CHECK (asked IN ('compensate', 'cancel')),
    deadline       timestamptz NOT NULL,
    input          json NOT NULL,
    result         json,
    error_type     text,
    error          text,
    correlation_id text NOT NULL,
    traceparent    text NOT NULL,
    tracestate     text,
    created_at     timestamptz NOT NULL,
    ended_at       timestamptz,
    CHECK (owner IS NULL OR wake_at IS NOT NULL)
) WITH (fillfactor = 60);
-- Every row is in one of these two at most: to claim it moves an entry, and costs no second one.
CREATE INDEX sagas_due_idx    ON soma.sagas (type_id, priority, wake_at) WHERE owner IS NULL AND wake_at IS NOT NULL;
CREATE INDEX sagas_leased_idx ON soma.sagas (wake_at) WHERE owner IS NOT NULL;
CREATE UNIQUE INDEX sagas_key_idx ON soma.sagas (tenant_id, name, saga_key) WHERE saga_key IS NOT NULL;
CREATE INDEX sagas_status_idx ON soma.sagas (status, saga_id) WHERE status NOT IN ('completed', 'compensated');
CREATE INDEX sagas_correlation_idx ON soma.sagas (correlation_id);

-- The journals. Insert-only.
CREATE TABLE soma.saga_steps (
    saga_id    uuid NOT NULL,
    number     integer NOT NULL,                  -- from 1
    step       text NOT NULL,                     -- its path; empty for the whole saga
    what       text NOT NULL,
    attempt    integer NOT NULL,
    at         timestamptz NOT NULL,
    due        timestamptz,
    took       double precision,                  -- seconds
    epoch      bigint NOT NULL,
    result     json,
    error_type text,
    error      text,
    who        text,
    why        text,
    PRIMARY KEY (saga_id, number)
);

-- What came for a saga. Each is taken once, in the order in which they came (number).
CREATE TABLE soma.saga_signals (
    saga_id   uuid NOT NULL,
    signal_id text NOT NULL,
    number    integer NOT NULL,
    name      text NOT NULL,
    payload   json NOT NULL,
    at        timestamptz NOT NULL,
    who       text,
    taken     integer,                            -- the entry of the journal that took it
    PRIMARY KEY (saga_id, signal_id)
);

CREATE FUNCTION soma.refuse_journal_change() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the journal of a saga is written once' USING ERRCODE = 'SC010';
END $$;
CREATE TRIGGER journal_is_insert_only BEFORE UPDATE OR DELETE ON soma.saga_steps
    FOR EACH STATEMENT EXECUTE FUNCTION soma.refuse_journal_change();

-- Takes sagas that are due, of each type as many as there is room for: urgent ones first, then those that wait longest.
-- A lease that has ended is taken over; so is one that ends too far ahead to be one (the clock was set back).
-- p_suspects: only those that were claimed p_patience times without progress, instead of all others.
CREATE FUNCTION soma.claim_sagas(
    p_owner uuid, p_types integer[], p_rooms integer[], p_lease double precision, p_patience integer, p_suspects boolean
) RETURNS TABLE (saga_id uuid, type_id integer, tenant_id text, status text, length integer, epoch bigint, claims integer,
                 was_owned boolean, signals integer, asked text, left_seconds double precision, input json,
                 correlation_id text, traceparent text, tracestate text)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := soma.now();
    v_end timestamptz := v_now + make_interval(secs => p_lease);
BEGIN
    FOR n IN 1 .. cardinality(p_types) LOOP
        RETURN QUERY
        WITH due AS MATERIALIZED (
            SELECT d.saga_id, false AS owned
            FROM generate_series(1, 5) AS p (priority)
            CROSS JOIN LATERAL (
                SELECT s.saga_id FROM soma.sagas s
                WHERE s.type_id = p_types[n] AND s.priority = p.priority AND s.owner IS NULL AND s.wake_at <= v_now
                  AND (s.claims >= p_patience) = p_suspects
                ORDER BY s.wake_at LIMIT p_rooms[n] FOR UPDATE SKIP LOCKED) AS d
            LIMIT p_rooms[n]
        )
        UPDATE soma.sagas s
        SET owner = p_owner, epoch = s.epoch + 1, wake_at = v_end, claims = s.claims + 1,
            status = CASE s.status WHEN 'pending' THEN 'running' ELSE s.status END
        FROM due WHERE s.saga_id = due.saga_id
        RETURNING s.saga_id, s.type_id, s.tenant_id, s.status, s.length, s.epoch, s.claims, due.owned, s.signals, s.asked,
                  extract(epoch FROM s.deadline - v_now)::double precision, s.input, s.correlation_id, s.traceparent,
                  s.tracestate;
    END LOOP;
END $$;

-- The same for sagas whose owner fell silent. Apart: there are none, mostly, and then this reads one entry of an index.
CREATE FUNCTION soma.take_over_sagas(
    p_owner uuid, p_types integer[], p_room integer, p_lease double precision, p_patience integer, p_suspects boolean
) RETURNS TABLE (saga_id uuid, type_id integer, tenant_id text, status text, length integer, epoch bigint, claims integer,
                 was_owned boolean, signals integer, asked text, left_seconds double precision, input json,
                 correlation_id text, traceparent text, tracestate text)
LANGUAGE sql VOLATILE AS $$
    WITH silent AS MATERIALIZED (
        SELECT s.saga_id FROM soma.sagas s
        WHERE s.owner IS NOT NULL AND s.wake_at <= (SELECT soma.now())  -- as a value: the index is of no use to a function
          AND s.type_id = ANY (p_types) AND (s.claims >= p_patience) = p_suspects
        ORDER BY s.wake_at LIMIT p_room FOR UPDATE SKIP LOCKED
    ), from_the_future AS MATERIALIZED (
        SELECT s.saga_id FROM soma.sagas s
        WHERE s.owner IS NOT NULL AND s.wake_at > (SELECT soma.now() + interval '20 minutes')
          AND s.type_id = ANY (p_types) AND (s.claims >= p_patience) = p_suspects
        LIMIT p_room FOR UPDATE SKIP LOCKED
    )
    UPDATE soma.sagas s
    SET owner = p_owner, epoch = s.epoch + 1, wake_at = soma.now() + make_interval(secs => p_lease), claims = s.claims + 1
    FROM (SELECT saga_id FROM silent UNION ALL SELECT saga_id FROM from_the_future LIMIT p_room) AS d
    WHERE s.saga_id = d.saga_id
    RETURNING s.saga_id, s.type_id, s.tenant_id, s.status, s.length, s.epoch, s.claims, true, s.signals, s.asked,
              extract(epoch FROM s.deadline - soma.now())::double precision, s.input, s.correlation_id, s.traceparent,
              s.tracestate
$$;
