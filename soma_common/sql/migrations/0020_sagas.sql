-- Sagas: where each stands, and its journal (decision 0014).

-- Definitions that workers have, or had. type_id is made of name and version (sagas/models.py), so that a saga can be
-- started by somebody who asks nobody. shape: the kinds and names of the parts, in order. pivots: names of steps.
CREATE TABLE soma.saga_types (
    type_id     bigint PRIMARY KEY,
    name        text NOT NULL,
    version     integer NOT NULL CHECK (version > 0),
    fingerprint text NOT NULL,
    shape       json NOT NULL,
    pivots      text[] NOT NULL,
    seen_at     timestamptz NOT NULL,             -- when a worker last registered it
    UNIQUE (name, version)
);

-- One row per saga. A worker that has it is its owner; what it writes is fenced by the epoch, which rises with every
-- claim. wake_at: of a saga without owner, when it is due (null: it ended, or is stuck); of an owned one, when its lease
-- ends. asked: what a person wants of it. reason: the step because of which it turned or is stuck.
CREATE TABLE soma.sagas (
    saga_id        uuid PRIMARY KEY,
    type_id        bigint NOT NULL,
    name           text NOT NULL,
    version        integer NOT NULL,
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
    reason         text,
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
    stack      text,                              -- of a failure for good
    who        text,                              -- of what people did
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
    IF TG_OP = 'DELETE' AND current_setting('soma.forgetting', true) = 'on' THEN  -- soma.forget_sagas
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'the journal of a saga is written once' USING ERRCODE = 'SC010';
END $$;
CREATE TRIGGER journal_is_insert_only BEFORE UPDATE OR DELETE ON soma.saga_steps
    FOR EACH STATEMENT EXECUTE FUNCTION soma.refuse_journal_change();

-- Takes sagas that are due, of each type as many as there is room for: urgent ones first, then those that wait longest.
-- In two statements, and planned once: to look, and find nothing, is what idle workers do all the time.
CREATE FUNCTION soma.claim_sagas(p_owner uuid, p_types bigint[], p_rooms integer[], p_lease double precision)
RETURNS TABLE (saga_id uuid, type_id bigint, tenant_id text, status text, length integer, epoch bigint, claims integer,
               was_owned boolean, signals integer, asked text, left_seconds double precision, input json,
               correlation_id text, traceparent text, tracestate text)
LANGUAGE plpgsql VOLATILE SET plan_cache_mode = 'force_generic_plan' AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := soma.now();
    v_end timestamptz := v_now + make_interval(secs => p_lease);
    v_due uuid[];
BEGIN
    FOR n IN 1 .. cardinality(p_types) LOOP
        v_due := ARRAY(
            SELECT d.saga_id
            FROM generate_series(1, 5) AS p (priority)
            CROSS JOIN LATERAL (
                SELECT s.saga_id FROM soma.sagas s
                WHERE s.type_id = p_types[n] AND s.priority = p.priority AND s.owner IS NULL AND s.wake_at <= v_now
                ORDER BY s.wake_at LIMIT p_rooms[n] FOR UPDATE SKIP LOCKED) AS d
            LIMIT p_rooms[n]);
        CONTINUE WHEN cardinality(v_due) = 0;
        RETURN QUERY
        UPDATE soma.sagas s
        SET owner = p_owner, epoch = s.epoch + 1, wake_at = v_end, claims = s.claims + 1,
            status = CASE s.status WHEN 'pending' THEN 'running' ELSE s.status END
        WHERE s.saga_id = ANY (v_due)
        RETURNING s.saga_id, s.type_id, s.tenant_id, s.status, s.length, s.epoch, s.claims, false, s.signals, s.asked,
                  extract(epoch FROM s.deadline - v_now)::double precision, s.input, s.correlation_id, s.traceparent,
                  s.tracestate;
    END LOOP;
END $$;

-- The same for sagas whose owner fell silent. Apart: there are none, mostly, and then this reads one entry of an index.
-- A lease that has ended is taken over; so is one that ends too far ahead to be one (the clock was set back).
-- p_suspects: only those that were claimed p_patience times without progress, instead of all others.
CREATE FUNCTION soma.take_over_sagas(
    p_owner uuid, p_types bigint[], p_room integer, p_lease double precision, p_patience integer, p_suspects boolean
) RETURNS TABLE (saga_id uuid, type_id bigint, tenant_id text, status text, length integer, epoch bigint, claims integer,
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

-- Letters. A saga that is stuck has one that is open, a saga that is not has none: a trigger writes and settles them in
-- the transaction that changes the saga, so that the two cannot differ.

CREATE FUNCTION soma.saga_was_stuck() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_consumer integer;
    v_letter   uuid := gen_random_uuid();
    v_who      text := coalesce(nullif(current_setting('soma.who', true), ''), 'sagas');
    v_key      bytea := convert_to(NEW.saga_id::text, 'UTF8');
    v_stage    text := CASE WHEN EXISTS (SELECT FROM soma.saga_steps j WHERE j.saga_id = NEW.saga_id AND j.what = 'turned')
                            THEN 'undo' ELSE 'handle' END;
BEGIN
    INSERT INTO soma.consumers (name) VALUES ('saga:' || NEW.name) ON CONFLICT (name) DO NOTHING;
    SELECT c.consumer_id INTO v_consumer FROM soma.consumers c WHERE c.name = 'saga:' || NEW.name;
    INSERT INTO soma.dead_letters (
        letter_id, consumer_id, sequence, status, topic, partition, record_offset, record_key, value, header_names,
        header_values, record_time, digest, event_id, event_type, tenant_id, idempotency_key, trace_id, stage,
        error_type, error_message, error_stack, fingerprint, attempts, automatic_left, parked_at, changed_at)
    VALUES (
        v_letter, v_consumer, 's'::bytea || v_key, 'dead', 'saga:' || NEW.name, -2, NEW.length, v_key,
        convert_to(NEW.input::text, 'UTF8'), ARRAY['saga_id', 'version', 'step']::bytea[],
        ARRAY[v_key, convert_to(NEW.version::text, 'UTF8'), convert_to(coalesce(NEW.reason, ''), 'UTF8')],
        NEW.created_at, sha256(v_key), NEW.saga_id, NEW.name, NEW.tenant_id, NEW.saga_key,
        split_part(NEW.traceparent, '-', 2)::uuid, v_stage, NEW.error_type, left(NEW.error, 1000),
        (SELECT j.stack FROM soma.saga_steps j WHERE j.saga_id = NEW.saga_id AND j.stack IS NOT NULL
         ORDER BY j.number DESC LIMIT 1),
        left(encode(sha256(convert_to(concat_ws(chr(1), v_stage, NEW.name, NEW.reason, NEW.error_type), 'UTF8')), 'hex'), 16),
        1, 0, soma.now(), soma.now());
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
    VALUES (v_letter, soma.now(), v_who, 'dead', left(NEW.error, 500));
    RETURN NULL;
END $$;
CREATE TRIGGER saga_was_stuck AFTER UPDATE ON soma.sagas
    FOR EACH ROW WHEN (NEW.status = 'stuck' AND OLD.status <> 'stuck') EXECUTE FUNCTION soma.saga_was_stuck();

CREATE FUNCTION soma.saga_was_freed() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
    WITH settled AS (
        UPDATE soma.dead_letters l SET status = 'resolved', changed_at = soma.now()
        WHERE l.event_id = NEW.saga_id AND l.partition = -2 AND l.status = 'dead'
        RETURNING l.letter_id
    )
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
    SELECT s.letter_id, soma.now(), coalesce(nullif(current_setting('soma.who', true), ''), 'sagas'), 'resolved',
           nullif(current_setting('soma.why', true), '')
    FROM settled s;
    RETURN NULL;
END $$;
CREATE TRIGGER saga_was_freed AFTER UPDATE ON soma.sagas
    FOR EACH ROW WHEN (OLD.status = 'stuck' AND NEW.status <> 'stuck') EXECUTE FUNCTION soma.saga_was_freed();

-- What people do. Each writes an entry with who and why, and wakes the saga. They return its status before; null: there
-- is no such saga.

-- Adds an entry of a person to the journal of a saga whose row is locked.
CREATE FUNCTION soma.write_saga_entry(
    p_saga uuid, p_step text, p_what text, p_result json, p_error text, p_who text, p_why text
) RETURNS void
LANGUAGE sql VOLATILE AS $$
    WITH saga AS (
        UPDATE soma.sagas s SET length = s.length + 1 WHERE s.saga_id = p_saga RETURNING s.saga_id, s.length, s.epoch
    )
    INSERT INTO soma.saga_steps (saga_id, number, step, what, attempt, at, epoch, result, error_type, error, who, why)
    SELECT saga_id, length, p_step, p_what,
           coalesce((SELECT max(j.attempt) FROM soma.saga_steps j WHERE j.saga_id = p_saga AND j.step = p_step), 0),
           soma.now(), epoch, p_result, CASE WHEN p_error IS NOT NULL THEN 'Resolved' END, p_error, p_who, p_why
    FROM saga
$$;

-- A stuck saga goes on at the step because of which it is. p_verb: retry: that step is tried again. skip: it is passed
-- over. done: it did happen, with a result. failed: it did not.
CREATE FUNCTION soma.unstick_saga(p_saga uuid, p_verb text, p_result json, p_who text, p_why text) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_saga   soma.sagas;
    v_turned boolean;
    v_what   text;
    v_reason text;                                -- because of which it turned
    v_failed record;
BEGIN
    SELECT * INTO v_saga FROM soma.sagas s WHERE s.saga_id = p_saga FOR UPDATE;
    IF NOT FOUND OR v_saga.status <> 'stuck' THEN
        RETURN v_saga.status;
    END IF;
    IF v_saga.reason IS NULL AND p_verb <> 'retry' THEN
        RETURN 'no-step';
    END IF;
    v_turned := EXISTS (SELECT FROM soma.saga_steps j WHERE j.saga_id = p_saga AND j.what = 'turned');
    v_what := CASE p_verb WHEN 'retry' THEN 'retry' WHEN 'failed' THEN 'failed'
                          WHEN 'skip' THEN CASE WHEN v_turned THEN 'undo-skipped' ELSE 'skipped' END
                          ELSE CASE WHEN v_turned THEN 'undone' ELSE 'done' END END;
    IF p_verb = 'failed' AND v_turned THEN
        RETURN 'turned';
    END IF;
    PERFORM soma.write_saga_entry(p_saga, coalesce(v_saga.reason, ''), v_what,
                                  CASE WHEN v_what = 'done' THEN coalesce(p_result, 'null') END,
                                  CASE WHEN p_verb = 'failed' THEN 'it did not happen' END, p_who, p_why);
    SELECT j.why INTO v_reason FROM soma.saga_steps j WHERE j.saga_id = p_saga AND j.what = 'turned';
    SELECT j.error_type, j.error INTO v_failed FROM soma.saga_steps j
    WHERE j.saga_id = p_saga AND j.step = v_reason AND j.what IN ('failed', 'unknown') ORDER BY j.number DESC LIMIT 1;
    PERFORM set_config('soma.who', p_who, true), set_config('soma.why', coalesce(p_why, ''), true);
    UPDATE soma.sagas s
    SET status = CASE WHEN v_turned THEN 'compensating' ELSE 'running' END, wake_at = soma.now(), claims = 0,
        reason = v_reason, error_type = v_failed.error_type, error = v_failed.error
    WHERE s.saga_id = p_saga;
    PERFORM set_config('soma.who', '', true), set_config('soma.why', '', true);
    RETURN 'stuck';
END $$;

-- Asks a saga to turn around. Returns its status before; 'pivot': it is behind its pivot.
CREATE FUNCTION soma.ask_saga(p_saga uuid, p_asked text, p_who text, p_why text) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_saga soma.sagas;
BEGIN
    SELECT * INTO v_saga FROM soma.sagas s WHERE s.saga_id = p_saga FOR UPDATE;
    IF NOT FOUND OR v_saga.status NOT IN ('pending', 'running', 'stuck') THEN
        RETURN v_saga.status;
    END IF;
    IF EXISTS (SELECT FROM soma.saga_steps j WHERE j.saga_id = p_saga AND j.what = 'turned') THEN
        RETURN 'turned';
    END IF;
    IF EXISTS (SELECT FROM soma.saga_steps j JOIN soma.saga_types t ON t.type_id = v_saga.type_id
               WHERE j.saga_id = p_saga AND j.what IN ('done', 'skipped')
                 AND reverse(split_part(reverse(j.step), '/', 1)) = ANY (t.pivots)) THEN
        RETURN 'pivot';
    END IF;
    IF v_saga.asked IS NOT DISTINCT FROM p_asked AND v_saga.status <> 'stuck' THEN
        RETURN 'asked';
    END IF;
    PERFORM soma.write_saga_entry(p_saga, '', p_asked, NULL, NULL, p_who, p_why);
    PERFORM set_config('soma.who', p_who, true), set_config('soma.why', coalesce(p_why, ''), true);
    UPDATE soma.sagas s
    SET asked = p_asked, status = CASE s.status WHEN 'stuck' THEN 'running' ELSE s.status END,
        wake_at = CASE WHEN s.owner IS NULL THEN soma.now() ELSE s.wake_at END, claims = 0
    WHERE s.saga_id = p_saga;
    PERFORM set_config('soma.who', '', true), set_config('soma.why', '', true);
    RETURN v_saga.status;
END $$;

-- Letters of sagas among those that are to be tried again: the verb retry of their sagas. Returns those that changed.
CREATE FUNCTION soma.retry_letters_of_sagas(p_letters uuid[], p_who text, p_why text) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_letter record;
BEGIN
    FOR v_letter IN
        SELECT l.letter_id, l.event_id FROM soma.dead_letters l
        WHERE l.letter_id = ANY (p_letters) AND l.partition = -2 AND l.status = 'dead' ORDER BY l.event_id
    LOOP
        IF soma.unstick_saga(v_letter.event_id, 'retry', NULL, p_who, coalesce(p_why, 'its letter was retried')) = 'stuck' THEN
            RETURN NEXT v_letter.letter_id;
        END IF;
    END LOOP;
END $$;

-- Removes sagas that ended before a moment, with all that belongs to them, the oldest first; how many.
CREATE FUNCTION soma.forget_sagas(p_before timestamptz, p_most integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_sagas uuid[] := ARRAY(SELECT s.saga_id FROM soma.sagas s WHERE s.ended_at < p_before
                            ORDER BY s.saga_id LIMIT p_most FOR UPDATE SKIP LOCKED);
BEGIN
    PERFORM set_config('soma.forgetting', 'on', true);
    DELETE FROM soma.saga_signals n WHERE n.saga_id = ANY (v_sagas);
    DELETE FROM soma.saga_steps j WHERE j.saga_id = ANY (v_sagas);
    DELETE FROM soma.sagas s WHERE s.saga_id = ANY (v_sagas);
    PERFORM set_config('soma.forgetting', '', true);
    RETURN cardinality(v_sagas);
END $$;
REVOKE EXECUTE ON FUNCTION soma.forget_sagas(timestamptz, integer) FROM PUBLIC;

-- What transactional steps of sagas did that another engine drives: it may call one twice. The row commits with the
-- effect itself; whoever comes second waits for it, and is told what the first one came to.
CREATE TABLE soma.step_effects (
    key     text PRIMARY KEY,
    attempt integer NOT NULL,                     -- the last one that may have worked under this key
    result  json,                                 -- null: that attempt and those before it were given up
    at      timestamptz NOT NULL
);
CREATE INDEX step_effects_at_idx ON soma.step_effects USING brin (at);

-- As before, and sagas. Journals are written, and never changed.
CREATE OR REPLACE FUNCTION soma.grant_runtime(p_role name) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT INSERT ON soma.events, soma.outbox TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE ON soma.streams, soma.shards, soma.workers, soma.consumer_offsets, '
                   'soma.consumers TO %I', p_role);
    EXECUTE format('GRANT INSERT, DELETE ON soma.idempotency_keys, soma.inbox, soma.inbox_keys, soma.outbox_parked, '
                   'soma.workers TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON soma.consumer_lanes, soma.consumer_claims, '
                   'soma.consumer_attempts TO %I', p_role);
    EXECUTE format('GRANT INSERT ON soma.ticks, soma.dead_letters, soma.dead_letter_history TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON soma.dead_sequences TO %I', p_role);
    EXECUTE format('GRANT UPDATE (status, stage, error_type, error_message, error_stack, fingerprint, attempts, next_at, '
                   'automatic_left, edited_value, edited_by, edited_at, revision, changed_at) '
                   'ON soma.dead_letters TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE ON soma.sagas, soma.saga_types TO %I', p_role);
    EXECUTE format('GRANT INSERT ON soma.saga_steps, soma.saga_signals TO %I', p_role);
    EXECUTE format('GRANT UPDATE (taken) ON soma.saga_signals TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON soma.step_effects TO %I', p_role);
    EXECUTE format('GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA soma TO %I', p_role);
    EXECUTE format('REVOKE EXECUTE ON FUNCTION soma.repair(), soma.grant_runtime(name), '
                   'soma.forget_sagas(timestamptz, integer) FROM %I', p_role);
END $$;
