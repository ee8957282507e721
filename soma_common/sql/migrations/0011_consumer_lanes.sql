-- Lanes of consumers, and partitions whose owners keep dying (decision 0007).

-- A lane counts its batches in their transactions. A counter lower than the lane knows tells that the database was set
-- back to an earlier moment and effects are gone. A worker makes rows when it begins and deletes them when it leaves.
CREATE TABLE soma.consumer_lanes (
    lane_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer_id integer NOT NULL REFERENCES soma.consumers,
    batches     bigint NOT NULL DEFAULT 0,
    made_at     timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

-- How often a partition was taken since its position moved or an owner left in good order.
CREATE TABLE soma.consumer_claims (
    consumer_id integer NOT NULL REFERENCES soma.consumers,
    topic       text NOT NULL,
    partition   integer NOT NULL,
    claims      integer NOT NULL,
    PRIMARY KEY (consumer_id, topic, partition)
) WITH (fillfactor = 50);

-- Events of such a partition that were begun; the row goes when the event is settled.
CREATE TABLE soma.consumer_attempts (
    consumer_id   integer NOT NULL REFERENCES soma.consumers,
    topic         text NOT NULL,
    partition     integer NOT NULL,
    record_offset bigint NOT NULL,
    attempts      integer NOT NULL,
    PRIMARY KEY (consumer_id, topic, partition, record_offset)
);
