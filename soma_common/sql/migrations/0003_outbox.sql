-- The outbox: what the relay brings to Kafka. Insert-only; emptied by truncating whole partitions.

-- A ring of eight partitions of 2^17 positions each; no DDL is ever needed on the parent.
CREATE TABLE soma.outbox (
    position     bigint NOT NULL,
    xid          xid8 NOT NULL,
    slot         smallint NOT NULL,               -- (position >> 17) & 7
    shard        smallint NOT NULL,               -- key_hash mod 8, never negative
    key_hash     integer NOT NULL,                -- murmur2: the Kafka partition derives from it
    topic        text NOT NULL CHECK (topic <> ''),
    key          bytea NOT NULL,
    event_id     uuid NOT NULL,
    event_type   text NOT NULL,
    version      bigint NOT NULL,                 -- the event's version in its stream
    "timestamp"  timestamptz NOT NULL,
    value        bytea NOT NULL,                  -- the final bytes
    headers      text NOT NULL                    -- JSON object of strings
) PARTITION BY LIST (slot);
CREATE INDEX outbox_shard_idx ON soma.outbox (shard, position);
CREATE INDEX outbox_xid_idx   ON soma.outbox (xid);

DO $$
BEGIN
    FOR slot IN 0..7 LOOP
        EXECUTE format('CREATE TABLE soma.outbox_%s PARTITION OF soma.outbox FOR VALUES IN (%s) '
                       'WITH (autovacuum_vacuum_insert_threshold = -1)', slot, slot);
    END LOOP;
END $$;

-- When the position sequence last left a partition: the newest transaction that may still write there.
CREATE TABLE soma.outbox_slots (
    slot          smallint PRIMARY KEY,
    left_position bigint NOT NULL,
    left_xmax     xid8 NOT NULL                   -- every transaction that may still write there is below
);

-- Rows that Kafka will never take, and the later rows of their key (whose reason is null).
CREATE TABLE soma.outbox_parked (
    reader      text NOT NULL,
    position    bigint NOT NULL,
    topic       text NOT NULL,
    key         bytea NOT NULL,
    key_hash    integer NOT NULL,
    event_id    uuid NOT NULL,
    event_type  text NOT NULL,
    version     bigint NOT NULL,
    "timestamp" timestamptz NOT NULL,
    value       bytea NOT NULL,
    headers     text NOT NULL,
    reason      text,
    parked_at   timestamptz NOT NULL,
    PRIMARY KEY (reader, position)
);
CREATE INDEX outbox_parked_key_idx ON soma.outbox_parked (reader, topic, key);

CREATE FUNCTION soma.outbox_slot(p_position bigint) RETURNS smallint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ((p_position >> 17) & 7)::smallint;

-- Whether the position sequence has been inside a partition of the ring since (and not at) p_position.
CREATE FUNCTION soma.outbox_entered(p_slot smallint, p_position bigint) RETURNS boolean
LANGUAGE sql VOLATILE AS $$
    SELECT soma.last_position() >> 17 >= (p_position >> 17) + 1 + ((p_slot - 1 - (p_position >> 17)) & 7)
$$;

-- Empties the partitions whose rows every relay has passed. Returns how many were emptied.
--
-- "Every cursor has passed the positions" is not enough: a transaction that still runs may hold a low position, and a
-- TRUNCATE would wait for it and then erase what it committed. So: note a transaction id that was drawn after the sequence
-- left the partition, and wait until every cursor's snapshot has xmin at or above it. (A snapshot's xmax would not do:
-- transactions from there on may be running already.) Call it in a transaction of its own.
CREATE FUNCTION soma.clean_outbox(p_lock_timeout interval DEFAULT '50 milliseconds') RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_slot    smallint;
    v_seen    soma.outbox_slots;
    v_cursors xid8;
    v_emptied integer := 0;
    v_last    bigint := soma.last_position();
    v_filled  boolean;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('soma.clean_outbox', 0)) THEN
        RETURN 0;
    END IF;
    PERFORM set_config('lock_timeout', extract(milliseconds FROM p_lock_timeout)::integer::text, true);
    SELECT min(pg_snapshot_xmin(t.snapshot)::text::numeric)::text::xid8 INTO v_cursors
    FROM soma.shards s LEFT JOIN soma.ticks t ON t.tick_id = s.from_tick AND t.token = s.from_token
        AND t.era = (SELECT n.era FROM soma.ticks n ORDER BY n.tick_id DESC LIMIT 1)
    WHERE s.reader LIKE 'relay:%'
    HAVING count(*) = count(t.tick_id);           -- a cursor of an older era has not passed anything
    FOREACH v_slot IN ARRAY '{0,1,2,3,4,5,6,7}'::smallint[] LOOP
        CONTINUE WHEN v_slot = soma.outbox_slot(v_last) OR v_slot = soma.outbox_slot(v_last + 1);
        SELECT * INTO v_seen FROM soma.outbox_slots WHERE slot = v_slot;
        IF v_seen.slot IS NULL OR soma.outbox_entered(v_slot, v_seen.left_position) THEN
            EXECUTE format('SELECT EXISTS (SELECT FROM soma.outbox_%s)', v_slot) INTO v_filled;
            CONTINUE WHEN NOT v_filled AND v_seen.slot IS NULL;
            INSERT INTO soma.outbox_slots
            VALUES (v_slot, v_last, pg_current_xact_id())
            ON CONFLICT (slot) DO UPDATE SET left_position = excluded.left_position, left_xmax = excluded.left_xmax;
            CONTINUE;
        END IF;
        CONTINUE WHEN v_cursors IS NULL OR v_cursors < v_seen.left_xmax;
        BEGIN
            EXECUTE format('LOCK TABLE soma.outbox_%s IN ACCESS EXCLUSIVE MODE', v_slot);
            -- Under the lock nobody can write here, so a sequence that is still outside has left nothing behind.
            IF NOT soma.outbox_entered(v_slot, v_seen.left_position) THEN
                EXECUTE format('TRUNCATE soma.outbox_%s', v_slot);
                DELETE FROM soma.outbox_slots WHERE slot = v_slot;
                v_emptied := v_emptied + 1;
            END IF;
        EXCEPTION WHEN lock_not_available THEN
            -- A reader or a long transaction holds the partition: the next call tries again.
            CONTINUE;
        END;
    END LOOP;
    RETURN v_emptied;
END $$;
