-- Operating dead letters: what the gauges count, and rows that the relay cannot publish as letters of the stage publish.

CREATE INDEX dead_letters_gauge_idx ON soma.dead_letters (consumer_id, status, parked_at)
    WHERE status IN ('retrying', 'blocked', 'dead', 'redriving');

-- A parked row of the outbox is what the relay works with; its letter is what people see (decision 0012). Triggers write
-- the letter in the transaction that parks, tries, refuses or sends the row, so that the two cannot differ. The letter's
-- consumer is the relay's reader, `relay:<name>`; it has no row in soma.dead_sequences, for the order of its key is
-- kept by the relay.
--
--   parked with a reason        dead            behind such a row       blocked
--   asked to be tried again     redriving       refused again           dead, one attempt more
--   sent                        resolved        given up                discarded

-- What stays in order: the rows of a key in a topic. At most 512 bytes, as other sequences.
CREATE FUNCTION soma.parked_sequence(p_topic text, p_key bytea) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN octet_length(p_topic) + octet_length(p_key) < 510
        THEN 't'::bytea || convert_to(p_topic, 'UTF8') || '\x00'::bytea || p_key
    ELSE 'T'::bytea || sha256(convert_to(p_topic, 'UTF8') || '\x00'::bytea || p_key)
END;

-- The error in a reason of the relay: what Kafka said, or that the topic takes nothing.
CREATE FUNCTION soma.parked_error(p_reason text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN coalesce(substring(p_reason FROM '^Kafka refused it for topic .*: ([A-Za-z0-9_]{1,200})$'), 'TopicRefused');

-- Who does what, for history; the relay itself where nobody said so.
CREATE FUNCTION soma.parked_who(p_reader text) RETURNS text
LANGUAGE sql STABLE
RETURN coalesce(nullif(current_setting('soma.who', true), ''), p_reader);

-- A row's headers as the publisher sends them. Parking must never fail: what cannot be taken apart stays as it is.
CREATE FUNCTION soma.parked_headers(
    p_headers text, p_event_id text, p_event_type text, p_version text, p_position text,
    OUT names bytea[], OUT contents bytea[]
)
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    BEGIN
        SELECT array_agg(convert_to(j.key, 'UTF8') ORDER BY j.place), array_agg(convert_to(j.value, 'UTF8') ORDER BY j.place)
        INTO names, contents FROM json_each_text(p_headers::json) WITH ORDINALITY AS j (key, value, place);
    EXCEPTION WHEN OTHERS THEN
        names := ARRAY['headers'::bytea];
        contents := ARRAY[convert_to(p_headers, 'UTF8')];
    END;
    names := names || ARRAY['event_id', 'event_type', 'soma_version', 'soma_position']::bytea[];
    contents := contents || ARRAY[convert_to(p_event_id, 'UTF8'), convert_to(p_event_type, 'UTF8'),
                                  convert_to(p_version, 'UTF8'), convert_to(p_position, 'UTF8')];
END $$;

-- Writes the letters of parked rows. A row that was sent and is met again has its letter open again.
CREATE FUNCTION soma.write_parked_letters(p_reader text, p_positions bigint[]) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_consumer integer := (SELECT c.consumer_id FROM soma.consumers c WHERE c.name = p_reader);
BEGIN
    IF v_consumer IS NULL THEN
        INSERT INTO soma.consumers (name) VALUES (p_reader) ON CONFLICT (name) DO UPDATE SET name = excluded.name
        RETURNING consumer_id INTO v_consumer;
    END IF;
    WITH written AS (
        INSERT INTO soma.dead_letters AS l (
            letter_id, consumer_id, sequence, status, topic, partition, record_offset, record_key, value, header_names,
            header_values, record_time, digest, event_id, event_type, tenant_id, service_id, idempotency_key, trace_id,
            stage, error_type, error_message, fingerprint, attempts, automatic_left, parked_at, changed_at)
        SELECT gen_random_uuid(), v_consumer, soma.parked_sequence(p.topic, p.key),
               CASE WHEN p.reason IS NULL THEN 'blocked' ELSE 'dead' END,
               p.topic, -1, p.position, p.key, p.value, h.names, h.contents, p."timestamp",
               sha256(convert_to(octet_length(p.key) || ':', 'UTF8') || p.key
                      || convert_to(octet_length(p.value) || ':', 'UTF8') || p.value),
               p.event_id, p.event_type, e.tenant_id, e.service_id, e.idempotency_key, e.trace_id,
               CASE WHEN p.reason IS NOT NULL THEN 'publish' END,
               CASE WHEN p.reason IS NOT NULL THEN soma.parked_error(p.reason) END, left(p.reason, 1000),
               CASE WHEN p.reason IS NOT NULL THEN soma.parked_fingerprint(p.topic, p.reason) END,
               CASE WHEN p.reason IS NULL THEN 0 ELSE 1 END, 0, p.parked_at, p.parked_at
        FROM soma.outbox_parked p
        LEFT JOIN LATERAL (SELECT * FROM soma.events s WHERE s.position = p.position) e ON e.event_id = p.event_id
        CROSS JOIN LATERAL soma.parked_headers(
            p.headers, p.event_id::text, p.event_type, p.version::text, p.position::text) h
        WHERE p.reader = p_reader AND p.position = ANY (p_positions)
        ORDER BY p.position
        ON CONFLICT ON CONSTRAINT dead_letters_record_key DO UPDATE
            SET status = excluded.status, stage = excluded.stage, error_type = excluded.error_type,
                error_message = excluded.error_message, fingerprint = excluded.fingerprint, changed_at = soma.now()
        RETURNING letter_id, status, error_message
    )
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
    SELECT w.letter_id, soma.now(), soma.parked_who(p_reader), w.status, left(w.error_message, 500) FROM written w;
END $$;

CREATE FUNCTION soma.parked_fingerprint(p_topic text, p_reason text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN left(encode(sha256(convert_to('publish' || chr(1) || p_topic || chr(1) || soma.parked_error(p_reason), 'UTF8')), 'hex'), 16);

-- One at a time parks and gives up rows of a relay: else a row could be parked behind one that is just given up, and
-- nothing would ever try it again.
CREATE FUNCTION soma.lock_parked(p_reader text) RETURNS void
LANGUAGE sql VOLATILE AS $$ SELECT pg_advisory_xact_lock(hashtextextended('soma.outbox_parked ' || p_reader, 0)) $$;

CREATE FUNCTION soma.outbox_was_parked() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_fresh record;
BEGIN
    FOR v_fresh IN SELECT f.reader, array_agg(f.position) AS positions FROM fresh f GROUP BY f.reader ORDER BY 1 LOOP
        PERFORM soma.lock_parked(v_fresh.reader);
        PERFORM soma.write_parked_letters(v_fresh.reader, v_fresh.positions);
        -- The row that they should wait for was given up meanwhile: they may go.
        UPDATE soma.outbox_parked p SET wanted = true
        WHERE p.reader = v_fresh.reader AND p.position = ANY (v_fresh.positions) AND p.reason IS NULL
          AND NOT EXISTS (SELECT FROM soma.outbox_parked h WHERE h.reader = p.reader AND h.topic = p.topic
                            AND h.key = p.key AND h.position < p.position);
    END LOOP;
    RETURN NULL;
END $$;
CREATE TRIGGER outbox_was_parked AFTER INSERT ON soma.outbox_parked
    REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION soma.outbox_was_parked();

CREATE FUNCTION soma.parked_was_tried() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
    WITH changes AS (
        SELECT c.consumer_id, n.reader, n.topic, n.position, n.reason, n.wanted
        FROM was o JOIN now_is n USING (reader, position) JOIN soma.consumers c ON c.name = n.reader
        WHERE o.wanted IS DISTINCT FROM n.wanted OR o.reason IS DISTINCT FROM n.reason
    ), changed AS (
        UPDATE soma.dead_letters l
        SET status = CASE WHEN n.wanted AND n.reason IS NOT NULL THEN 'redriving' WHEN n.reason IS NULL THEN 'blocked'
                          ELSE 'dead' END,
            attempts = l.attempts + CASE WHEN l.status = 'redriving' AND NOT n.wanted THEN 1 ELSE 0 END,
            stage = CASE WHEN n.reason IS NOT NULL THEN 'publish' END,
            error_type = CASE WHEN n.reason IS NOT NULL THEN soma.parked_error(n.reason) END,
            error_message = left(n.reason, 1000),
            fingerprint = CASE WHEN n.reason IS NOT NULL THEN soma.parked_fingerprint(n.topic, n.reason) END,
            changed_at = soma.now()
        FROM changes n
        WHERE l.consumer_id = n.consumer_id AND l.topic = n.topic AND l.partition = -1 AND l.record_offset = n.position
          AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
        RETURNING l.letter_id, l.status, l.error_message, n.reader
    )
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
    SELECT c.letter_id, soma.now(), soma.parked_who(c.reader), c.status,
           CASE WHEN c.status = 'redriving' THEN nullif(current_setting('soma.why', true), '')
                ELSE left(c.error_message, 500) END
    FROM changed c WHERE c.status <> 'blocked';
    RETURN NULL;
END $$;
CREATE TRIGGER parked_was_tried AFTER UPDATE ON soma.outbox_parked
    REFERENCING OLD TABLE AS was NEW TABLE AS now_is FOR EACH STATEMENT EXECUTE FUNCTION soma.parked_was_tried();

-- A letter that was given up is settled already; the others were sent.
CREATE FUNCTION soma.parked_was_sent() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
    WITH changed AS (
        UPDATE soma.dead_letters l SET status = 'resolved', attempts = l.attempts + 1, changed_at = soma.now()
        FROM gone g JOIN soma.consumers c ON c.name = g.reader
        WHERE l.consumer_id = c.consumer_id AND l.topic = g.topic AND l.partition = -1 AND l.record_offset = g.position
          AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
        RETURNING l.letter_id, g.reader
    )
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what)
    SELECT c.letter_id, soma.now(), c.reader, 'resolved' FROM changed c;
    RETURN NULL;
END $$;
CREATE TRIGGER parked_was_sent AFTER DELETE ON soma.outbox_parked
    REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION soma.parked_was_sent();

-- Asks for another try of letters of either kind. Returns those that changed.
CREATE FUNCTION soma.redrive_any(p_letters uuid[], p_who text, p_why text) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_relay  record;
    v_before uuid[];
BEGIN
    FOR v_relay IN
        SELECT c.consumer_id, c.name, array_agg(DISTINCT l.record_offset) AS positions FROM soma.dead_letters l
        JOIN soma.consumers c ON c.consumer_id = l.consumer_id
        WHERE l.letter_id = ANY (p_letters) AND c.name LIKE 'relay:%' AND l.partition = -1
          AND l.status IN ('blocked', 'dead')
        GROUP BY c.consumer_id, c.name ORDER BY c.consumer_id
    LOOP
        PERFORM set_config('soma.who', p_who, true), set_config('soma.why', coalesce(p_why, ''), true);
        PERFORM soma.lock_parked(v_relay.name);
        SELECT array_agg(l.letter_id) INTO v_before
        FROM soma.outbox_parked n
        JOIN soma.outbox_parked p ON p.reader = n.reader AND p.topic = n.topic AND p.key = n.key
        JOIN soma.dead_letters l ON l.consumer_id = v_relay.consumer_id AND l.topic = p.topic AND l.partition = -1
             AND l.record_offset = p.position AND l.status = 'dead'
        WHERE n.reader = v_relay.name AND n.position = ANY (v_relay.positions) AND NOT p.wanted;
        PERFORM soma.unpark(v_relay.name, NULL, v_relay.positions);
        PERFORM set_config('soma.who', '', true), set_config('soma.why', '', true);
        RETURN QUERY SELECT DISTINCT b FROM unnest(v_before) b;
    END LOOP;
    RETURN QUERY SELECT soma.redrive_letters(p_letters, p_who, p_why);
END $$;

-- Gives up a letter of either kind. Returns its status before, null if there is none; 'sending': the relay is to
-- try it or does so just now, and it is not given up.
CREATE FUNCTION soma.discard_any(p_letter uuid, p_who text, p_why text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_letter record;
    v_row    soma.outbox_parked;
BEGIN
    SELECT l.consumer_id, c.name, l.topic, l.record_offset, l.status INTO v_letter
    FROM soma.dead_letters l JOIN soma.consumers c ON c.consumer_id = l.consumer_id
    WHERE l.letter_id = p_letter AND l.partition = -1 AND c.name LIKE 'relay:%';
    IF NOT FOUND THEN
        RETURN soma.discard_letter(p_letter, p_who, p_why);
    END IF;
    PERFORM soma.lock_parked(v_letter.name);
    SELECT * INTO v_row FROM soma.outbox_parked p
    WHERE p.reader = v_letter.name AND p.position = v_letter.record_offset FOR UPDATE;
    IF NOT FOUND THEN
        RETURN (SELECT l.status FROM soma.dead_letters l WHERE l.letter_id = p_letter);
    END IF;
    IF v_row.wanted THEN
        RETURN 'sending';
    END IF;
    UPDATE soma.dead_letters l SET status = 'discarded', changed_at = soma.now() WHERE l.letter_id = p_letter;
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
    VALUES (p_letter, soma.now(), p_who, 'discarded', p_why);
    DELETE FROM soma.outbox_parked p WHERE p.reader = v_row.reader AND p.position = v_row.position;
    -- What stands behind it goes, unless its first row waits for people itself.
    UPDATE soma.outbox_parked p SET wanted = true
    WHERE p.reader = v_row.reader AND p.topic = v_row.topic AND p.key = v_row.key
      AND (SELECT h.reason IS NULL FROM soma.outbox_parked h
           WHERE h.reader = p.reader AND h.topic = p.topic AND h.key = p.key ORDER BY h.position LIMIT 1);
    RETURN v_letter.status;
END $$;

REVOKE EXECUTE ON FUNCTION soma.write_parked_letters(text, bigint[]), soma.redrive_any(uuid[], text, text),
    soma.discard_any(uuid, text, text) FROM PUBLIC;

-- What is parked already.
DO $$
DECLARE
    v_reader text;
BEGIN
    FOR v_reader IN SELECT DISTINCT reader FROM soma.outbox_parked LOOP
        PERFORM soma.write_parked_letters(
            v_reader, (SELECT array_agg(position) FROM soma.outbox_parked WHERE reader = v_reader));
    END LOOP;
END $$;
