-- :name open : record a rebuild; the number of its inbox
SELECT soma.open_rebuild($1::uuid, $2::integer, $3::text, $4::json, $5::bigint, $6::bigint, $7::bigint,
                         $8::double precision, $9::text, $10::text, $11::text, $12::text, $13::text[], $14::boolean,
                         $15::text)

-- :name find : what a rebuild fills, and how far its swap is
SELECT b.live_schema, b.shadow, b.tables, b.own_shape, b.shape, b.old_inbox, b.swapped_at, b.cleaned_at
FROM soma.rebuilds b WHERE b.run_id = $1::uuid

-- :name uncleaned : the rebuild of a consumer that is under way or left something behind
SELECT b.run_id, r.state FROM soma.rebuilds b JOIN soma.replays r USING (run_id)
WHERE b.consumer_id = $1::integer AND b.cleaned_at IS NULL

-- :name forced : a forced replay of a consumer that is not over
SELECT r.run_id FROM soma.replays r
WHERE r.consumer_id = $1::integer AND r.mode = 'force' AND r.state IN ('planned', 'running', 'paused', 'failed')
LIMIT 1

-- :name obstacles : why tables cannot be rebuilt
SELECT soma.rebuild_obstacles($1::text, $2::text[], $3::boolean)

-- :name shape : what tables look like
SELECT soma.shape_of($1::text, $2::text[])

-- :name make_schema : a schema of this name; the name is quoted by the server
SELECT format('CREATE SCHEMA %I', $1::text)

-- :name drop_schema : the same, away with everything in it
SELECT format('DROP SCHEMA IF EXISTS %I CASCADE', $1::text)

-- :name analyze : statistics of a table
SELECT format('ANALYZE %I.%I', $1::text, $2::text)

-- :name lock_tables : hold everybody off these tables, in the order in which swap_tables does; names are quoted here,
-- and those that are gone are left to the check.
SELECT format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE',
              string_agg(format('%I.%I', n.nspname, c.relname), ', ' ORDER BY c.relname COLLATE "C"))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1::text AND c.relname = ANY ($2::text[]) AND c.relkind IN ('r', 'p', 'v')
HAVING count(*) > 0

-- :name outgrown : sequences of serial columns that nothing but these tables draws from, to be moved away with them
WITH old AS (
    SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1::text AND c.relname = ANY ($2::text[])
)
SELECT format('ALTER SEQUENCE %I.%I OWNED BY NONE', n.nspname, s.relname),
       format('ALTER SEQUENCE %I.%I SET SCHEMA %I', n.nspname, s.relname, $3::text)
FROM old JOIN pg_depend d ON d.refobjid = old.oid AND d.refclassid = 'pg_class'::regclass
                         AND d.classid = 'pg_class'::regclass AND d.deptype = 'a'
JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_namespace n ON n.oid = s.relnamespace
WHERE NOT EXISTS (
    SELECT FROM pg_depend u LEFT JOIN pg_attrdef f ON u.classid = 'pg_attrdef'::regclass AND f.oid = u.objid
    WHERE u.refclassid = 'pg_class'::regclass AND u.refobjid = s.oid
      AND (f.adrelid IS NULL OR f.adrelid NOT IN (SELECT oid FROM old)))

-- :name make_own : the new tables, by the caller's statements
SELECT soma.make_own($1::text, $2::text)

-- :name make_shadow : an empty table like a live one
SELECT soma.make_shadow($1::text, $2::text, $3::text)

-- :name copy_rights : the owner and the grants of the live table
SELECT soma.copy_rights($1::text, $2::text, $3::text)

-- :name made : the tables in a schema
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1::text AND c.relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY c.relname

-- :name cleaned_meanwhile : whether the inbox of a run may have lost rows
SELECT c.inbox_horizon IS NOT NULL FROM soma.consumers c WHERE c.consumer_id = $1::integer

-- :name begin_batch : hold the run and go to the new tables
SELECT soma.begin_rebuilding($1::uuid, $2::bigint, $3::text)

-- :name written_elsewhere : relations that a rebuild must not write to
SELECT soma.written_elsewhere($1::text)

-- :name hold_letters : events that were entered and not applied
SELECT soma.hold_letters($1::uuid, $2::uuid[])

-- :name free_letters : letters that are applied now, and were not before
SELECT soma.free_letters($1::uuid, $2::uuid[])

-- :name letters : in one snapshot: which letters there are of these events and records, and which held ones are resolved
-- now (null place: a held letter is gone)
SELECT false AS resolved_before, l.letter_id, l.event_id, l.topic, l.partition, l.record_offset, l.status, l.place,
       l.edited_value IS NOT NULL
FROM soma.dead_letters l
WHERE l.consumer_id = $2::integer AND l.event_id = ANY ($3::uuid[])
UNION ALL
SELECT false, l.letter_id, l.event_id, l.topic, l.partition, l.record_offset, l.status, l.place, l.edited_value IS NOT NULL
FROM unnest($4::text[], $5::integer[], $6::bigint[]) AS g (topic, number, place)
JOIN soma.dead_letters l ON l.consumer_id = $2::integer AND l.topic = g.topic AND l.partition = g.number
                        AND l.record_offset = g.place AND l.event_id IS NULL
UNION ALL
(SELECT true, h.letter_id, l.event_id, l.topic, l.partition, l.record_offset, l.status, l.place, l.edited
 FROM soma.replay_held h
 LEFT JOIN LATERAL (
     SELECT d.event_id, d.topic, d.partition, d.record_offset, d.status, d.place, d.edited_value IS NOT NULL AS edited
     FROM soma.dead_letters d WHERE d.letter_id = h.letter_id OFFSET 0) l ON true  -- one by one: a join reads all letters
 WHERE h.run_id = $1::uuid AND coalesce(l.status = 'resolved', true)
 ORDER BY l.place NULLS FIRST LIMIT $7::integer)

-- :name by_letters : letters by their ids, in order
WHERE l.letter_id = ANY ($1::uuid[]) ORDER BY l.place

-- :name begin_swap : hold off the consumer's batches, and hold the run
SELECT soma.begin_swap($1::uuid, $2::bigint, $3::text, $4::text, $5::text)

-- :name known : of these events, those that are in a consumer's inbox now, by their numbers from 1
SELECT g.number FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[])
     WITH ORDINALITY AS g (event_id, tenant, service, idempotency_key, number)
CROSS JOIN (SELECT coalesce(c.inbox_id, c.consumer_id) AS inbox FROM soma.consumers c WHERE c.consumer_id = $1::integer) n
WHERE EXISTS (SELECT FROM soma.inbox i WHERE i.event_id = g.event_id AND i.consumer_id = n.inbox
                AND i.tenant_id = g.tenant AND i.service_id = g.service)
   OR EXISTS (SELECT FROM soma.inbox_keys k WHERE k.consumer_id = n.inbox AND k.tenant_id = g.tenant
                AND k.service_id = g.service AND k.idempotency_key = g.idempotency_key)

-- :name settled_in_log : of these positions, those that the shards of a reader have passed by their stored cursors
SELECT e.position FROM soma.events e
WHERE e.position = ANY ($1::bigint[]) AND EXISTS (
    SELECT FROM soma.shards s
    JOIN soma.ticks f ON f.tick_id = s.from_tick
    LEFT JOIN soma.ticks t ON t.tick_id = s.to_tick
    WHERE s.reader = $2::text AND s.shard = (e.key_hash & $3::integer)
      AND (pg_visible_in_snapshot(e.xid, f.snapshot) OR e.position <= f.era_start
           OR (e.position <= s.after_position AND pg_visible_in_snapshot(e.xid, t.snapshot))))

-- :name shards : how many parts a reader has
SELECT count(*)::integer FROM soma.shards s WHERE s.reader = $1::text

-- :name newest_tick : the newest tick there is
SELECT tick_id, token, snapshot::text, position_before, position_after, era, era_start FROM soma.ticks
ORDER BY tick_id DESC LIMIT 1

-- :name log_end : the highest position
SELECT soma.last_position()

-- :name swap_tables : the new tables in the place of the old ones
SELECT soma.swap_tables($1::uuid)

-- :name adopt_inbox : the run's inbox is the consumer's, the run is done
SELECT soma.adopt_inbox($1::uuid, $2::bigint)

-- :name lock_patience : how long the locks of the next statement may take
SELECT set_config('lock_timeout', $1::text, true)

-- :name clean_inbox : some rows of an inbox that nobody needs
SELECT soma.clean_inbox($1::integer, $2::uuid, $3::integer)

-- :name clean_inbox_keys : the same for given keys
SELECT soma.clean_inbox_keys($1::integer, $2::integer)

-- :name cleaned : nothing is left of a rebuild
SELECT soma.rebuild_cleaned($1::uuid)
