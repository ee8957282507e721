-- Dead letters: events that a consumer could not apply, and the later events of their sequences (decision 0007).
-- Open letters are those that are retrying, blocked, dead or redriving.

CREATE TABLE soma.dead_letters (
    letter_id       uuid PRIMARY KEY,
    consumer_id     integer NOT NULL REFERENCES soma.consumers,
    sequence        bytea NOT NULL CHECK (octet_length(sequence) BETWEEN 1 AND 512),
    place           bigint GENERATED ALWAYS AS IDENTITY,    -- drawn under the lock of the sequence: its order
    status          text NOT NULL
                    CHECK (status IN ('retrying', 'blocked', 'dead', 'redriving', 'resolved', 'discarded')),
    stage           text CHECK (stage IN ('decode', 'validate', 'handle', 'publish', 'undo')),  -- null: never failed
    topic           text NOT NULL,
    partition       integer NOT NULL,
    record_offset   bigint NOT NULL,
    record_key      bytea,
    value           bytea,
    header_names    bytea[] NOT NULL,
    header_values   bytea[] NOT NULL,
    record_time     timestamptz,
    digest          bytea NOT NULL CHECK (octet_length(digest) = 32),
    event_id        uuid,
    event_type      text,
    tenant_id       text,
    service_id      text,
    idempotency_key text,
    trace_id        uuid,
    error_type      text CHECK (octet_length(error_type) <= 512),
    error_message   text CHECK (octet_length(error_message) <= 8192),
    error_stack     text CHECK (octet_length(error_stack) <= 8192),
    fingerprint     text,
    attempts        integer NOT NULL CHECK (attempts >= 0),
    next_at         timestamptz,
    automatic_left  integer NOT NULL CHECK (automatic_left >= 0),
    edited_value    bytea,
    edited_by       text,
    edited_at       timestamptz,
    revision        integer NOT NULL DEFAULT 0,             -- rises with every edit
    parked_at       timestamptz NOT NULL,
    changed_at      timestamptz NOT NULL,
    CHECK (cardinality(header_names) = cardinality(header_values)),
    -- Redelivery changes nothing; the digest tells the records of a recreated topic apart.
    CONSTRAINT dead_letters_record_key UNIQUE (consumer_id, topic, partition, record_offset, digest)
) WITH (fillfactor = 90);
CREATE INDEX dead_letters_open_idx ON soma.dead_letters (consumer_id, sequence, place)
    WHERE status IN ('retrying', 'blocked', 'dead', 'redriving');
CREATE UNIQUE INDEX dead_letters_place_idx ON soma.dead_letters (place);
CREATE INDEX dead_letters_status_idx      ON soma.dead_letters (status, place);
CREATE INDEX dead_letters_tenant_idx      ON soma.dead_letters (tenant_id, place);
CREATE INDEX dead_letters_fingerprint_idx ON soma.dead_letters (fingerprint, place);
CREATE INDEX dead_letters_event_idx       ON soma.dead_letters (event_id);
CREATE INDEX dead_letters_trace_idx       ON soma.dead_letters (trace_id);

-- One row per sequence with open letters. It is the lock of parking, blocking and unblocking.
CREATE TABLE soma.dead_sequences (
    consumer_id  integer NOT NULL,
    sequence     bytea NOT NULL CHECK (octet_length(sequence) BETWEEN 1 AND 512),
    next_at      timestamptz,                     -- when its first letter is due; null: a dead one, it waits for people
    lease        uuid,                            -- new with every lease: fences former owners
    lease_owner  text,
    leased_until timestamptz,
    leases       integer NOT NULL DEFAULT 0,      -- since a letter was settled or a lease given back
    opened_at    timestamptz NOT NULL,
    PRIMARY KEY (consumer_id, sequence)
) WITH (fillfactor = 70);
CREATE INDEX dead_sequences_due_idx ON soma.dead_sequences (consumer_id, next_at) WHERE next_at IS NOT NULL;

-- Who did what with a letter, when and why. Insert-only.
CREATE TABLE soma.dead_letter_history (
    letter_id  uuid NOT NULL,
    history_id bigint GENERATED ALWAYS AS IDENTITY,
    at         timestamptz NOT NULL,
    who        text NOT NULL,
    what       text NOT NULL,
    why        text,
    value      bytea,                             -- of an edit
    PRIMARY KEY (letter_id, history_id)
);

-- Enters events into the inbox; then, in a statement with a snapshot of its own, asks which of the fresh ones belong to
-- a sequence with open letters. In one statement the look could be older than the wait for a former owner's row, and
-- would miss what that owner parked.
--
-- A lane that is not 0 counts the batch (soma.count_batch).
--
-- Events are numbered from 1: first those known by their id, then those known by a key; the sequences are in that order.
-- Of equal events only one may be given. fresh: the new ones (null: all of them); blocked: of these, those whose
-- sequence has open letters (null: none).
CREATE FUNCTION soma.claim(
    p_consumer integer, p_lane bigint, p_batches bigint, p_idle_timeout text,
    p_ids uuid[], p_id_tenants text[], p_id_services text[], p_keys text[], p_key_tenants text[], p_key_services text[], p_sequences bytea[],
    OUT fresh integer[], OUT blocked integer[]
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_ids      integer := cardinality(p_ids);
    v_count    integer := 0;
    v_entered  integer;
    v_names    text[];
    v_uuids    uuid[];
    v_tenants  text[];
    v_services text[];
    v_new      integer[];
    v_setting  text;
BEGIN
    -- Assignments, not a query: that would cost as much as entering an event.
    v_setting := set_config('synchronous_commit', 'on', true);
    v_setting := set_config('idle_in_transaction_session_timeout', p_idle_timeout, true);
    IF p_lane <> 0 THEN
        PERFORM soma.count_batch(p_lane, p_batches);
    END IF;
    IF v_ids = 1 THEN
        -- The usual batch of an idle consumer: the number of rows says all.
        INSERT INTO soma.inbox (event_id, consumer_id, tenant_id, service_id)
        VALUES (p_ids[1], p_consumer, p_id_tenants[1], p_id_services[1])
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            fresh := '{}';
        END IF;
    ELSIF v_ids > 0 THEN
        WITH entered AS (
            INSERT INTO soma.inbox (event_id, consumer_id, tenant_id, service_id)
            SELECT e.id, p_consumer, e.tenant, e.service
            FROM unnest(p_ids, p_id_tenants, p_id_services) AS e (id, tenant, service)
            ORDER BY e.id
            ON CONFLICT DO NOTHING
            RETURNING event_id, tenant_id, service_id
        )
        SELECT count(*), array_agg(event_id), array_agg(tenant_id), array_agg(service_id)
        INTO v_count, v_uuids, v_tenants, v_services FROM entered;
        IF v_count < v_ids THEN
            SELECT coalesce(array_agg(e.number::integer ORDER BY e.number), '{}') INTO fresh
            FROM unnest(p_ids, p_id_tenants, p_id_services) WITH ORDINALITY AS e (id, tenant, service, number)
            JOIN unnest(v_uuids, v_tenants, v_services) AS n (id, tenant, service) USING (id, tenant, service);
        END IF;
    END IF;
    IF cardinality(p_keys) > 0 THEN
        WITH entered AS (
            INSERT INTO soma.inbox_keys (idempotency_key, consumer_id, tenant_id, service_id, applied_at)
            SELECT e.key, p_consumer, e.tenant, e.service, soma.now()
            FROM unnest(p_keys, p_key_tenants, p_key_services) AS e (key, tenant, service)
            ORDER BY e.tenant COLLATE "C", e.service COLLATE "C", e.key COLLATE "C"
            ON CONFLICT DO NOTHING
            RETURNING idempotency_key, tenant_id, service_id
        )
        SELECT count(*), array_agg(idempotency_key), array_agg(tenant_id), array_agg(service_id)
        INTO v_entered, v_names, v_tenants, v_services FROM entered;
        IF fresh IS NOT NULL OR v_entered < cardinality(p_keys) THEN
            SELECT coalesce(array_agg(v_ids + e.number::integer ORDER BY e.number), '{}') INTO v_new
            FROM unnest(p_keys, p_key_tenants, p_key_services) WITH ORDINALITY AS e (key, tenant, service, number)
            JOIN unnest(v_names, v_tenants, v_services) AS n (key, tenant, service) USING (key, tenant, service);
            fresh := coalesce(fresh, (SELECT array_agg(i) FROM generate_series(1, v_ids) i), '{}') || v_new;
        END IF;
    END IF;
    -- While nothing is dead this is one look into an empty index.
    IF EXISTS (SELECT FROM soma.dead_sequences d WHERE d.consumer_id = p_consumer) THEN
        SELECT array_agg(s.number::integer ORDER BY s.number) INTO blocked
        FROM unnest(p_sequences) WITH ORDINALITY AS s (sequence, number)
        JOIN soma.dead_sequences d ON d.consumer_id = p_consumer AND d.sequence = s.sequence
        WHERE fresh IS NULL OR s.number = ANY (fresh);
    END IF;
END $$;

-- After a letter of a locked sequence changed: when the sequence is due, or its end. Returns 'ready' (its first letter
-- may be re-driven now; a lease stays), 'waiting' (a lease ends) or 'closed' (no open letter is left: the row is gone).
CREATE FUNCTION soma.advance_sequence(p_consumer integer, p_sequence bytea) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_now   timestamptz := soma.now();
    v_head  record;
    v_due   timestamptz;
    v_ready boolean;
BEGIN
    SELECT l.status, l.next_at INTO v_head FROM soma.dead_letters l
    WHERE l.consumer_id = p_consumer AND l.sequence = p_sequence
      AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
    ORDER BY l.place LIMIT 1;
    IF NOT FOUND THEN
        DELETE FROM soma.dead_sequences d WHERE d.consumer_id = p_consumer AND d.sequence = p_sequence;
        RETURN 'closed';
    END IF;
    v_due := CASE v_head.status WHEN 'dead' THEN NULL WHEN 'retrying' THEN v_head.next_at ELSE v_now END;
    v_ready := coalesce(v_due <= v_now, false);
    UPDATE soma.dead_sequences d
    SET next_at = v_due, lease = CASE WHEN v_ready THEN d.lease END,
        lease_owner = CASE WHEN v_ready THEN d.lease_owner END,
        leased_until = CASE WHEN v_ready THEN d.leased_until END,
        leases = CASE WHEN v_ready THEN 1 ELSE 0 END
    WHERE d.consumer_id = p_consumer AND d.sequence = p_sequence;
    RETURN CASE WHEN v_ready THEN 'ready' ELSE 'waiting' END;
END $$;

-- Locks a leased sequence; false when the lease is over or another worker's.
CREATE FUNCTION soma.hold_sequence(p_consumer integer, p_sequence bytea, p_lease uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM FROM soma.dead_sequences d
    WHERE d.consumer_id = p_consumer AND d.sequence = p_sequence AND d.lease = p_lease AND d.leased_until > soma.now()
    FOR UPDATE;
    RETURN FOUND;
END $$;

-- Ends a try of a re-driven letter that failed: it is tried again after p_delay, or (null) dead. Returns 'lost' (the lease is not ours any more), 'changed' (the letter was discarded or edited
-- meanwhile), or what became of the sequence; after the first two the transaction must be rolled back.
CREATE FUNCTION soma.fail_letter(
    p_consumer integer, p_sequence bytea, p_lease uuid, p_letter uuid, p_revision integer, p_who text,
    p_delay interval, p_left integer, p_stage text, p_error_type text, p_error_message text, p_error_stack text,
    p_fingerprint text
) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_now    timestamptz;
    v_status text := CASE WHEN p_delay IS NULL THEN 'dead' ELSE 'retrying' END;
BEGIN
    IF NOT soma.hold_sequence(p_consumer, p_sequence, p_lease) THEN
        RETURN 'lost';
    END IF;
    v_now := soma.now();
    UPDATE soma.dead_letters l
    SET status = v_status, attempts = l.attempts + 1, changed_at = v_now, next_at = v_now + p_delay,
        automatic_left = coalesce(p_left, l.automatic_left), stage = p_stage, error_type = p_error_type,
        error_message = p_error_message, error_stack = p_error_stack, fingerprint = p_fingerprint
    WHERE l.letter_id = p_letter AND l.consumer_id = p_consumer AND l.sequence = p_sequence
      AND l.revision = p_revision AND l.status IN ('retrying', 'blocked', 'redriving');
    IF NOT FOUND THEN
        RETURN 'changed';
    END IF;
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
    VALUES (p_letter, v_now, p_who, v_status, left(p_error_message, 500));
    RETURN soma.advance_sequence(p_consumer, p_sequence);
END $$;

-- Ends a try of letters that were applied in one transaction: all of them are resolved, or none. Returns as fail_letter.
CREATE FUNCTION soma.resolve_letters(
    p_consumer integer, p_sequence bytea, p_lease uuid, p_letters uuid[], p_revisions integer[], p_who text
) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_now   timestamptz;
    v_count integer;
BEGIN
    IF NOT soma.hold_sequence(p_consumer, p_sequence, p_lease) THEN
        RETURN 'lost';
    END IF;
    v_now := soma.now();
    UPDATE soma.dead_letters l SET status = 'resolved', attempts = l.attempts + 1, changed_at = v_now, next_at = NULL
    FROM unnest(p_letters, p_revisions) AS g (letter_id, revision)
    WHERE l.letter_id = g.letter_id AND l.consumer_id = p_consumer AND l.sequence = p_sequence
      AND l.revision = g.revision AND l.status IN ('retrying', 'blocked', 'redriving');
    GET DIAGNOSTICS v_count = ROW_COUNT;
    IF v_count < cardinality(p_letters) THEN
        RETURN 'changed';
    END IF;
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what)
    SELECT g.letter_id, v_now, p_who, 'resolved' FROM unnest(p_letters) AS g (letter_id);
    RETURN soma.advance_sequence(p_consumer, p_sequence);
END $$;

-- Asks for another try of the whole sequences of some letters: what is dead or retrying there becomes redriving, and is
-- due now. Returns the letters that changed; asked twice, the second time changes none.
CREATE FUNCTION soma.redrive_letters(p_letters uuid[], p_who text, p_why text) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_sequence record;
    v_marked   uuid[];
BEGIN
    -- In one order, so that two who ask for the same sequences cannot deadlock.
    FOR v_sequence IN
        SELECT d.consumer_id, d.sequence FROM soma.dead_sequences d
        WHERE (d.consumer_id, d.sequence) IN (SELECT l.consumer_id, l.sequence FROM soma.dead_letters l
                                              WHERE l.letter_id = ANY (p_letters))
        ORDER BY d.consumer_id, d.sequence FOR UPDATE
    LOOP
        WITH marked AS (
            UPDATE soma.dead_letters l SET status = 'redriving', next_at = NULL, changed_at = soma.now()
            WHERE l.consumer_id = v_sequence.consumer_id AND l.sequence = v_sequence.sequence
              AND l.status IN ('dead', 'retrying')
            RETURNING l.letter_id
        )
        SELECT array_agg(letter_id) INTO v_marked FROM marked;
        CONTINUE WHEN v_marked IS NULL;
        INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
        SELECT m, soma.now(), p_who, 'redriving', p_why FROM unnest(v_marked) m;
        PERFORM soma.advance_sequence(v_sequence.consumer_id, v_sequence.sequence);
        RETURN QUERY SELECT unnest(v_marked);
    END LOOP;
END $$;

-- Gives an open letter up: what stands behind it is due. Returns the letter's status before, null if there is none.
CREATE FUNCTION soma.discard_letter(p_letter uuid, p_who text, p_why text) RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_letter record;
BEGIN
    SELECT l.consumer_id, l.sequence INTO v_letter FROM soma.dead_letters l WHERE l.letter_id = p_letter;
    PERFORM FROM soma.dead_sequences d
    WHERE d.consumer_id = v_letter.consumer_id AND d.sequence = v_letter.sequence FOR UPDATE;
    -- Read again: under the lock nobody else changes it.
    SELECT l.consumer_id, l.sequence, l.status INTO v_letter FROM soma.dead_letters l
    WHERE l.letter_id = p_letter FOR UPDATE;
    IF v_letter.status IN ('retrying', 'blocked', 'dead', 'redriving') THEN
        UPDATE soma.dead_letters SET status = 'discarded', next_at = NULL, changed_at = soma.now()
        WHERE letter_id = p_letter;
        INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
        VALUES (p_letter, soma.now(), p_who, 'discarded', p_why);
        PERFORM soma.advance_sequence(v_letter.consumer_id, v_letter.sequence);
    END IF;
    RETURN v_letter.status;
END $$;

-- As before, and: letters may be written and their state changed; the record as it came may not, nor may history.
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
    EXECUTE format('GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA soma TO %I', p_role);
    EXECUTE format('REVOKE EXECUTE ON FUNCTION soma.repair(), soma.grant_runtime(name) FROM %I', p_role);
END $$;
