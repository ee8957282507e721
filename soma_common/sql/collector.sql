-- The central log: events of other services' logs, kept under their own ids and times.

-- :name lock_streams : the streams of a batch, locked in the order of their keys; made where they are missing
INSERT INTO soma.streams AS s (tenant_id, aggregate_type, aggregate_id, key_hash, version, last_timestamp)
SELECT g.tenant, g.kind, g.id, g.hash, 0, '-infinity'
FROM unnest($1::text[], $2::text[], $3::text[], $4::integer[]) AS g (tenant, kind, id, hash)
ORDER BY g.tenant COLLATE "C", g.kind COLLATE "C", g.id COLLATE "C"
ON CONFLICT (tenant_id, aggregate_type, aggregate_id) DO UPDATE SET version = s.version
RETURNING s.tenant_id, s.aggregate_type, s.aggregate_id, s.stream_id, s.version

-- :name known : which events are there. Asked behind the locks: what others wrote meanwhile is seen
SELECT e.event_id FROM soma.events e WHERE e.event_id = ANY ($1::uuid[])

-- :name insert : events, in their order
INSERT INTO soma.events (
    position, xid, stream_id, version, key_hash, event_id, tenant_id, aggregate_type, aggregate_id, event_type,
    schema_version, service_id, correlation_id, causation_id, idempotency_key, trace_id, traceparent, tracestate, baggage,
    "timestamp", occurred_at, recorded_at, payload, metadata)
SELECT nextval('soma.event_position'), pg_current_xact_id(), e.stream_id, e.version, e.key_hash, e.event_id, e.tenant,
       e.kind, e.id, e.event_type, e.schema_version, e.service, e.correlation, e.causation, e.key,
       substr(e.traceparent, 4, 32)::uuid, e.traceparent, e.tracestate, e.baggage, e.stamp, e.occurred, soma.now(),
       e.payload::json, e.metadata::json
FROM (SELECT * FROM unnest(
          $1::bigint[], $2::bigint[], $3::integer[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[],
          $9::integer[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[], $16::text[],
          $17::timestamptz[], $18::timestamptz[], $19::text[], $20::text[]) WITH ORDINALITY
          AS u (stream_id, version, key_hash, event_id, tenant, kind, id, event_type, schema_version, service, correlation,
                causation, key, traceparent, tracestate, baggage, stamp, occurred, payload, metadata, place)
      ORDER BY place) AS e

-- :name advance : how far streams have come
UPDATE soma.streams s SET version = g.version, last_timestamp = greatest(s.last_timestamp, g.stamp)
FROM unnest($1::bigint[], $2::bigint[], $3::timestamptz[]) AS g (stream_id, version, stamp)
WHERE s.stream_id = g.stream_id

-- :name check_cluster : refused where the log is a copy that nobody said so of
SELECT soma.check_cluster()
