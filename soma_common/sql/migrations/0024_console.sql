-- What the console asks of open letters again and again: of which kinds they are, and about how many of each. Both walk
-- these indexes from kind to kind, however many letters there are; the column itself is in them, so that counting reads
-- nothing else.
CREATE INDEX dead_letters_kinds_idx ON soma.dead_letters (consumer_id, status, (coalesce(fingerprint, '')), place)
    INCLUDE (fingerprint) WHERE status IN ('retrying', 'blocked', 'dead', 'redriving');
CREATE INDEX dead_letters_tenant_kinds_idx
    ON soma.dead_letters (tenant_id, consumer_id, status, (coalesce(fingerprint, '')), place)
    INCLUDE (fingerprint) WHERE status IN ('retrying', 'blocked', 'dead', 'redriving');
