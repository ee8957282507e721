-- Consumers: which events were applied (the inbox) and how far each partition is.

CREATE TABLE soma.consumers (
    consumer_id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text NOT NULL UNIQUE CHECK (name <> '')
);

-- Events whose key is their own id. UUIDv7 begins with the time, so old rows go by whole partitions.
CREATE TABLE soma.inbox (
    event_id    uuid NOT NULL,
    consumer_id integer NOT NULL,
    tenant_id   text NOT NULL,
    service_id  text NOT NULL,
    PRIMARY KEY (event_id, consumer_id, tenant_id, service_id)
) PARTITION BY RANGE (event_id);
CREATE TABLE soma.inbox_first PARTITION OF soma.inbox FOR VALUES FROM (MINVALUE) TO (MAXVALUE);

-- Events with a key that a caller gave: not sortable by time, expired in small batches.
CREATE TABLE soma.inbox_keys (
    idempotency_key text NOT NULL,
    consumer_id     integer NOT NULL,
    tenant_id       text NOT NULL,
    service_id      text NOT NULL,
    applied_at      timestamptz NOT NULL,
    PRIMARY KEY (consumer_id, tenant_id, service_id, idempotency_key)
);
CREATE INDEX inbox_keys_applied_idx ON soma.inbox_keys USING brin (applied_at);

-- The next offset of each Kafka partition: written in the transaction of the effects, so a restored database
-- re-reads what its effects lost. Kafka's own commits only inform lag tools.
CREATE TABLE soma.consumer_offsets (
    consumer_id integer NOT NULL REFERENCES soma.consumers,
    topic       text NOT NULL,
    partition   integer NOT NULL CHECK (partition >= 0),
    next_offset bigint NOT NULL CHECK (next_offset >= 0),
    epoch       bigint NOT NULL DEFAULT 0,        -- rises with every assignment: a former owner's write is refused
    moved_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (consumer_id, topic, partition)
) WITH (fillfactor = 50);
