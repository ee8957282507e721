-- :name append : record events in the transaction of the caller
SELECT outcome, ordinal, event_position, stream_version, stamp, recorded, transaction_id, first_event_id
FROM soma.append(
    $1::text[], $2::timestamptz, $3::text[], $4::text[], $5::text[], $6::integer[], $7::bigint[], $8::bigint[],
    $9::timestamptz[], $10::timestamptz[], $11::integer[], $12::bigint[], $13::uuid[], $14::text[], $15::integer[],
    $16::text[], $17::text[], $18::text[], $19::text[], $20::text[], $21::text[], $22::timestamptz[],
    $23::timestamptz[], $24::text[], $25::text[], $26::text[], $27::bytea[], $28::bytea[], $29::text[], $30::boolean)

-- :name columns : an event as events/rows.py reads it
SELECT e.position, e.version, e.event_id, e.event_type, e.schema_version, e.payload::text, e.tenant_id,
       e.aggregate_type, e.aggregate_id, e.service_id, e.correlation_id, e.causation_id, e.idempotency_key,
       e.traceparent, e.tracestate, e.baggage, e.metadata::text, e."timestamp", e.occurred_at, e.recorded_at, e.key_hash
FROM soma.events e

-- :name by_ids : events of known ids
WHERE e.event_id = ANY($1::uuid[])

-- :name stream : a page of one stream, oldest first
WHERE e.stream_id = (SELECT s.stream_id FROM soma.streams s
                     WHERE s.tenant_id = $1 AND s.aggregate_type = $2 AND s.aggregate_id = $3)
  AND e.version >= $4
ORDER BY e.version LIMIT $5

-- :name stream_version : where a stream stands
SELECT s.version FROM soma.streams s WHERE s.tenant_id = $1 AND s.aggregate_type = $2 AND s.aggregate_id = $3

-- :name where_event_id : filter
e.event_id = $n::uuid
-- :name where_trace_id : filter
e.trace_id = $n::uuid
-- :name where_correlation_id : filter
e.correlation_id = $n::text
-- :name where_service_id : filter
e.service_id = $n::text
-- :name where_tenant_id : filter
e.tenant_id = $n::text
-- :name where_event_type : filter
e.event_type = $n::text
-- :name where_aggregate_type : filter
e.aggregate_type = $n::text
-- :name where_aggregate_id : filter
e.stream_id = ANY (ARRAY(SELECT s.stream_id FROM soma.streams s WHERE s.aggregate_id = $n::text))
-- :name where_since : filter, inclusive
e."timestamp" >= $n::timestamptz
-- :name where_until : filter, exclusive
e."timestamp" < $n::timestamptz
-- :name where_after : keyset, oldest first
e.position > $n::bigint
-- :name where_before : keyset, newest first
e.position < $n::bigint
-- :name oldest_first : order
ORDER BY e.position LIMIT $n::bigint
-- :name newest_first : order
ORDER BY e.position DESC LIMIT $n::bigint

-- :name ended : whether a transaction is no longer running; ids from our own on were handed out anew after a crash
SELECT CASE WHEN $1::text::xid8 >= pg_current_xact_id() THEN true
            ELSE pg_xact_status($1::text::xid8) IS DISTINCT FROM 'in progress' END

-- :name whole : refused when a statement failed before: the COMMIT would be a ROLLBACK, and nobody would hear of it
SELECT

-- :name written : whether a transaction's events are in the log; the ids alone could be older, the transaction's id newer
SELECT EXISTS (SELECT FROM soma.events WHERE event_id = ANY ($1::uuid[]) AND xid = $2::text::xid8)

-- :name log_page : what one tick adds to another, in order; refused when some of it was removed
WHERE (SELECT soma.require_read($6::text, $7::bigint))
  AND e.position > $1::bigint AND e.position <= $2::bigint AND e.xid >= $3::text::xid8
  AND pg_visible_in_snapshot(e.xid, (SELECT $4::text::pg_snapshot))
ORDER BY e.position LIMIT $5::bigint

-- :name log_stragglers : events of transactions that were still running at the first tick and have ended by the second;
-- by transaction id alone: "+ 0" keeps the planner from walking all positions instead
WHERE (SELECT soma.require_read($5::text, $6::bigint))
  AND e.xid = ANY ((SELECT $1::text[]::xid8[])::xid8[]) AND e.position + 0 > $2::bigint AND e.position + 0 <= $3::bigint
ORDER BY e.position + 0 LIMIT $4::bigint
