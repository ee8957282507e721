-- What transactional steps of sagas did that another engine drives: it may call one twice. The row commits with the
-- effect itself; whoever comes second waits for it, and is told what the first one came to.
CREATE TABLE soma.step_effects (
    key     text PRIMARY KEY,
    attempt integer NOT NULL,                     -- the last one that may have worked under this key
    result  json,                                 -- null: that attempt and those before it were given up
    at      timestamptz NOT NULL
);
CREATE INDEX step_effects_at_idx ON soma.step_effects USING brin (at);

-- As before, and steps driven from outside.
CREATE OR REPLACE FUNCTION soma.grant_runtime(p_role name) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT INSERT ON soma.events, soma.outbox TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE ON soma.streams, soma.shards, soma.workers, soma.consumer_offsets, '
                   'soma.consumers TO %I', p_role);
    EXECUTE format('GRANT INSERT, DELETE ON soma.idempotency_keys, soma.inbox, soma.inbox_keys, soma.outbox_parked, '
                   'soma.workers TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON soma.consumer_lanes, soma.consumer_claims, '
                   'soma.consumer_attempts TO %I', p_role);
    EXECUTE format('GRANT INSERT ON soma.ticks, soma.dead_letters, soma.dead_letter_history TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON soma.dead_sequences TO %I', p_role);
    EXECUTE format('GRANT UPDATE (status, stage, error_type, error_message, error_stack, fingerprint, attempts, next_at, '
                   'automatic_left, edited_value, edited_by, edited_at, revision, changed_at) '
                   'ON soma.dead_letters TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE ON soma.sagas, soma.saga_types TO %I', p_role);
    EXECUTE format('GRANT INSERT ON soma.saga_steps, soma.saga_signals TO %I', p_role);
    EXECUTE format('GRANT UPDATE (taken) ON soma.saga_signals TO %I', p_role);
    EXECUTE format('GRANT INSERT, UPDATE, DELETE ON soma.step_effects TO %I', p_role);
    EXECUTE format('GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA soma TO %I', p_role);
    EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA soma TO %I', p_role);
    EXECUTE format('REVOKE EXECUTE ON FUNCTION soma.repair(), soma.grant_runtime(name), '
                   'soma.forget_sagas(timestamptz, integer) FROM %I', p_role);
END $$;
