-- What transactional steps of sagas did that another engine drives: it may call one twice. The row commits with the
-- effect itself; whoever comes second waits for it, and is told what the first one came to.
CREATE TABLE soma.step_effects (
    key     text PRIMARY KEY,
    attempt integer NOT NULL,                     -- the last one that may have worked under this key
    result  json,                                 -- null: that attempt and those before it were given up
    at      timestamptz NOT NULL
);
