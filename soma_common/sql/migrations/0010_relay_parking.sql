-- The relay: second tries of parked rows, and the pinned partition counts of its topics.

-- wanted: somebody asked for another try of this row's key. attempt: the try that is under way, named before it is sent.
ALTER TABLE soma.outbox_parked ADD COLUMN wanted boolean NOT NULL DEFAULT false, ADD COLUMN attempt uuid;
CREATE INDEX outbox_parked_wanted_idx ON soma.outbox_parked (reader, topic, key) WHERE wanted;

-- The partition counts by which a relay distributes keys. A topic whose real count differs is paused.
CREATE TABLE soma.relay_topics (
    reader     text NOT NULL CHECK (reader <> ''),
    topic      text NOT NULL CHECK (topic <> ''),
    partitions integer NOT NULL CHECK (partitions > 0),
    pinned_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (reader, topic)
);

-- These run with their owner's rights: the runtime role may not update the tables itself.

CREATE FUNCTION soma.pin_topic(p_reader text, p_topic text, p_partitions integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
BEGIN
    INSERT INTO soma.relay_topics (reader, topic, partitions) VALUES (p_reader, p_topic, p_partitions)
    ON CONFLICT DO NOTHING;
    RETURN (SELECT partitions FROM soma.relay_topics WHERE reader = p_reader AND topic = p_topic);
END $$;

-- Returns the count that was pinned before, null if none.
CREATE FUNCTION soma.accept_partitions(p_reader text, p_topic text, p_partitions integer) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_before integer := (SELECT partitions FROM soma.relay_topics WHERE reader = p_reader AND topic = p_topic);
BEGIN
    INSERT INTO soma.relay_topics (reader, topic, partitions) VALUES (p_reader, p_topic, p_partitions)
    ON CONFLICT (reader, topic) DO UPDATE SET partitions = excluded.partitions, pinned_at = clock_timestamp();
    RETURN v_before;
END $$;

-- Asks for another try: of the keys that own one of the positions, of a topic, or (both null) of everything.
-- Returns the number of rows that were marked.
CREATE FUNCTION soma.unpark(p_reader text, p_topic text, p_positions bigint[]) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH marked AS (
        UPDATE soma.outbox_parked p SET wanted = true
        WHERE p.reader = p_reader AND (p_topic IS NULL OR p.topic = p_topic)
          AND (p_positions IS NULL OR (p.topic, p.key) IN (
              SELECT n.topic, n.key FROM soma.outbox_parked n
              WHERE n.reader = p_reader AND n.position = ANY (p_positions)))
        RETURNING 1
    )
    SELECT count(*) FROM marked
$$;

CREATE FUNCTION soma.mark_parked(p_reader text, p_positions bigint[], p_attempt uuid) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE soma.outbox_parked SET attempt = p_attempt WHERE reader = p_reader AND position = ANY (p_positions)
$$;

-- Whole keys go back to waiting; the named rows get a new reason.
CREATE FUNCTION soma.refuse_parked(p_reader text, p_positions bigint[], p_reasons text[]) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE soma.outbox_parked p
    SET wanted = false, attempt = NULL,
        reason = coalesce((SELECT r.reason FROM unnest(p_positions, p_reasons) AS r (position, reason)
                           WHERE r.position = p.position), p.reason)
    WHERE p.reader = p_reader AND (p.topic, p.key) IN (
        SELECT n.topic, n.key FROM soma.outbox_parked n WHERE n.reader = p_reader AND n.position = ANY (p_positions))
$$;

REVOKE EXECUTE ON FUNCTION soma.pin_topic(text, text, integer), soma.accept_partitions(text, text, integer),
    soma.unpark(text, text, bigint[]), soma.mark_parked(text, bigint[], uuid),
    soma.refuse_parked(text, bigint[], text[]) FROM PUBLIC;
