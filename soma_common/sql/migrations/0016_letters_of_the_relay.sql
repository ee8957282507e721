-- Operating dead letters: what the gauges count, and rows that the relay cannot publish as letters of the stage publish.

CREATE INDEX dead_letters_gauge_idx ON soma.dead_letters (consumer_id, status, parked_at)
    WHERE status IN ('retrying', 'blocked', 'dead', 'redriving');
