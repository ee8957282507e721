-- The event log: streams, events, idempotency keys, and the guard that ties them to one cluster.

CREATE SCHEMA IF NOT EXISTS soma;

-- The database's clock. Tests move it for one session: SET soma.clock_offset = '5 minutes'.
CREATE FUNCTION soma.now() RETURNS timestamptz
LANGUAGE sql VOLATILE PARALLEL SAFE
RETURN clock_timestamp() + coalesce(nullif(current_setting('soma.clock_offset', true), ''), '0')::interval;

-- Which PostgreSQL cluster the stored transaction ids belong to (one row). pg_dump carries this table along with the
-- events, so a restored copy notices that it runs somewhere else.
CREATE TABLE soma.cluster (
    only_row          boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    system_identifier bigint NOT NULL
);
INSERT INTO soma.cluster (system_identifier) SELECT system_identifier FROM pg_control_system();

-- One row per stream; its lock orders the appends of one key.
CREATE TABLE soma.streams (
    tenant_id      text NOT NULL CHECK (octet_length(tenant_id) BETWEEN 1 AND 512),
    aggregate_type text NOT NULL CHECK (octet_length(aggregate_type) BETWEEN 1 AND 512),
    aggregate_id   text NOT NULL CHECK (octet_length(aggregate_id) BETWEEN 1 AND 512),
    stream_id      bigint GENERATED ALWAYS AS IDENTITY,
    key_hash       integer NOT NULL,              -- murmur2 of the Kafka key
    version        bigint NOT NULL CHECK (version >= 0),
    last_timestamp timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, aggregate_type, aggregate_id)
) WITH (fillfactor = 80);
-- Written once per stream: later appends change no column of it, so they stay HOT.
CREATE INDEX streams_aggregate_idx ON soma.streams (aggregate_id, tenant_id, aggregate_type);

-- Whether readers can take a text as the JSON object it claims to be. The type json lets NUL and broken surrogates pass
-- when they are escaped; jsonb does not.
CREATE FUNCTION soma.is_object(p_json json, p_most integer) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN json_typeof(p_json) = 'object' AND octet_length(p_json::text) <= p_most
   AND (strpos(p_json::text, '\u') = 0 OR p_json::jsonb IS NOT NULL);

-- Cache 1: a position must be higher than every position handed out before it, in every session.
CREATE SEQUENCE soma.event_position AS bigint CACHE 1;

CREATE TABLE soma.events (
    position        bigint NOT NULL,
    xid             xid8 NOT NULL,                -- the top-level transaction that appended it
    stream_id       bigint NOT NULL,
    version         bigint NOT NULL CHECK (version > 0),
    key_hash        integer NOT NULL,
    event_id        uuid NOT NULL,
    tenant_id       text NOT NULL,
    aggregate_type  text NOT NULL,
    aggregate_id    text NOT NULL,
    event_type      text NOT NULL CHECK (octet_length(event_type) BETWEEN 1 AND 512),
    schema_version  integer NOT NULL CHECK (schema_version > 0),
    service_id      text NOT NULL CHECK (octet_length(service_id) BETWEEN 1 AND 512),
    correlation_id  text NOT NULL CHECK (octet_length(correlation_id) BETWEEN 1 AND 512),
    causation_id    text,
    idempotency_key text NOT NULL CHECK (octet_length(idempotency_key) BETWEEN 1 AND 512),
    trace_id        uuid NOT NULL,                -- 128 bits; written as 32 hexadecimal digits
    traceparent     text NOT NULL,
    tracestate      text,
    baggage         text,
    "timestamp"     timestamptz NOT NULL,         -- strictly rising per stream
    occurred_at     timestamptz NOT NULL,         -- the producer's own clock
    recorded_at     timestamptz NOT NULL,         -- the database's clock
    payload         json NOT NULL,                -- json, not jsonb: kept to the letter
    metadata        json NOT NULL,
    CONSTRAINT events_payload_check CHECK (soma.is_object(payload, 921600)),
    CONSTRAINT events_metadata_check CHECK (soma.is_object(metadata, 65536)),
    PRIMARY KEY (position)
) PARTITION BY RANGE (position);

CREATE INDEX events_xid_idx         ON soma.events (xid);
CREATE INDEX events_stream_idx      ON soma.events (stream_id, version);
CREATE INDEX events_event_id_idx    ON soma.events (event_id);
CREATE INDEX events_trace_idx       ON soma.events (trace_id);
CREATE INDEX events_correlation_idx ON soma.events (correlation_id);
CREATE INDEX events_tenant_idx      ON soma.events (tenant_id, position);
CREATE INDEX events_type_idx        ON soma.events (event_type, position);
CREATE INDEX events_timestamp_idx   ON soma.events USING brin ("timestamp") WITH (pages_per_range = 32, autosummarize = on);

CREATE TABLE soma.events_p0 PARTITION OF soma.events FOR VALUES FROM (MINVALUE) TO (5000000);
CREATE TABLE soma.events_p5000000 PARTITION OF soma.events FOR VALUES FROM (5000000) TO (MAXVALUE);

-- Append-only: a row trigger is cloned to every partition, so writing to a partition directly is refused too.
CREATE FUNCTION soma.refuse_change() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'events are append-only: % on %.% is refused', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'SC003', HINT = 'Record a new event that corrects the old one.';
END $$;
CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE ON soma.events
    FOR EACH ROW EXECUTE FUNCTION soma.refuse_change();
-- A statement trigger is not cloned: each partition gets its own.
CREATE TRIGGER events_no_truncate BEFORE TRUNCATE ON soma.events
    FOR EACH STATEMENT EXECUTE FUNCTION soma.refuse_change();
CREATE TRIGGER events_no_truncate BEFORE TRUNCATE ON soma.events_p0
    FOR EACH STATEMENT EXECUTE FUNCTION soma.refuse_change();
CREATE TRIGGER events_no_truncate BEFORE TRUNCATE ON soma.events_p5000000
    FOR EACH STATEMENT EXECUTE FUNCTION soma.refuse_change();

-- Keys that callers gave. A table partitioned by position cannot enforce them, so they live here.
CREATE TABLE soma.idempotency_keys (
    tenant_id   text NOT NULL,
    key         text NOT NULL,
    event_id    uuid NOT NULL,
    recorded_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, key)
);
CREATE INDEX idempotency_keys_recorded_idx ON soma.idempotency_keys USING brin (recorded_at);
