-- The append: one call, inside the caller's transaction.

-- Expected versions: -2 any, -1 the stream exists, 0 no such stream, n exactly version n.
--
-- Arrays of the first group have one element per stream (sorted by key, no duplicates), those of the second one per
-- event; p_stream is the event's place in the first group, p_offset its place among the events of its stream (1, 2, …).
-- p_topics, p_values: null when no outbox row is wanted.
--
-- p_again: an earlier call with these events had an unknown outcome. Under the locks they are looked up first. The
-- earlier call can no longer succeed later: its stamps are not after those that this call leaves in the streams.
--
-- Outcomes (first column):
--   appended       one row per event, in order
--   duplicate      one row per event that is known (by its idempotency key, or with p_again by its id);
--                  nothing was written, the others may be sent again
--   wrong_version  one row per stream; version = what it is at. Nothing was written; locks of streams that exist are kept
--   stale          one row per stream; stamp = its last timestamp. Nothing was written, the locks are kept
--   clock_ahead    one row; stamp = the database's clock. Nothing was written
CREATE FUNCTION soma.append(
    p_services text[], p_client_now timestamptz,
    p_tenants text[], p_aggregate_types text[], p_aggregate_ids text[], p_key_hashes integer[],
    p_expected bigint[], p_counts bigint[], p_first timestamptz[], p_last timestamptz[],
    p_stream integer[], p_offset bigint[], p_event_ids uuid[], p_event_types text[], p_schema_versions integer[],
    p_correlation_ids text[], p_causation_ids text[], p_idempotency_keys text[],
    p_traceparents text[], p_tracestates text[], p_baggage text[],
    p_timestamps timestamptz[], p_occurred timestamptz[], p_payloads text[], p_metadata text[],
    p_topics text[], p_keys bytea[], p_values bytea[], p_headers text[], p_again boolean
) RETURNS TABLE (outcome text, ordinal integer, event_position bigint, stream_version bigint, stamp timestamptz,
                 recorded timestamptz, transaction_id text, first_event_id uuid)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    v_now       timestamptz := soma.now();
    v_xid       xid8;
    v_keyed     boolean := p_idempotency_keys IS NOT NULL;
    v_streams   bigint[];
    v_bases     bigint[];
    v_stream    bigint;
    v_version   bigint;
    v_last      timestamptz;
    v_positions bigint[];
    v_keys      text[];
    v_key_tenants text[];
BEGIN
    IF current_setting('soma.cluster_checked', true) IS DISTINCT FROM 'yes' THEN
        PERFORM soma.check_cluster();
    END IF;
    IF p_client_now > v_now + interval '60 seconds' THEN
        RETURN QUERY SELECT 'clock_ahead', 1, NULL::bigint, NULL::bigint, v_now, v_now, NULL::text, NULL::uuid;
        RETURN;
    END IF;

    IF cardinality(p_tenants) = 1 AND NOT v_keyed AND NOT p_again THEN
        -- One stream: check, lock and advance it in one statement.
        IF p_expected[1] IN (-2, 0) THEN
            INSERT INTO soma.streams AS s
                (tenant_id, aggregate_type, aggregate_id, key_hash, version, last_timestamp)
            VALUES (p_tenants[1], p_aggregate_types[1], p_aggregate_ids[1], p_key_hashes[1], p_counts[1], p_last[1])
            ON CONFLICT (tenant_id, aggregate_type, aggregate_id) DO UPDATE
                SET version = s.version + excluded.version, last_timestamp = excluded.last_timestamp
                WHERE s.last_timestamp < p_first[1] AND (p_expected[1] = -2 OR s.version = 0)
            RETURNING stream_id, version INTO v_stream, v_version;
        ELSE
            UPDATE soma.streams SET version = version + p_counts[1], last_timestamp = p_last[1]
            WHERE tenant_id = p_tenants[1] AND aggregate_type = p_aggregate_types[1] AND aggregate_id = p_aggregate_ids[1]
              AND last_timestamp < p_first[1]
              AND (version = p_expected[1] OR (p_expected[1] = -1 AND version > 0))
            RETURNING stream_id, version INTO v_stream, v_version;
        END IF;
        IF v_stream IS NULL THEN
            -- Refused: say why. The row lock is kept, so the caller's second try meets no third party.
            SELECT version, last_timestamp INTO v_version, v_last FROM soma.streams
            WHERE tenant_id = p_tenants[1] AND aggregate_type = p_aggregate_types[1] AND aggregate_id = p_aggregate_ids[1]
            FOR UPDATE;
            v_version := coalesce(v_version, 0);
            IF soma.version_fits(p_expected[1], v_version) THEN
                RETURN QUERY SELECT 'stale', 1, NULL::bigint, v_version, v_last, v_now, NULL::text, NULL::uuid;
            ELSE
                RETURN QUERY SELECT 'wrong_version', 1, NULL::bigint, v_version, v_last, v_now, NULL::text, NULL::uuid;
            END IF;
            RETURN;
        END IF;
        v_streams := ARRAY[v_stream];
        v_bases := ARRAY[v_version - p_counts[1]];
    ELSE
        IF v_keyed THEN
            WITH fresh AS (
                INSERT INTO soma.idempotency_keys (tenant_id, key, event_id, recorded_at)
                SELECT p_tenants[e.stream], e.key, e.event_id, v_now
                FROM unnest(p_stream, p_idempotency_keys, p_event_ids) AS e (stream, key, event_id)
                WHERE e.key IS NOT NULL
                ORDER BY p_tenants[e.stream] COLLATE "C", e.key COLLATE "C"
                ON CONFLICT DO NOTHING
                RETURNING tenant_id, key
            )
            SELECT array_agg(tenant_id), array_agg(key) INTO v_key_tenants, v_keys FROM fresh;
            IF coalesce(cardinality(v_keys), 0) < cardinality(array_remove(p_idempotency_keys, NULL)) THEN
                PERFORM soma.forget_keys(v_key_tenants, v_keys);
                RETURN QUERY
                SELECT 'duplicate', e.ordinal::integer, r.position, r.version, r.timestamp, r.recorded_at, r.xid::text,
                       k.event_id
                FROM unnest(p_stream, p_idempotency_keys) WITH ORDINALITY AS e (stream, key, ordinal)
                -- OFFSET 0 keeps each a look-up by its own index. A planner without statistics (a young or restored
                -- database) finds an index on the tenant as good, and reads every event of the tenant.
                CROSS JOIN LATERAL (SELECT known.event_id, known.tenant_id FROM soma.idempotency_keys known
                                    WHERE known.tenant_id = p_tenants[e.stream] AND known.key = e.key OFFSET 0) k
                LEFT JOIN LATERAL (SELECT * FROM soma.events first WHERE first.event_id = k.event_id OFFSET 0) r
                    ON r.tenant_id = k.tenant_id
                ORDER BY e.ordinal;
                RETURN;
            END IF;
        END IF;

        -- Several streams: lock them all in key order, then check all, then advance all.
        INSERT INTO soma.streams AS s (tenant_id, aggregate_type, aggregate_id, key_hash, version, last_timestamp)
        SELECT g.tenant, g.kind, g.id, g.hash, 0, '-infinity'
        FROM unnest(p_tenants, p_aggregate_types, p_aggregate_ids, p_key_hashes) AS g (tenant, kind, id, hash)
        ORDER BY g.tenant COLLATE "C", g.kind COLLATE "C", g.id COLLATE "C"
        ON CONFLICT (tenant_id, aggregate_type, aggregate_id) DO UPDATE SET version = s.version WHERE false;

        IF p_again THEN
            RETURN QUERY
            SELECT 'duplicate', e.ordinal::integer, r.position, r.version, r.timestamp, r.recorded_at, r.xid::text,
                   r.event_id
            FROM unnest(p_stream, p_event_ids) WITH ORDINALITY AS e (stream, event_id, ordinal)
            CROSS JOIN LATERAL (SELECT * FROM soma.events first WHERE first.event_id = e.event_id OFFSET 0) r
            WHERE r.tenant_id = p_tenants[e.stream]
            ORDER BY e.ordinal;
            IF FOUND THEN
                PERFORM soma.forget_keys(v_key_tenants, v_keys);
                RETURN;
            END IF;
        END IF;

        RETURN QUERY
        SELECT CASE WHEN soma.version_fits(g.expected, s.version) THEN 'stale' ELSE 'wrong_version' END,
               g.ordinal::integer, NULL::bigint, s.version, nullif(s.last_timestamp, '-infinity'), v_now, NULL::text,
               NULL::uuid
        FROM unnest(p_tenants, p_aggregate_types, p_aggregate_ids, p_expected, p_first)
             WITH ORDINALITY AS g (tenant, kind, id, expected, first, ordinal)
        JOIN soma.streams s ON (s.tenant_id, s.aggregate_type, s.aggregate_id) = (g.tenant, g.kind, g.id)
        WHERE NOT soma.version_fits(g.expected, s.version) OR s.last_timestamp >= g.first
        ORDER BY g.ordinal;
        IF FOUND THEN
            PERFORM soma.forget_keys(v_key_tenants, v_keys);
            PERFORM soma.forget_streams(p_tenants, p_aggregate_types, p_aggregate_ids);
            RETURN;
        END IF;

        WITH advanced AS (
            UPDATE soma.streams s SET version = s.version + g.events, last_timestamp = g.last
            FROM unnest(p_tenants, p_aggregate_types, p_aggregate_ids, p_counts, p_last)
                 WITH ORDINALITY AS g (tenant, kind, id, events, last, ordinal)
            WHERE (s.tenant_id, s.aggregate_type, s.aggregate_id) = (g.tenant, g.kind, g.id)
            RETURNING g.ordinal, s.stream_id, s.version - g.events AS base
        )
        SELECT array_agg(stream_id ORDER BY ordinal), array_agg(base ORDER BY ordinal) INTO v_streams, v_bases
        FROM advanced;
    END IF;

    v_xid := pg_current_xact_id();
    v_positions := ARRAY(SELECT nextval('soma.event_position') FROM generate_series(1, cardinality(p_event_ids)));

    INSERT INTO soma.events (
        position, xid, stream_id, version, key_hash, event_id, tenant_id, aggregate_type, aggregate_id, event_type,
        schema_version, service_id, correlation_id, causation_id, idempotency_key, trace_id, traceparent, tracestate,
        baggage, "timestamp", occurred_at, recorded_at, payload, metadata)
    SELECT e.position, v_xid, v_streams[e.stream], v_bases[e.stream] + e.place, p_key_hashes[e.stream], e.event_id,
           p_tenants[e.stream], p_aggregate_types[e.stream], p_aggregate_ids[e.stream], e.event_type,
           e.schema_version, e.service, e.correlation, e.causation, coalesce(e.key, e.event_id::text),
           substr(e.traceparent, 4, 32)::uuid, e.traceparent, e.tracestate,
           e.baggage, e.stamp, e.occurred, v_now, e.payload::json, e.metadata::json
    FROM unnest(v_positions, p_stream, p_offset, p_event_ids, p_event_types, p_schema_versions, p_correlation_ids,
                p_causation_ids, p_idempotency_keys, p_traceparents, p_tracestates, p_baggage, p_timestamps, p_occurred,
                p_payloads, p_metadata, p_services)
         AS e (position, stream, place, event_id, event_type, schema_version, correlation, causation, key, traceparent,
               tracestate, baggage, stamp, occurred, payload, metadata, service);

    IF p_topics IS NOT NULL THEN
        INSERT INTO soma.outbox (position, xid, slot, shard, key_hash, topic, key, event_id, event_type, version,
                                 "timestamp", value, headers)
        SELECT e.position, v_xid, ((e.position >> 17) & 7)::smallint, (p_key_hashes[e.stream] & 7)::smallint,
               p_key_hashes[e.stream], e.topic, p_keys[e.stream], e.event_id, e.event_type,
               v_bases[e.stream] + e.place, e.stamp, e.value, e.headers
        FROM unnest(v_positions, p_stream, p_offset, p_event_ids, p_event_types, p_timestamps, p_topics, p_values,
                    p_headers)
             AS e (position, stream, place, event_id, event_type, stamp, topic, value, headers);
    END IF;

    RETURN QUERY
    SELECT 'appended', e.ordinal::integer, e.position, v_bases[e.stream] + e.place, e.stamp, v_now, v_xid::text,
           NULL::uuid
    FROM unnest(v_positions, p_stream, p_offset, p_timestamps)
         WITH ORDINALITY AS e (position, stream, place, stamp, ordinal);
END $$;

-- Whether a stream at p_version meets the expectation.
CREATE FUNCTION soma.version_fits(p_expected bigint, p_version bigint) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE p_expected WHEN -2 THEN true WHEN -1 THEN p_version > 0 ELSE p_version = p_expected END;

-- Takes back the keys that this very call inserted: a refused call writes nothing.
CREATE FUNCTION soma.forget_keys(p_tenants text[], p_keys text[]) RETURNS void
LANGUAGE sql VOLATILE AS $$
    DELETE FROM soma.idempotency_keys k USING unnest(p_tenants, p_keys) AS g (tenant, key)
    WHERE k.tenant_id = g.tenant AND k.key = g.key
$$;

-- Takes back the streams that a refused call made for their lock: those without an event. The caller holds their locks.
CREATE FUNCTION soma.forget_streams(p_tenants text[], p_aggregate_types text[], p_aggregate_ids text[]) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    DELETE FROM soma.streams s USING unnest(p_tenants, p_aggregate_types, p_aggregate_ids) AS g (tenant, kind, id)
    WHERE (s.tenant_id, s.aggregate_type, s.aggregate_id) = (g.tenant, g.kind, g.id) AND s.version = 0
$$;
