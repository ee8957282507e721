-- How things stand in a whole database, for gauges.

-- :name sagas : those that have not ended by name and status, and for how many seconds the oldest due one waits
SELECT s.name, s.status, count(*),
       coalesce(extract(epoch FROM soma.now() - min(s.wake_at)
                        FILTER (WHERE s.owner IS NULL AND s.wake_at <= soma.now())), 0)::float8
FROM soma.sagas s
WHERE s.status NOT IN ('completed', 'compensated')
GROUP BY s.name, s.status ORDER BY s.name, s.status

-- :name replays : open ones, and those that failed within a day; for how many seconds none was heard of that runs
SELECT c.name, r.state, count(*),
       coalesce(extract(epoch FROM soma.now() - min(r.leased_until)
                        FILTER (WHERE r.state = 'running' AND r.leased_until > '-infinity')), 0)::float8
FROM soma.replays r JOIN soma.consumers c ON c.consumer_id = r.consumer_id
WHERE r.state IN ('planned', 'running', 'paused') OR (r.state = 'failed' AND r.ended_at > soma.now() - interval '1 day')
GROUP BY c.name, r.state ORDER BY c.name, r.state

-- :name archives : by state, with their events
SELECT a.state, count(*), coalesce(sum(a.events), 0)::bigint FROM soma.archives a GROUP BY a.state ORDER BY a.state
