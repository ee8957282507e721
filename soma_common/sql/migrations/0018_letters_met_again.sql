-- A record whose letter knows no event (it could not be decoded, or was captured without one) is met again and can be
-- read now. That enters the event into the inbox, and the letter's try would take the row for another record's: the
-- letter would be resolved, and the event never applied. So the letter learns whose row it is. The revision rises, for
-- a try that read the letter before must not settle it. Called under the lock of the letters' sequences.
CREATE FUNCTION soma.know_letters(
    p_consumer integer, p_topics text[], p_partitions integer[], p_offsets bigint[], p_digests bytea[], p_events uuid[],
    p_types text[], p_tenants text[], p_services text[], p_keys text[], p_traces uuid[]
) RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
    UPDATE soma.dead_letters l
    SET event_id = g.event, event_type = g.type, tenant_id = g.tenant, service_id = g.service, idempotency_key = g.key,
        trace_id = g.trace, revision = l.revision + 1, changed_at = soma.now()
    FROM unnest(p_topics, p_partitions, p_offsets, p_digests, p_events, p_types, p_tenants, p_services, p_keys, p_traces)
         AS g (topic, partition, record_offset, digest, event, type, tenant, service, key, trace)
    WHERE l.consumer_id = p_consumer AND l.topic = g.topic AND l.partition = g.partition
      AND l.record_offset = g.record_offset AND l.digest = g.digest
      AND g.event IS NOT NULL AND l.event_id IS NULL
      AND l.status IN ('retrying', 'blocked', 'dead', 'redriving')
$$;

REVOKE EXECUTE ON FUNCTION
    soma.know_letters(integer, text[], integer[], bigint[], bytea[], uuid[], text[], text[], text[], text[], uuid[])
    FROM PUBLIC;
