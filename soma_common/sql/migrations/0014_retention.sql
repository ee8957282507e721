-- Retention (decision 0011): archives of the log, where the log begins, and what is swept away beside it.
-- The functions that remove run with their caller's rights: only the owner of the tables can use them.

-- From where on the log is whole: a reader whose cursor stands at or behind tick_id misses nothing that was removed.
CREATE TABLE soma.log_start (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    log_id   uuid NOT NULL DEFAULT gen_random_uuid(),       -- archives name the log they are of
    tick_id  bigint NOT NULL DEFAULT 0
);
INSERT INTO soma.log_start DEFAULT VALUES;

-- One row per archive, from its beginning to the removal of what it holds. Who removed what, when, and why.
CREATE TABLE soma.archives (
    archive_id      uuid PRIMARY KEY,
    lower_position  bigint NOT NULL,              -- the partition: from here …
    upper_position  bigint NOT NULL CHECK (upper_position > lower_position),    -- … up to, and not with, here
    event_types     text[] NOT NULL CHECK (cardinality(event_types) > 0),
    whole           boolean NOT NULL,             -- all that the partition holds: it is dropped, not thinned out
    state           text NOT NULL DEFAULT 'exporting'
                    CHECK (state IN ('exporting', 'verified', 'removing', 'removed')),
    location        text NOT NULL,
    tick_id         bigint NOT NULL,              -- it shows all that was ever written to the partition
    events          bigint,
    bytes           bigint,
    first_position  bigint,
    last_position   bigint,
    first_timestamp timestamptz,
    last_timestamp  timestamptz,
    manifest_sha256 text,
    made_by         text NOT NULL,
    started_at      timestamptz NOT NULL,
    verified_at     timestamptz,
    removed_at      timestamptz,
    forced_by       text,
    forced_why      text,
    overtaken       text[],                       -- readers that had not passed it when it was forced
    CHECK (state = 'exporting' OR (events > 0 AND manifest_sha256 IS NOT NULL AND last_position IS NOT NULL)),
    CHECK ((forced_by IS NULL) = (forced_why IS NULL))
);
CREATE UNIQUE INDEX archives_open_idx ON soma.archives (lower_position) WHERE state <> 'removed';
CREATE INDEX archives_position_idx ON soma.archives (last_position);

-- Readers that go on although something was removed before them, by somebody's word.
CREATE TABLE soma.reader_gaps (
    reader      text PRIMARY KEY CHECK (reader <> ''),
    tick_id     bigint NOT NULL,                  -- what was removed up to this tick is accepted
    accepted_by text NOT NULL CHECK (accepted_by <> ''),
    reason      text NOT NULL CHECK (reason <> ''),
    accepted_at timestamptz NOT NULL
);

-- One retention run at a time. A lease and not an advisory lock: those stack, and break behind a transaction pooler.
CREATE TABLE soma.retention_lease (
    only_row     boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    owner        uuid,
    who          text,
    leased_until timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 50);
INSERT INTO soma.retention_lease DEFAULT VALUES;

-- Transactions below ended_xid had ended at made_at: how old a row of the inbox is, which holds no time of its own.
CREATE TABLE soma.retention_marks (
    made_at   timestamptz PRIMARY KEY,
    ended_xid xid8 NOT NULL,
    era       integer NOT NULL
);

CREATE INDEX dead_letters_settled_idx ON soma.dead_letters (changed_at) WHERE status IN ('resolved', 'discarded');

-- Part of every statement that reads a diff, so that it cannot miss removed events in silence: the log's start is moved
-- and committed before anything goes, and a statement that no longer sees a row sees the new start.
CREATE FUNCTION soma.require_read(p_reader text, p_from_tick bigint) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_start bigint := (SELECT s.tick_id FROM soma.log_start s);
BEGIN
    IF v_start > p_from_tick AND NOT EXISTS (SELECT FROM soma.reader_gaps g
                                             WHERE g.reader = p_reader AND g.tick_id >= v_start) THEN
        RAISE EXCEPTION '% stands at tick %, and events after it went into archives: the log is whole from tick % on',
            coalesce(p_reader, 'this reader'), p_from_tick, v_start USING ERRCODE = 'SC006';
    END IF;
    RETURN true;
END $$;

-- The same for those who read by position: nothing between two positions (the first one excluded) was removed.
CREATE FUNCTION soma.require_kept(p_low bigint, p_high bigint, p_event_type text) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_until bigint := (
        SELECT max(a.last_position) FROM soma.archives a
        WHERE a.state IN ('removing', 'removed') AND a.last_position > p_low AND a.first_position <= p_high
          AND (p_event_type IS NULL OR p_event_type = ANY (a.event_types)));
BEGIN
    IF v_until IS NOT NULL THEN
        RAISE EXCEPTION 'events up to position % went into archives', v_until USING ERRCODE = 'SC006';
    END IF;
    RETURN true;
END $$;

-- The partitions of the log. upper_position is null for the last one.
CREATE FUNCTION soma.event_partitions()
RETURNS TABLE (name text, lower_position bigint, upper_position bigint, bytes bigint)
LANGUAGE sql STABLE AS $$
    SELECT c.relname::text, coalesce(substring(b.bound FROM 'FROM \(''(\d+)''\)')::bigint, 0),
           substring(b.bound FROM 'TO \(''(\d+)''\)')::bigint, pg_total_relation_size(c.oid)
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    CROSS JOIN LATERAL pg_get_expr(c.relpartbound, c.oid) AS b (bound)
    WHERE i.inhparent = 'soma.events'::regclass
    ORDER BY 2
$$;

-- The first tick that shows everything that was ever written below a position; null while somebody may still write
-- there. Transactions at or above a tick's xmax have positions above its position_before, those below are listed as
-- running or have ended: when a tick lies behind the position and all that ran then has ended, nothing can come.
CREATE FUNCTION soma.complete_tick(p_upper bigint) RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_era   record;
    v_left  record;
BEGIN
    SELECT t.era, t.era_start INTO v_era FROM soma.ticks t ORDER BY t.tick_id DESC LIMIT 1;
    IF v_era.era_start >= p_upper - 1 THEN
        -- Nobody wrote while the era was changed: its first tick shows all that lies before it.
        RETURN (SELECT min(t.tick_id) FROM soma.ticks t WHERE t.era_start >= p_upper - 1);
    END IF;
    SELECT t.tick_id, t.snapshot INTO v_left FROM soma.ticks t
    WHERE t.era = v_era.era AND t.position_before >= p_upper - 1 ORDER BY t.tick_id LIMIT 1;
    RETURN (SELECT t.tick_id FROM soma.ticks t
            WHERE t.era = v_era.era AND t.tick_id >= v_left.tick_id
              AND NOT EXISTS (SELECT FROM pg_snapshot_xip(v_left.snapshot) AS running (xid)
                              WHERE NOT pg_visible_in_snapshot(running.xid, t.snapshot))
            ORDER BY t.tick_id LIMIT 1);
END $$;

-- Who has not passed a part of the log: readers by their tick, open replays by their position.
CREATE FUNCTION soma.not_passed(p_tick bigint, p_lower bigint, p_upper bigint) RETURNS text[]
LANGUAGE sql STABLE AS $$
    SELECT coalesce(array_agg(b.reader ORDER BY b.reader), '{}') FROM (
        SELECT DISTINCT s.reader FROM soma.shards s
        WHERE s.reader NOT LIKE 'replay:%'
          AND (s.from_tick < p_tick
               OR NOT EXISTS (SELECT FROM soma.ticks t WHERE t.tick_id = s.from_tick AND t.token = s.from_token))
        UNION ALL
        SELECT 'replay:' || r.run_id FROM soma.replays r
        WHERE r.source = 'log' AND r.state NOT IN ('done', 'cancelled')
          AND r.first_position < p_upper AND (r.mode = 'rebuild' OR r.last_position >= p_lower)
          AND r.after_position < p_upper - 1
    ) b
$$;

-- Raises SC007 unless the lease is the caller's; holds it until the end of the transaction. One that is over and that
-- nobody else took is the caller's still.
CREATE FUNCTION soma.fence_retention(p_owner uuid) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM FROM soma.retention_lease l WHERE l.owner = p_owner FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'another retention run has taken over' USING ERRCODE = 'SC007';
    END IF;
END $$;

-- Moves the log's start behind a verified archive, so that what it holds may go. Returns the readers that have not
-- passed it: then nothing was done, unless p_forced_by and p_why say who takes that upon himself.
CREATE FUNCTION soma.begin_removal(p_owner uuid, p_archive uuid, p_forced_by text, p_why text) RETURNS text[]
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_archive soma.archives;
    v_behind  text[];
BEGIN
    PERFORM soma.fence_retention(p_owner);
    PERFORM set_config('synchronous_commit', 'on', true);
    SELECT * INTO STRICT v_archive FROM soma.archives a
    WHERE a.archive_id = p_archive AND a.state IN ('verified', 'removing') FOR UPDATE;
    IF v_archive.state = 'removing' THEN
        RETURN '{}';
    END IF;
    v_behind := soma.not_passed(v_archive.tick_id, v_archive.lower_position, v_archive.upper_position);
    IF cardinality(v_behind) > 0 AND p_forced_by IS NULL THEN
        RETURN v_behind;
    END IF;
    UPDATE soma.archives
    SET state = 'removing', forced_by = CASE WHEN cardinality(v_behind) > 0 THEN p_forced_by END,
        forced_why = CASE WHEN cardinality(v_behind) > 0 THEN p_why END, overtaken = v_behind
    WHERE archive_id = p_archive;
    UPDATE soma.log_start SET tick_id = greatest(tick_id, v_archive.tick_id);
    RETURN '{}';
END $$;

-- Drops the partition that an archive holds as a whole: 'dropped', 'busy' (a lock was not to be had at once; waiting
-- would make every append wait behind), or 'different' (it holds another number of events: nothing was done).
CREATE FUNCTION soma.drop_archived(p_owner uuid, p_archive uuid, p_lock_timeout interval DEFAULT '100 milliseconds')
RETURNS text
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_archive soma.archives;
    v_part    text;
    v_events  bigint;
BEGIN
    PERFORM soma.fence_retention(p_owner);
    PERFORM set_config('synchronous_commit', 'on', true);
    PERFORM set_config('lock_timeout', extract(milliseconds FROM p_lock_timeout)::integer::text, true);
    SELECT * INTO STRICT v_archive FROM soma.archives a
    WHERE a.archive_id = p_archive AND a.state = 'removing' AND a.whole FOR UPDATE;
    SELECT p.name INTO v_part FROM soma.event_partitions() p
    WHERE p.lower_position = v_archive.lower_position AND p.upper_position = v_archive.upper_position;
    IF v_part IS NULL THEN
        RETURN 'different';
    END IF;
    -- Nobody writes there any more, and while this lock is held nobody can. It stops no reader and no append.
    EXECUTE format('LOCK TABLE soma.%I IN SHARE MODE', v_part);
    EXECUTE format('SELECT count(*) FROM soma.%I', v_part) INTO v_events;
    IF v_events <> v_archive.events THEN
        RETURN 'different';
    END IF;
    -- From here to the end of the transaction appends and readers wait: a few milliseconds.
    LOCK TABLE ONLY soma.events IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('ALTER TABLE soma.events DETACH PARTITION soma.%I', v_part);
    EXECUTE format('DROP TABLE soma.%I', v_part);
    UPDATE soma.archives SET state = 'removed', removed_at = soma.now() WHERE archive_id = p_archive;
    RETURN 'dropped';
EXCEPTION WHEN lock_not_available THEN
    RETURN 'busy';
END $$;

-- Deletes some events of one type that an archive holds, in order of position, from behind a position on. Returns how
-- many, and the last position; none: that type is done.
CREATE FUNCTION soma.thin_archived(p_owner uuid, p_archive uuid, p_event_type text, p_after bigint, p_most integer)
RETURNS TABLE (removed integer, last_position bigint)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_part text;
BEGIN
    PERFORM soma.fence_retention(p_owner);
    PERFORM set_config('soma.removing', p_archive::text, true);      -- refuse_change lets these go, and no others
    SELECT p.name INTO STRICT v_part FROM soma.event_partitions() p
    JOIN soma.archives a ON a.lower_position = p.lower_position AND a.upper_position = p.upper_position
    WHERE a.archive_id = p_archive AND a.state = 'removing' AND NOT a.whole;
    RETURN QUERY EXECUTE format(
        'WITH gone AS (DELETE FROM soma.%1$I WHERE position = ANY (ARRAY('
        '    SELECT e.position FROM soma.%1$I e WHERE e.event_type = $1 AND e.position > $2'
        '    ORDER BY e.position LIMIT $3)) RETURNING position) '
        'SELECT count(*)::integer, max(position) FROM gone', v_part)
        USING p_event_type, p_after, p_most;
END $$;

-- As before, but for events that a verified archive holds and every reader has passed: the database itself keeps what
-- is nowhere else.
CREATE OR REPLACE FUNCTION soma.refuse_change() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND coalesce(current_setting('soma.removing', true), '') <> '' THEN
        PERFORM FROM soma.archives a
        WHERE a.archive_id::text = current_setting('soma.removing', true) AND a.state = 'removing'
          AND OLD.position BETWEEN a.first_position AND a.last_position AND OLD.event_type = ANY (a.event_types);
        IF FOUND THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION 'events are append-only: % on %.% is refused', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'SC003', HINT = 'Record a new event that corrects the old one.';
END $$;

-- The smallest UUIDv7 of a moment.
CREATE FUNCTION soma.uuid_at(p_at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (lpad(to_hex((extract(epoch FROM p_at) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;

-- The partitions of the inbox. Their names tell their lower bounds in seconds; until_id is null for the last one.
CREATE FUNCTION soma.inbox_partitions() RETURNS TABLE (name text, from_id uuid, until_id uuid, bytes bigint)
LANGUAGE sql STABLE AS $$
    SELECT c.relname::text, substring(b.bound FROM 'FROM \(''([0-9a-f-]+)''\)')::uuid,
           substring(b.bound FROM 'TO \(''([0-9a-f-]+)''\)')::uuid, pg_relation_size(c.oid)
    FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
    CROSS JOIN LATERAL pg_get_expr(c.relpartbound, c.oid) AS b (bound)
    WHERE i.inhparent = 'soma.inbox'::regclass
    ORDER BY 2 NULLS FIRST
$$;

-- Bounds the open partition of the inbox one step ahead of now, and begins a new one behind it. Returns how many were
-- made; gives up at once when the lock is not free. The lock lasts for a scan of the partition that is bounded: nearly
-- empty, but for the first time on a database that was never kept.
CREATE FUNCTION soma.maintain_inbox(
    p_step interval DEFAULT '7 days', p_lock_timeout interval DEFAULT '100 milliseconds'
) RETURNS integer
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_tail  record;
    v_until timestamptz;
    v_name  text;
    v_made  integer := 0;
BEGIN
    PERFORM set_config('lock_timeout', extract(milliseconds FROM p_lock_timeout)::integer::text, true);
    LOOP
        SELECT * INTO STRICT v_tail FROM soma.inbox_partitions() p WHERE p.until_id IS NULL;
        EXIT WHEN v_tail.from_id >= soma.uuid_at(soma.now() + p_step);
        v_until := date_trunc('hour', soma.now()) + p_step;
        IF v_tail.from_id >= soma.uuid_at(v_until) OR v_tail.from_id >= soma.uuid_at(soma.now()) THEN
            v_until := v_until + p_step;
        END IF;
        v_name := 'inbox_t' || extract(epoch FROM v_until)::bigint;
        BEGIN
            LOCK TABLE ONLY soma.inbox IN ACCESS EXCLUSIVE MODE;
            EXECUTE format('ALTER TABLE soma.inbox DETACH PARTITION soma.%I', v_tail.name);
            EXECUTE format('CREATE TABLE soma.%I (LIKE soma.%I INCLUDING ALL)', v_name, v_tail.name);
            -- Ids of the far future, which a wrong clock made.
            EXECUTE format('WITH far AS (DELETE FROM soma.%I WHERE event_id >= $1 RETURNING *) '
                           'INSERT INTO soma.%I SELECT * FROM far', v_tail.name, v_name) USING soma.uuid_at(v_until);
            EXECUTE format('ALTER TABLE soma.inbox ATTACH PARTITION soma.%I FOR VALUES FROM (%s) TO (%L)', v_tail.name,
                           coalesce(quote_literal(v_tail.from_id), 'MINVALUE'), soma.uuid_at(v_until));
            EXECUTE format('ALTER TABLE soma.inbox ATTACH PARTITION soma.%I FOR VALUES FROM (%L) TO (MAXVALUE)', v_name,
                           soma.uuid_at(v_until));
            v_made := v_made + 1;
        EXCEPTION WHEN lock_not_available THEN
            RETURN v_made;
        END;
    END LOOP;
    RETURN v_made;
END $$;

-- Empties one partition of the inbox. Rows that were written at or after p_mark stay, whatever the age of their ids: an
-- event that was applied a moment ago may still be delivered again. Returns how many stayed; -1 when there are too many
-- of them (it was left as it is), -2 when a lock was not to be had at once.
CREATE FUNCTION soma.empty_inbox(
    p_name text, p_until uuid, p_mark xid8, p_most integer DEFAULT 10000,
    p_lock_timeout interval DEFAULT '100 milliseconds'
) RETURNS integer
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_next constant bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
    v_low  constant bigint := 4294967295;
    v_kept soma.inbox[];
BEGIN
    PERFORM set_config('synchronous_commit', 'on', true);
    PERFORM set_config('lock_timeout', extract(milliseconds FROM p_lock_timeout)::integer::text, true);
    PERFORM FROM soma.inbox_partitions() p WHERE p.name = p_name AND p.until_id <= p_until;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'partition % of the inbox does not end before %', p_name, p_until USING ERRCODE = 'SC005';
    END IF;
    EXECUTE format('LOCK TABLE soma.%I IN ACCESS EXCLUSIVE MODE', p_name);
    -- xmin has 32 bits: the newest transaction with them that is not in the future. Where the counter came round, an old
    -- row may look new, and stays for once.
    EXECUTE format('SELECT array_agg(k) FROM (SELECT i::soma.inbox AS k FROM soma.%I i '
                   'WHERE $1 - ((($1 & $2) - i.xmin::text::bigint) & $2) >= $3 LIMIT $4) late', p_name)
        INTO v_kept USING v_next, v_low, p_mark::text::bigint, p_most + 1;
    IF cardinality(v_kept) > p_most THEN
        RETURN -1;
    END IF;
    EXECUTE format('TRUNCATE soma.%I', p_name);
    INSERT INTO soma.inbox SELECT (unnest(v_kept)).*;
    RETURN coalesce(cardinality(v_kept), 0);
EXCEPTION WHEN lock_not_available THEN
    RETURN -2;
END $$;

REVOKE EXECUTE ON FUNCTION
    soma.fence_retention(uuid), soma.begin_removal(uuid, uuid, text, text), soma.drop_archived(uuid, uuid, interval),
    soma.thin_archived(uuid, uuid, text, bigint, integer), soma.maintain_inbox(interval, interval),
    soma.empty_inbox(text, uuid, xid8, integer, interval) FROM PUBLIC;
