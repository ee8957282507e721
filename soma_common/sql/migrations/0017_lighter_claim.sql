-- A lighter claim. A batch of 500 events spent a tenth of its time on writing columns that say nothing: tenants and
-- services that are all alike, and sequences that nobody looks up while nothing is dead.

DROP FUNCTION soma.claim(integer, bigint, bigint, text, uuid[], text[], text[], text[], text[], text[], bytea[]);

-- A column of so many values, of which there may be one that stands for all.
CREATE FUNCTION soma.spread(p_values text[], p_count integer) RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN cardinality(p_values) < p_count THEN array_fill(p_values[1], ARRAY[p_count]) ELSE p_values END;

-- As before, and: a column whose values are all alike may come as that one value. Whether the consumer has open letters
-- is told, and which sequences they are of is a question of its own, asked only then (consumer.sql, `behind`).
CREATE FUNCTION soma.claim(
    p_consumer integer, p_lane bigint, p_batches bigint, p_idle_timeout text,
    p_ids uuid[], p_id_tenants text[], p_id_services text[], p_keys text[], p_key_tenants text[], p_key_services text[],
    OUT fresh integer[], OUT letters boolean
)
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_ids      integer := cardinality(p_ids);
    v_keys     integer := cardinality(p_keys);
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
    p_id_tenants := soma.spread(p_id_tenants, v_ids);
    p_id_services := soma.spread(p_id_services, v_ids);
    p_key_tenants := soma.spread(p_key_tenants, v_keys);
    p_key_services := soma.spread(p_key_services, v_keys);
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
    IF v_keys > 0 THEN
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
        IF fresh IS NOT NULL OR v_entered < v_keys THEN
            SELECT coalesce(array_agg(v_ids + e.number::integer ORDER BY e.number), '{}') INTO v_new
            FROM unnest(p_keys, p_key_tenants, p_key_services) WITH ORDINALITY AS e (key, tenant, service, number)
            JOIN unnest(v_names, v_tenants, v_services) AS n (key, tenant, service) USING (key, tenant, service);
            fresh := coalesce(fresh, (SELECT array_agg(i) FROM generate_series(1, v_ids) i), '{}') || v_new;
        END IF;
    END IF;
    -- While nothing is dead this is one look into an empty index.
    letters := EXISTS (SELECT FROM soma.dead_sequences d WHERE d.consumer_id = p_consumer);
END $$;
