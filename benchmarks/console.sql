-- What years leave behind, for benchmarks/console.py; numbers in braces are filled in there.
INSERT INTO soma.streams (tenant_id, aggregate_type, aggregate_id, key_hash, version, last_timestamp)
SELECT 'tenant-' || n % 20, 'order', 'o-' || n, n, 5, now() FROM generate_series(1, {events} / 5) n;
INSERT INTO soma.events
SELECT n, pg_current_xact_id(), 1 + n % ({events} / 5), 1 + n / ({events} / 5), n, gen_random_uuid(), 'tenant-' || n % 20, 'order',
    'o-' || n % ({events} / 5), (ARRAY['order.placed', 'order.paid', 'order.shipped', 'order.billed', 'order.closed'])[1 + n % 5], 1,
    'service-' || n % 7, 'correlation-' || n / 10, NULL, 'key-' || n, md5((n / 10)::text)::uuid,
    '00-' || md5((n / 10)::text) || '-00000000000000aa-01', NULL, NULL, now() - ({events} - n) * interval '50 milliseconds',
    now() - ({events} - n) * interval '50 milliseconds', now() - ({events} - n) * interval '50 milliseconds',
    json_build_object('order_id', 'o-' || n, 'amount', n, 'note', repeat('x', 200)), '{{}}'
FROM generate_series(1, {events}) n;
SELECT setval('soma.event_position', {events});
INSERT INTO soma.consumers (name) SELECT 'consumer-' || n FROM generate_series(1, 8) n;
INSERT INTO soma.dead_letters (letter_id, consumer_id, sequence, status, stage, topic, partition, record_offset, record_key, value,
    header_names, header_values, digest, event_id, event_type, tenant_id, trace_id, error_type, error_message, error_stack,
    fingerprint, attempts, automatic_left, parked_at, changed_at)
SELECT gen_random_uuid(), 1 + n % 8, convert_to('kk' || n, 'UTF8'),
    (ARRAY['dead', 'dead', 'dead', 'retrying', 'blocked', 'resolved', 'discarded', 'dead', 'dead', 'dead'])[1 + n / 7 % 10], 'handle',
    'orders', n % 6, n, convert_to('k' || n, 'UTF8'), convert_to('{{"n": ' || n || '}}', 'UTF8'), '{{}}', '{{}}',
    sha256(convert_to(n::text, 'UTF8')), gen_random_uuid(), 'order.placed', 'tenant-' || n % 20, gen_random_uuid(), 'ValueError',
    'order has no amount', repeat('  File "x.py", line 1' || chr(10), 40), 'print-' || n % 60, 1, 0,
    now() - ({letters} - n) * interval '1 second', now() FROM generate_series(1, {letters}) n;
INSERT INTO soma.dead_sequences (consumer_id, sequence, opened_at)
SELECT consumer_id, sequence, now() FROM soma.dead_letters WHERE status IN ('dead', 'retrying', 'blocked');
INSERT INTO soma.dead_letter_history (letter_id, at, who, what)
SELECT letter_id, now(), 'consumer', 'dead' FROM soma.dead_letters;
INSERT INTO soma.sagas (saga_id, type_id, name, version, tenant_id, status, priority, length, wake_at, deadline, input, correlation_id,
    traceparent, created_at, ended_at)
SELECT ('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 1, 'place-order', 1, 'tenant-' || n % 20,
    CASE WHEN n % 50 = 0 THEN 'stuck' WHEN n % 11 = 0 THEN 'running' ELSE 'completed' END, 3, 2, NULL, now(), '{{}}', 'correlation-' || n,
    '00-' || md5(n::text) || '-00000000000000aa-01', now(), now() FROM generate_series(1, {sagas}) n;
INSERT INTO soma.saga_steps (saga_id, number, step, what, attempt, at, took, epoch)
SELECT saga_id, n, 'step-' || n, 'done', 1, now(), 0.1, 1 FROM soma.sagas, generate_series(1, 2) n;
