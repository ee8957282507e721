-- Rebuilds: new tables fill beside the old ones, and a swap puts them in their place together with the inbox that says
-- what is in them (decision 0008). And replays that read Kafka.

-- Whose rows of the inbox count for a consumer; null: those of its own number. A swap changes it.
ALTER TABLE soma.consumers ADD COLUMN inbox_id integer REFERENCES soma.consumers;

-- Which topic a stored offset is of, as far as the broker said; one that was made anew under its name has another id.
ALTER TABLE soma.consumer_offsets ADD COLUMN topic_id uuid;

-- A rebuild: which tables it fills, and where. After the swap old_inbox has rows that nobody needs any more.
CREATE TABLE soma.rebuilds (
    run_id      uuid PRIMARY KEY REFERENCES soma.replays,
    consumer_id integer NOT NULL REFERENCES soma.consumers,
    live_schema text NOT NULL,
    shadow      text NOT NULL,                    -- the schema of the new tables; the old ones go to shadow || '_old'
    tables      text[] NOT NULL CHECK (cardinality(tables) > 0),
    own_shape   boolean NOT NULL,                 -- the new tables are made by the caller's statements
    shape       text NOT NULL,                    -- of the live tables when the new ones were made
    old_inbox   integer REFERENCES soma.consumers,
    swapped_at  timestamptz,
    cleaned_at  timestamptz
);
-- One at a time, until what it left is cleaned away.
CREATE UNIQUE INDEX rebuilds_open_idx ON soma.rebuilds (consumer_id) WHERE cleaned_at IS NULL;

-- Letters whose events a rebuild has entered and not applied: the live consumer has not applied them either.
CREATE TABLE soma.replay_held (
    run_id    uuid NOT NULL REFERENCES soma.replays,
    letter_id uuid NOT NULL,
    PRIMARY KEY (run_id, letter_id)
);

-- Where a replay that reads Kafka stands. The end was the consumer's stored offset when the run was recorded; that of a
-- rebuild moves on.
CREATE TABLE soma.replay_offsets (
    run_id       uuid NOT NULL REFERENCES soma.replays,
    topic        text NOT NULL,
    partition    integer NOT NULL,
    first_offset bigint NOT NULL,
    next_offset  bigint NOT NULL,
    end_offset   bigint NOT NULL,
    PRIMARY KEY (run_id, topic, partition),
    CHECK (first_offset <= next_offset)
) WITH (fillfactor = 50);

-- The space of advisory locks in which a consumer's number stands for its inbox: shared by whoever claims, to the end of
-- the transaction, and exclusive for a swap.
CREATE FUNCTION soma.swap_locks() RETURNS integer
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN 1936682337;

-- As before, and: it enters into the inbox that is the consumer's now.
CREATE OR REPLACE FUNCTION soma.claim(
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
    v_inbox    integer;
BEGIN
    -- Assignments, not a query: that would cost as much as entering an event.
    v_setting := set_config('synchronous_commit', 'on', true);
    v_setting := set_config('idle_in_transaction_session_timeout', p_idle_timeout, true);
    IF p_lane <> 0 THEN
        PERFORM soma.count_batch(p_lane, p_batches);
    END IF;
    -- Until the end of this transaction nobody swaps the consumer's inbox; a swap that is under way is waited for. The
    -- look at the inbox's number comes after that, in a statement with a snapshot of its own.
    v_setting := pg_advisory_xact_lock_shared(soma.swap_locks(), p_consumer)::text;
    v_inbox := coalesce((SELECT c.inbox_id FROM soma.consumers c WHERE c.consumer_id = p_consumer), p_consumer);
    IF v_ids = 1 THEN
        -- The usual batch of an idle consumer: the number of rows says all.
        INSERT INTO soma.inbox (event_id, consumer_id, tenant_id, service_id)
        VALUES (p_ids[1], v_inbox, p_id_tenants[1], p_id_services[1])
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            fresh := '{}';
        END IF;
    ELSIF v_ids > 0 THEN
        WITH entered AS (
            INSERT INTO soma.inbox (event_id, consumer_id, tenant_id, service_id)
            SELECT e.id, v_inbox, e.tenant, e.service
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
            SELECT e.key, v_inbox, e.tenant, e.service, soma.now()
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

-- Records a rebuild with an inbox of its own.
CREATE FUNCTION soma.open_rebuild(
    p_run uuid, p_consumer integer, p_source text, p_filter json, p_end_tick bigint, p_end_token bigint,
    p_last bigint, p_rate double precision, p_by text, p_reason text, p_schema text, p_shadow text, p_tables text[],
    p_own boolean, p_shape text
) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_inbox integer;
BEGIN
    INSERT INTO soma.consumers (name) VALUES ('rebuild:' || p_run) RETURNING consumer_id INTO v_inbox;
    PERFORM soma.open_replay(p_run, p_consumer, v_inbox, 'rebuild', p_source, p_filter, NULL, p_end_tick, p_end_token,
                             1, p_last, p_rate, p_by, p_reason);
    INSERT INTO soma.rebuilds (run_id, consumer_id, live_schema, shadow, tables, own_shape, shape)
    VALUES (p_run, p_consumer, p_schema, p_shadow, p_tables, p_own, p_shape);
    RETURN v_inbox;
END $$;

-- Records where a replay that reads Kafka begins and ends.
CREATE FUNCTION soma.open_replay_offsets(
    p_run uuid, p_topics text[], p_partitions integer[], p_first bigint[], p_end bigint[]
) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    INSERT INTO soma.replay_offsets (run_id, topic, partition, first_offset, next_offset, end_offset)
    SELECT p_run, g.topic, g.number, g.first, g.first, g.until
    FROM unnest(p_topics, p_partitions, p_first, p_end) AS g (topic, number, first, until)
$$;

-- Moves a run in a partition of Kafka, in the transaction of its batch; false when it is not the caller's any more.
CREATE FUNCTION soma.save_replay_offset(
    p_run uuid, p_epoch bigint, p_lease interval, p_topic text, p_partition integer, p_next bigint, p_read bigint,
    p_applied bigint, p_repeated bigint, p_skipped bigint, p_held bigint
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_run    soma.replays;
    v_passed bigint;
BEGIN
    SELECT * INTO v_run FROM soma.replays r WHERE r.run_id = p_run FOR NO KEY UPDATE;
    UPDATE soma.replay_offsets o SET next_offset = p_next, end_offset = greatest(o.end_offset, p_next)
    WHERE o.run_id = p_run AND o.topic = p_topic AND o.partition = p_partition;
    SELECT sum(o.next_offset - o.first_offset) INTO v_passed FROM soma.replay_offsets o WHERE o.run_id = p_run;
    RETURN soma.save_replay(p_run, p_epoch, p_lease, v_run.from_tick, v_run.from_token, v_run.to_tick, v_run.to_token,
                            v_passed, p_read, p_applied, p_repeated, p_skipped, p_held);
END $$;

-- Begins a batch of a rebuild: holds off whoever pauses, cancels or takes the run, sends unqualified names to the new
-- tables, and ends the transaction of a process that falls silent. False when the run is not the caller's any more.
CREATE FUNCTION soma.begin_rebuilding(p_run uuid, p_epoch bigint, p_silence text) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_shadow text := (SELECT b.shadow FROM soma.rebuilds b WHERE b.run_id = p_run);
BEGIN
    PERFORM set_config('idle_in_transaction_session_timeout', p_silence, true),
            set_config('search_path', concat_ws(', ', quote_ident(v_shadow), nullif(current_setting('search_path'), '')), true);
    RETURN soma.hold_replay(p_run, p_epoch);
END $$;

CREATE FUNCTION soma.hold_replay(p_run uuid, p_epoch bigint) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH held AS (
        SELECT FROM soma.replays r WHERE r.run_id = p_run AND r.epoch = p_epoch AND r.state = 'running' FOR SHARE
    )
    SELECT EXISTS (SELECT FROM held)
$$;

-- Notes letters whose events this run has entered and not applied.
CREATE FUNCTION soma.hold_letters(p_run uuid, p_letters uuid[]) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    INSERT INTO soma.replay_held (run_id, letter_id) SELECT p_run, unnest(p_letters) ON CONFLICT DO NOTHING
$$;

-- Takes letters off that list in the transaction that applies their events; those that were still on it.
CREATE FUNCTION soma.free_letters(p_run uuid, p_letters uuid[]) RETURNS SETOF uuid
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    DELETE FROM soma.replay_held h WHERE h.run_id = p_run AND h.letter_id = ANY (p_letters) RETURNING h.letter_id
$$;

-- What this transaction of a rebuild has written to, beside its own tables: relations that it must leave alone. Temporary
-- tables are its own; sequences are shared.
CREATE FUNCTION soma.written_elsewhere(p_shadow text) RETURNS SETOF text
LANGUAGE sql VOLATILE AS $$
    SELECT DISTINCT format('%I.%I', n.nspname, c.relname)
    FROM pg_locks l
    JOIN pg_class c ON c.oid = l.relation
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
      AND c.relkind IN ('r', 'p', 'm') AND n.nspname <> p_shadow AND n.nspname NOT LIKE 'pg\_%'
      AND NOT (n.nspname = 'soma' AND (c.relname LIKE 'inbox%' OR c.relname IN ('replays', 'replay_held', 'replay_offsets',
                                                                                       'consumer_lanes')))
$$;

-- Why tables cannot be rebuilt; no row when they can. p_own: the new ones are made by the caller's statements, so only
-- what points to the old ones is in the way.
CREATE FUNCTION soma.rebuild_obstacles(p_schema text, p_tables text[], p_own boolean) RETURNS SETOF text
LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT w.name, c.oid, c.relkind, c.relpersistence, c.relrowsecurity, c.relreplident, c.relispartition, c.relowner, c.reltype
        FROM unnest(p_tables) AS w (name)
        LEFT JOIN pg_namespace n ON n.nspname = p_schema
        LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
    ), outside AS (  -- what names a table or its row type and would go on pointing to the old one
        SELECT w.name, pg_describe_object(d.classid, d.objid, d.objsubid) AS what
        FROM wanted w
        JOIN pg_depend d ON (d.refclassid = 'pg_class'::regclass AND d.refobjid = w.oid)
                         OR (d.refclassid = 'pg_type'::regclass
                             AND d.refobjid IN (w.reltype, (SELECT t.typarray FROM pg_type t WHERE t.oid = w.reltype)))
        WHERE d.deptype = 'n' AND d.classid <> 'pg_attrdef'::regclass
          AND NOT (d.classid = 'pg_constraint'::regclass AND EXISTS (
              SELECT FROM pg_constraint k JOIN wanted o ON o.oid = k.conrelid
              WHERE k.oid = d.objid AND (p_own OR (k.conrelid = w.oid AND k.contype <> 'f'))))
          AND NOT (d.classid IN ('pg_trigger'::regclass, 'pg_policy'::regclass))
          AND NOT (d.classid = 'pg_class'::regclass AND EXISTS (SELECT FROM pg_index i WHERE i.indexrelid = d.objid AND i.indrelid = w.oid))
    )
    SELECT format('%I.%I does not exist', p_schema, name) FROM wanted WHERE oid IS NULL
    UNION ALL
    SELECT format('%I is no plain table of its own', name) FROM wanted
    WHERE relkind <> 'r' OR relpersistence <> 'p' OR relispartition
       OR EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = wanted.oid OR i.inhparent = wanted.oid)
    UNION ALL
    SELECT format('%I belongs to another role', name) FROM wanted
    WHERE NOT pg_has_role(current_user, relowner, 'USAGE')
    UNION ALL
    SELECT format('%s points to %I', what, name) FROM outside
    UNION ALL
    SELECT format('publication %I names %I', p.pubname, w.name) FROM wanted w
    JOIN pg_publication_rel r ON r.prrelid = w.oid JOIN pg_publication p ON p.oid = r.prpubid
    UNION ALL
    SELECT format('%I has foreign key %I', w.name, k.conname) FROM wanted w
    JOIN pg_constraint k ON k.conrelid = w.oid AND k.contype = 'f' WHERE NOT p_own
    UNION ALL
    SELECT format('%I has trigger %I', w.name, t.tgname) FROM wanted w
    JOIN pg_trigger t ON t.tgrelid = w.oid AND NOT t.tgisinternal WHERE NOT p_own
    UNION ALL
    SELECT format('%I has rules, row security or a replica identity', name) FROM wanted
    WHERE NOT p_own AND (relrowsecurity OR relreplident <> 'd'
                         OR EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = wanted.oid))
    UNION ALL
    SELECT format('%I has grants on columns', name) FROM wanted
    WHERE NOT p_own AND EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = wanted.oid AND a.attacl IS NOT NULL)
    UNION ALL
    SELECT format('role %I may not create schemas in this database', current_user)
    WHERE NOT has_database_privilege(current_database(), 'CREATE')
    UNION ALL
    SELECT format('role %I may not create tables in schema %I', current_user, n.nspname) FROM pg_namespace n
    WHERE n.nspname = p_schema AND NOT has_schema_privilege(n.oid, 'CREATE')
$$;

-- What tables look like: equal texts, equal tables.
CREATE FUNCTION soma.shape_of(p_schema text, p_tables text[]) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog AS $$
    SELECT md5(coalesce(string_agg(described, E'\n' ORDER BY described), ''))
    FROM (
        SELECT format('%s column %s %s %s %s', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                      pg_get_expr(d.adbin, d.adrelid)) AS described
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = to_regnamespace(quote_ident(p_schema)) AND c.relname = ANY (p_tables)
        UNION ALL
        SELECT format('%s index %s', c.relname, pg_get_indexdef(i.indexrelid))
        FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid
        WHERE c.relnamespace = to_regnamespace(quote_ident(p_schema)) AND c.relname = ANY (p_tables)
        UNION ALL
        SELECT format('%s constraint %s %s', c.relname, k.conname, pg_get_constraintdef(k.oid))
        FROM pg_class c JOIN pg_constraint k ON k.conrelid = c.oid
        WHERE c.relnamespace = to_regnamespace(quote_ident(p_schema)) AND c.relname = ANY (p_tables)
    ) parts
$$;

-- Makes an empty table like another one: columns, defaults, constraints, indexes under their names, storage, comments.
CREATE FUNCTION soma.make_shadow(p_schema text, p_table text, p_shadow text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog AS $$
DECLARE
    v_old  oid := format('%I.%I', p_schema, p_table)::regclass;
    v_new  text := format('%I.%I', p_shadow, p_table);
    v_each record;
BEGIN
    EXECUTE format('CREATE TABLE %s (LIKE %I.%I INCLUDING ALL EXCLUDING INDEXES)', v_new, p_schema, p_table);
    FOR v_each IN SELECT k.conname, pg_get_constraintdef(k.oid) AS definition FROM pg_constraint k
                  WHERE k.conrelid = v_old AND k.contype IN ('p', 'u', 'x') ORDER BY k.contype, k.conname
    LOOP
        EXECUTE format('ALTER TABLE %s ADD CONSTRAINT %I %s', v_new, v_each.conname, v_each.definition);
    END LOOP;
    FOR v_each IN SELECT pg_get_indexdef(i.indexrelid) AS definition FROM pg_index i
                  WHERE i.indrelid = v_old AND i.indisvalid
                    AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = v_old)
    LOOP
        -- The first " ON schema.table " is the table; an index's name comes before it, quoted where it must be.
        EXECUTE overlay(v_each.definition PLACING format(' ON %s ', v_new)
                        FROM strpos(v_each.definition, format(' ON %I.%I ', p_schema, p_table))
                        FOR length(format(' ON %I.%I ', p_schema, p_table)));
    END LOOP;
    FOR v_each IN SELECT o.option_name, o.option_value FROM pg_class c, pg_options_to_table(c.reloptions) o WHERE c.oid = v_old
    LOOP
        EXECUTE format('ALTER TABLE %s SET (%I = %L)', v_new, v_each.option_name, v_each.option_value);
    END LOOP;
END $$;

-- Makes the new tables by the caller's statements, by bare names. COMMIT and ROLLBACK are no statements of a function.
CREATE FUNCTION soma.make_own(p_statements text, p_shadow text) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM set_config('search_path', concat_ws(', ', quote_ident(p_shadow), nullif(current_setting('search_path'), '')), true);
    EXECUTE p_statements;
END $$;

-- Gives a new table the owner and the grants of the old one.
CREATE FUNCTION soma.copy_rights(p_schema text, p_table text, p_shadow text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog AS $$
DECLARE
    v_old  oid := format('%I.%I', p_schema, p_table)::regclass;
    v_new  text := format('%I.%I', p_shadow, p_table);
    v_each record;
BEGIN
    FOR v_each IN SELECT DISTINCT a.grantee FROM pg_class c, aclexplode(c.relacl) a
                  WHERE c.oid = v_new::regclass AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s', v_new, coalesce(quote_ident(pg_get_userbyid(nullif(v_each.grantee, 0))), 'PUBLIC'));
    END LOOP;
    FOR v_each IN SELECT a.grantee, a.privilege_type, a.is_grantable FROM pg_class c, aclexplode(c.relacl) a
                  WHERE c.oid = v_old AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT %s ON %s TO %s%s', v_each.privilege_type, v_new,
                       coalesce(quote_ident(pg_get_userbyid(nullif(v_each.grantee, 0))), 'PUBLIC'),
                       CASE WHEN v_each.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
    FOR v_each IN SELECT o.relowner FROM pg_class o JOIN pg_class n ON n.oid = v_new::regclass
                  WHERE o.oid = v_old AND o.relowner <> n.relowner
    LOOP
        EXECUTE format('ALTER TABLE %s OWNER TO %I', v_new, pg_get_userbyid(v_each.relowner));
    END LOOP;
END $$;

-- Begins the transaction of a swap: when this returns true, no batch of the consumer is in flight, none begins, and the
-- run is the caller's. Gives up with lock_not_available after p_patience, here and at the tables. A process that is
-- stopped in the swap must not keep the consumer waiting: PostgreSQL ends it after p_most, or (before version 17) after
-- p_silence.
CREATE FUNCTION soma.begin_swap(p_run uuid, p_epoch bigint, p_patience text, p_silence text, p_most text) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF current_setting('server_version_num')::integer >= 170000 THEN
        PERFORM set_config('transaction_timeout', p_most, true);
    END IF;
    PERFORM set_config('lock_timeout', p_patience, true);
    PERFORM pg_advisory_xact_lock(soma.swap_locks(), r.consumer_id) FROM soma.replays r WHERE r.run_id = p_run;
    RETURN soma.begin_rebuilding(p_run, p_epoch, p_silence);
END $$;

-- Puts the new tables in the place of the old ones, which go to a schema of their own.
CREATE FUNCTION soma.swap_tables(p_run uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog AS $$
DECLARE
    v_run     soma.rebuilds := (SELECT b FROM soma.rebuilds b WHERE b.run_id = p_run);
    v_table   text;
    v_serials oid[];
    v_each    record;
BEGIN
    -- In one order, so that two swaps cannot deadlock.
    FOR v_table IN SELECT t FROM unnest(v_run.tables) t ORDER BY t COLLATE "C" LOOP
        EXECUTE format('LOCK TABLE %I.%I IN ACCESS EXCLUSIVE MODE', v_run.live_schema, v_table);
    END LOOP;
    FOREACH v_table IN ARRAY v_run.tables LOOP
        -- Sequences of serial columns stay where they are, and belong to the new table where that draws from them.
        v_serials := ARRAY(SELECT d.objid FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
                           WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
                             AND d.deptype = 'a' AND d.refobjid = format('%I.%I', v_run.live_schema, v_table)::regclass);
        FOR v_each IN SELECT s::regclass AS sequence FROM unnest(v_serials) s LOOP
            EXECUTE format('ALTER SEQUENCE %s OWNED BY NONE', v_each.sequence);
        END LOOP;
        EXECUTE format('ALTER TABLE %I.%I SET SCHEMA %I', v_run.live_schema, v_table, v_run.shadow || '_old');
        EXECUTE format('ALTER TABLE %I.%I SET SCHEMA %I', v_run.shadow, v_table, v_run.live_schema);
        FOR v_each IN
            SELECT d.refobjid::regclass AS sequence, a.attname
            FROM pg_attrdef f JOIN pg_attribute a ON a.attrelid = f.adrelid AND a.attnum = f.adnum
            JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid
                            AND d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY (v_serials)
            WHERE f.adrelid = format('%I.%I', v_run.live_schema, v_table)::regclass
        LOOP
            EXECUTE format('ALTER SEQUENCE %s OWNED BY %I.%I.%I', v_each.sequence, v_run.live_schema, v_table, v_each.attname);
        END LOOP;
    END LOOP;
END $$;

-- The run's inbox becomes the consumer's, and the run is done. Under the lock of begin_swap.
CREATE FUNCTION soma.adopt_inbox(p_run uuid, p_epoch bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_run soma.replays;
BEGIN
    IF NOT soma.turn_replay(p_run, ARRAY['running'], 'done', p_epoch, NULL) THEN
        RETURN false;
    END IF;
    SELECT * INTO STRICT v_run FROM soma.replays r WHERE r.run_id = p_run;
    UPDATE soma.rebuilds b
    SET swapped_at = soma.now(), old_inbox = (SELECT coalesce(c.inbox_id, c.consumer_id) FROM soma.consumers c
                                              WHERE c.consumer_id = v_run.consumer_id)
    WHERE b.run_id = p_run;
    UPDATE soma.consumers c
    SET inbox_id = v_run.inbox_id,
        inbox_horizon = greatest(c.inbox_horizon, (SELECT n.inbox_horizon FROM soma.consumers n WHERE n.consumer_id = v_run.inbox_id))
    WHERE c.consumer_id = v_run.consumer_id;
    RETURN true;
END $$;

-- Deletes rows of an inbox that nobody needs any more, a few thousand at a time: of the ids behind p_after; the last id
-- that was looked at, null at the end.
CREATE FUNCTION soma.clean_inbox(p_inbox integer, p_after uuid, p_most integer) RETURNS uuid
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH page AS MATERIALIZED (
        SELECT i.event_id FROM soma.inbox i WHERE i.event_id > p_after ORDER BY i.event_id LIMIT p_most
    ), gone AS (
        DELETE FROM soma.inbox i USING (SELECT DISTINCT event_id FROM page) p
        WHERE i.event_id = p.event_id AND i.consumer_id = p_inbox
    )
    SELECT event_id FROM page ORDER BY event_id DESC LIMIT 1
$$;

-- The same for given keys; how many went.
CREATE FUNCTION soma.clean_inbox_keys(p_inbox integer, p_most integer) RETURNS integer
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    WITH gone AS (
        DELETE FROM soma.inbox_keys k
        WHERE k.ctid = ANY (ARRAY(SELECT f.ctid FROM soma.inbox_keys f WHERE f.consumer_id = p_inbox LIMIT p_most))
        RETURNING 1
    )
    SELECT count(*)::integer FROM gone
$$;

-- A rebuild's remains are gone: another one of its consumer may begin.
CREATE FUNCTION soma.rebuild_cleaned(p_run uuid) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    DELETE FROM soma.replay_held h WHERE h.run_id = p_run;
    DELETE FROM soma.consumer_lanes l USING soma.replays r WHERE r.run_id = p_run AND l.consumer_id = r.inbox_id;
    UPDATE soma.rebuilds b SET cleaned_at = soma.now() WHERE b.run_id = p_run AND b.cleaned_at IS NULL
$$;

REVOKE EXECUTE ON FUNCTION
    soma.open_rebuild(uuid, integer, text, json, bigint, bigint, bigint, double precision, text, text, text, text,
                      text[], boolean, text),
    soma.open_replay_offsets(uuid, text[], integer[], bigint[], bigint[]),
    soma.save_replay_offset(uuid, bigint, interval, text, integer, bigint, bigint, bigint, bigint, bigint, bigint),
    soma.hold_replay(uuid, bigint), soma.hold_letters(uuid, uuid[]), soma.free_letters(uuid, uuid[]),
    soma.adopt_inbox(uuid, bigint), soma.clean_inbox(integer, uuid, integer), soma.clean_inbox_keys(integer, integer),
    soma.rebuild_cleaned(uuid) FROM PUBLIC;
