-- Reading in order: ticks (durable snapshots), and the shards whose cursors walk over them.

-- A tick is a snapshot that committed durably before any row was read by it.
-- Rows of transactions at or above xmax have positions above position_before (soma.tick sees to that); every visible
-- row is at or below position_after, since that was read after the snapshot.
CREATE TABLE soma.ticks (
    tick_id         bigint PRIMARY KEY,
    token           bigint NOT NULL,              -- random: tells two histories of one tick_id apart
    snapshot        pg_snapshot NOT NULL,
    position_before bigint NOT NULL,
    position_after  bigint NOT NULL,
    era             integer NOT NULL,             -- transaction ids may be compared within one era only
    era_start       bigint NOT NULL,              -- the last position before the era
    made_at         timestamptz NOT NULL
);
-- The beginning: nothing is visible, everything is still to come.
INSERT INTO soma.ticks VALUES (0, 0, '1:1:', 0, 0, 1, 0, clock_timestamp());

-- Raises SC001 or SC002 when the stored transaction ids are not this cluster's; remembers a good answer per session.
CREATE FUNCTION soma.check_cluster() RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_stored bigint := (SELECT system_identifier FROM soma.cluster);
    v_actual bigint := (SELECT system_identifier FROM pg_control_system());
    v_newest xid8 := (SELECT pg_snapshot_xmax(snapshot) FROM soma.ticks ORDER BY tick_id DESC LIMIT 1);
BEGIN
    IF v_stored IS DISTINCT FROM v_actual THEN
        RAISE EXCEPTION 'this database belongs to cluster % and runs in cluster %', v_stored, v_actual
            USING ERRCODE = 'SC001', HINT = 'Run: somastack db repair';
    END IF;
    IF v_newest > pg_snapshot_xmax(pg_current_snapshot()) THEN
        RAISE EXCEPTION 'the newest tick reaches transaction % and this cluster is at %',
            v_newest, pg_snapshot_xmax(pg_current_snapshot())
            USING ERRCODE = 'SC002', HINT = 'Run: somastack db repair';
    END IF;
    PERFORM set_config('soma.cluster_checked', 'yes', false);
END $$;

-- The newest tick; a new one when something changed since. Call it in a transaction of its own: nothing read by the
-- tick may leave the database before that transaction has committed, and it commits synchronously.
CREATE FUNCTION soma.tick(p_min_age interval DEFAULT '2 milliseconds')
RETURNS TABLE (tick_id bigint, token bigint, snapshot text, position_before bigint, position_after bigint, era integer,
               era_start bigint)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    v_last   soma.ticks;
    v_before bigint;
    v_now    pg_snapshot;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'ticks are made in READ COMMITTED, not in %', current_setting('transaction_isolation')
            USING ERRCODE = 'SC004';
    END IF;
    IF NOT pg_is_in_recovery() AND pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'a tick is made in a transaction of its own, not after other writes' USING ERRCODE = 'SC004';
    END IF;
    IF current_setting('soma.cluster_checked', true) IS DISTINCT FROM 'yes' THEN
        PERFORM soma.check_cluster();
    END IF;
    SELECT * INTO v_last FROM soma.ticks ORDER BY tick_id DESC LIMIT 1;
    -- A standby's snapshots omit running transactions: there, the ticks of the primary count.
    IF NOT pg_is_in_recovery() AND soma.changed_since(v_last) AND clock_timestamp() - v_last.made_at NOT BETWEEN '0' AND p_min_age THEN
        -- Lock first, snapshot in a later statement: a snapshot older than the lock could be stored out of order.
        PERFORM pg_advisory_xact_lock(hashtextextended('soma.tick', 0));
        SELECT * INTO v_last FROM soma.ticks ORDER BY tick_id DESC LIMIT 1;
        IF soma.changed_since(v_last) THEN
            PERFORM set_config('synchronous_commit', 'on', true);
            v_before := soma.last_position();
            -- A snapshot's xmax is one above the newest transaction that has *ended*: above it others may be running,
            -- unlisted, with positions they took long ago. A subtransaction that gets an id and ends here lifts xmax
            -- above every id handed out before, so those that still run are listed, and ids at or above xmax are
            -- handed out, and their positions taken, after v_before was read.
            BEGIN
                PERFORM pg_logical_emit_message(true, 'soma', '');
                RAISE EXCEPTION USING ERRCODE = 'SC000', MESSAGE = 'lift xmax';
            EXCEPTION WHEN SQLSTATE 'SC000' THEN
                NULL;
            END;
            v_now := pg_current_snapshot();
            IF pg_snapshot_xmax(v_now) < pg_snapshot_xmax(v_last.snapshot)
               OR pg_snapshot_xmin(v_now) < pg_snapshot_xmin(v_last.snapshot) THEN
                RAISE EXCEPTION 'tick % is ahead of this cluster: % after %', v_last.tick_id, v_now, v_last.snapshot
                    USING ERRCODE = 'SC002', HINT = 'Run: somastack db repair';
            END IF;
            INSERT INTO soma.ticks
            VALUES (v_last.tick_id + 1, (random() * 9e18)::bigint, v_now, v_before, soma.last_position(), v_last.era,
                    v_last.era_start, clock_timestamp())
            RETURNING * INTO v_last;
        END IF;
    END IF;
    RETURN QUERY SELECT v_last.tick_id, v_last.token, v_last.snapshot::text, v_last.position_before,
                        v_last.position_after, v_last.era, v_last.era_start;
END $$;

-- The highest position handed out so far, committed or not.
CREATE FUNCTION soma.last_position() RETURNS bigint
LANGUAGE sql VOLATILE AS
$$ SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM soma.event_position $$;

-- Whether a new snapshot could show events that the tick does not: positions were handed out,
-- or a transaction that was running has ended.
CREATE FUNCTION soma.changed_since(p_tick soma.ticks) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_now pg_snapshot;
BEGIN
    IF soma.last_position() > p_tick.position_before THEN
        RETURN true;
    END IF;
    v_now := pg_current_snapshot();
    RETURN EXISTS (SELECT FROM pg_snapshot_xip(p_tick.snapshot) AS running (xid)
                   WHERE pg_visible_in_snapshot(running.xid, v_now));
END $$;

-- A reader (the relay, or a consumer of the log) is split into shards; lease, epoch and cursor belong to the shard.
-- The cursor: everything visible in from_tick is done, and of what to_tick adds, everything up to after_position.
-- to_tick is null between two ticks.
CREATE TABLE soma.shards (
    reader         text NOT NULL CHECK (reader <> ''),
    shard          smallint NOT NULL CHECK (shard >= 0),
    owner          text,
    epoch          bigint NOT NULL DEFAULT 0,
    leased_until   timestamptz NOT NULL DEFAULT '-infinity',
    from_tick      bigint NOT NULL DEFAULT 0,
    from_token     bigint NOT NULL DEFAULT 0,
    to_tick        bigint,
    to_token       bigint,
    after_position bigint NOT NULL DEFAULT 0,
    moved_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (reader, shard),
    CHECK ((to_tick IS NULL) = (to_token IS NULL))
) WITH (fillfactor = 50);

-- The workers of a reader that are alive, for sharing its shards fairly. Times are the database's.
CREATE TABLE soma.workers (
    reader      text NOT NULL,
    worker      text NOT NULL,
    alive_until timestamptz NOT NULL,
    PRIMARY KEY (reader, worker)
) WITH (fillfactor = 50);
