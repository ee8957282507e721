-- Lanes of consumers, and partitions whose owners keep dying (decision 0007).

-- A lane counts its batches in their transactions. A counter lower than the lane knows tells that the database was set
-- back to an earlier moment and effects are gone. A worker makes rows when it begins and deletes them when it leaves.
CREATE TABLE soma.consumer_lanes (
    lane_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer_id integer NOT NULL REFERENCES soma.consumers,
    batches     bigint NOT NULL DEFAULT 0,
    made_at     timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

-- A batch is counted before its handlers run. Only the library's last statement says that it is whole: a COMMIT that a
-- handler hides among its statements would keep inbox rows of events whose effects do not exist yet.
CREATE FUNCTION soma.count_batch(p_lane bigint, p_batches bigint) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_setting text;
BEGIN
    UPDATE soma.consumer_lanes l SET batches = l.batches + 1 WHERE l.lane_id = p_lane AND l.batches = p_batches;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the database was set back to an earlier moment: effects of this consumer are gone'
            USING ERRCODE = 'SC009';
    END IF;
    v_setting := set_config('soma.batch', 'begun in ' || pg_current_xact_id(), true);
END $$;

CREATE FUNCTION soma.complete_batch() RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_setting text;
BEGIN
    IF current_setting('soma.batch', true) IS DISTINCT FROM 'begun in ' || pg_current_xact_id() THEN
        RAISE EXCEPTION 'the transaction of a batch ended before the batch' USING ERRCODE = 'SC008';
    END IF;
    v_setting := set_config('soma.batch', 'whole in ' || pg_current_xact_id(), true);
END $$;

CREATE FUNCTION soma.require_whole_batch() RETURNS trigger
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF current_setting('soma.batch', true) IS DISTINCT FROM 'whole in ' || pg_current_xact_id() THEN
        RAISE EXCEPTION 'a batch of a consumer was to be committed before it was whole' USING ERRCODE = 'SC008';
    END IF;
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER whole_batch AFTER UPDATE OF batches ON soma.consumer_lanes
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION soma.require_whole_batch();

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
