-- What workers call now and then. These functions run with their owner's rights, so the runtime role needs no DDL.

-- Keeps at least two empty partitions of events ahead of the position sequence. The last partition is open to
-- MAXVALUE, so an append finds a partition even if nobody ever calls this.
-- Returns the number of partitions made; gives up at once (and returns what it has) when the lock is not free,
-- since waiting for it would make every append wait behind.
CREATE FUNCTION soma.maintain_events(
    p_rows bigint DEFAULT 5000000, p_lock_timeout interval DEFAULT '100 milliseconds'
) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_tail  text;
    v_lower bigint;
    v_upper bigint;
    v_made  integer := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('soma.maintain_events', 0)) THEN
        RETURN 0;
    END IF;
    PERFORM set_config('lock_timeout', extract(milliseconds FROM p_lock_timeout)::integer::text, true);
    LOOP
        SELECT c.relname, substr(c.relname, 9)::bigint INTO STRICT v_tail, v_lower
        FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'soma.events'::regclass AND pg_get_expr(c.relpartbound, c.oid) LIKE '%TO (MAXVALUE)';
        EXIT WHEN v_lower - soma.last_position() >= 2 * p_rows;
        -- When the tail is in use already, bound it beyond what it holds; the lock then lasts for one scan of it.
        v_upper := greatest(v_lower + p_rows, soma.last_position() + p_rows);
        BEGIN
            -- The parent and the tail only: whoever reads an older partition is not waited for.
            LOCK TABLE ONLY soma.events IN ACCESS EXCLUSIVE MODE;
            EXECUTE format('ALTER TABLE soma.events DETACH PARTITION soma.%I', v_tail);
            EXECUTE format('CREATE TABLE soma.%I (LIKE soma.%I INCLUDING ALL)', 'events_p' || v_upper, v_tail);
            EXECUTE format('ALTER TABLE soma.events ATTACH PARTITION soma.%I FOR VALUES FROM (%s) TO (%s)',
                           v_tail, v_lower, v_upper);
            EXECUTE format('ALTER TABLE soma.events ATTACH PARTITION soma.%I FOR VALUES FROM (%s) TO (MAXVALUE)',
                           'events_p' || v_upper, v_upper);
            EXECUTE format('CREATE TRIGGER events_no_truncate BEFORE TRUNCATE ON soma.%I '
                           'FOR EACH STATEMENT EXECUTE FUNCTION soma.refuse_change()', 'events_p' || v_upper);
            v_made := v_made + 1;
        EXCEPTION WHEN lock_not_available THEN
            RETURN v_made;
        END;
    END LOOP;
    RETURN v_made;
END $$;

-- Forgets ticks that every cursor has passed, a few thousand at a time. The newest one always stays, and so do the
-- beginning (tick 0) and the ends of eras, where cursors of the outside may still stand.
CREATE FUNCTION soma.merge_ticks(p_most integer DEFAULT 5000, p_keep interval DEFAULT '1 hour') RETURNS integer
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH passed AS (
        SELECT t.tick_id FROM soma.ticks t
        WHERE t.tick_id > 0
          AND t.tick_id < least((SELECT min(from_tick) FROM soma.shards), (SELECT max(tick_id) FROM soma.ticks))
          AND t.made_at < clock_timestamp() - p_keep
          AND NOT EXISTS (SELECT FROM soma.ticks e WHERE e.tick_id IN (t.tick_id - 1, t.tick_id + 1) AND e.era <> t.era)
        ORDER BY t.tick_id LIMIT p_most
    ), gone AS (DELETE FROM soma.ticks t USING passed WHERE t.tick_id = passed.tick_id RETURNING 1)
    SELECT count(*)::integer FROM gone
$$;

-- After a dump was restored into another cluster, or a copy was made: starts a new era of transaction ids.
-- Everything stored so far is history, ordered by position: the closing tick sees all of it, the opening tick begins
-- after it. Cursors of the old era read on to the closing tick by the old numbers, then go over to the new one.
-- Nobody may append meanwhile: the table lock sees to that.
CREATE FUNCTION soma.repair() RETURNS TABLE (old_cluster bigint, new_cluster bigint, history_until bigint, new_era integer)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_last soma.ticks;
    v_top  bigint;
    v_xmax text;
BEGIN
    LOCK TABLE soma.events, soma.outbox IN SHARE ROW EXCLUSIVE MODE;
    PERFORM pg_advisory_xact_lock(hashtextextended('soma.tick', 0));
    PERFORM set_config('synchronous_commit', 'on', true);
    SELECT system_identifier INTO old_cluster FROM soma.cluster;
    SELECT system_identifier INTO new_cluster FROM pg_control_system();
    SELECT * INTO STRICT v_last FROM soma.ticks ORDER BY tick_id DESC LIMIT 1;
    SELECT greatest(soma.last_position(), (SELECT max(position) FROM soma.events),
                    (SELECT max(position) FROM soma.outbox)) INTO v_top;
    PERFORM setval('soma.event_position', greatest(v_top, 1), v_top > 0);
    -- Above every transaction id that is stored.
    SELECT (greatest(
        (SELECT xid::text::numeric FROM soma.events ORDER BY xid DESC LIMIT 1),
        (SELECT xid::text::numeric FROM soma.outbox ORDER BY xid DESC LIMIT 1),
        pg_snapshot_xmax(v_last.snapshot)::text::numeric, 1) + 1)::text INTO v_xmax;
    INSERT INTO soma.ticks VALUES
        (v_last.tick_id + 1, (random() * 9e18)::bigint, (v_xmax || ':' || v_xmax || ':')::pg_snapshot, v_top, v_top,
         v_last.era, v_last.era_start, clock_timestamp()),
        (v_last.tick_id + 2, (random() * 9e18)::bigint, '1:1:', v_top, v_top, v_last.era + 1, v_top, clock_timestamp());
    -- A logical copy brings rows but no sequences, and perhaps no row of soma.cluster.
    PERFORM setval(pg_get_serial_sequence('soma.streams', 'stream_id'), (SELECT max(stream_id) FROM soma.streams));
    PERFORM setval(pg_get_serial_sequence('soma.consumers', 'consumer_id'),
                   (SELECT max(consumer_id) FROM soma.consumers));
    INSERT INTO soma.cluster (system_identifier) VALUES (new_cluster)
    ON CONFLICT (only_row) DO UPDATE SET system_identifier = excluded.system_identifier;
    -- What was noted there are transaction ids of the old era.
    DELETE FROM soma.outbox_slots;
    history_until := v_top;
    new_era := v_last.era + 1;
    RETURN NEXT;
END $$;

-- Gives a role what an application, its relay and its consumers need: no DDL, no UPDATE or DELETE of events.
CREATE FUNCTION soma.grant_runtime(p_role name) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT INSERT ON soma.events, soma.outbox TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE ON soma.streams, soma.shards, soma.workers, soma.consumer_offsets, '
                   'soma.consumers TO %I', p_role);
    EXECUTE format('GRANT INSERT, DELETE ON soma.idempotency_keys, soma.inbox, soma.inbox_keys, soma.outbox_parked, '
                   'soma.workers TO %I', p_role);
    EXECUTE format('GRANT INSERT ON soma.ticks TO %I', p_role);
    EXECUTE format('GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA soma TO %I', p_role);
    EXECUTE format('REVOKE EXECUTE ON FUNCTION soma.repair(), soma.grant_runtime(name) FROM %I', p_role);
END $$;
REVOKE EXECUTE ON FUNCTION soma.repair(), soma.grant_runtime(name), soma.clean_outbox(interval),
    soma.maintain_events(bigint, interval), soma.merge_ticks(integer, interval) FROM PUBLIC;
