-- The tables of the delay statistics. They belong to the application, not to the library.

-- :name create : the tables and the views that add them up; safe to run again
CREATE SCHEMA IF NOT EXISTS flights;

-- One row per aircraft too: events of one aircraft are handled one after the other, so no two transactions ever wait
-- for the same row, and none can deadlock over carriers taken in different orders.
CREATE TABLE IF NOT EXISTS flights.delays (
    scope             text NOT NULL CHECK (scope IN ('carrier', 'airport')),
    name              text NOT NULL,
    aircraft          text NOT NULL,
    departed          integer NOT NULL DEFAULT 0,
    arrived           integer NOT NULL DEFAULT 0,
    cancelled         integer NOT NULL DEFAULT 0,
    departure_minutes integer NOT NULL DEFAULT 0,
    arrival_minutes   integer NOT NULL DEFAULT 0,
    worst_departure   integer,
    worst_arrival     integer,
    PRIMARY KEY (scope, name, aircraft)
);

-- The chain of hashes is right only if every event of the aircraft came exactly once and in order.
CREATE TABLE IF NOT EXISTS flights.aircraft (
    aircraft      text PRIMARY KEY,
    events        integer NOT NULL,
    chain         text NOT NULL,
    last_event    text NOT NULL,
    delay_minutes integer NOT NULL,
    crossings     integer NOT NULL DEFAULT 0
);

CREATE TABLE IF NOT EXISTS flights.alerts (
    alert   text PRIMARY KEY,
    minutes integer NOT NULL,
    times   integer NOT NULL DEFAULT 1
);

CREATE OR REPLACE VIEW flights.totals AS
SELECT scope, name, sum(departed) AS departed, sum(arrived) AS arrived, sum(cancelled) AS cancelled,
       sum(departure_minutes) AS departure_minutes, sum(arrival_minutes) AS arrival_minutes,
       max(worst_departure) AS worst_departure, max(worst_arrival) AS worst_arrival
FROM flights.delays
GROUP BY scope, name;

-- :name count : one event of a flight; returns crossings and minutes when this event crossed the threshold, else no row
WITH counted AS (
    INSERT INTO flights.delays AS d
        (scope, name, aircraft, departed, arrived, cancelled, departure_minutes, arrival_minutes,
         worst_departure, worst_arrival)
    SELECT scope, name, $1::text, ($2::text = 'departed')::integer, ($2 = 'arrived')::integer,
           ($2 = 'cancelled')::integer,
           CASE WHEN $2 = 'departed' THEN $5::integer ELSE 0 END, CASE WHEN $2 = 'arrived' THEN $5 ELSE 0 END,
           CASE WHEN $2 = 'departed' THEN $5 END, CASE WHEN $2 = 'arrived' THEN $5 END
    FROM (VALUES ('carrier', $3::text), ('airport', $4::text)) AS place (scope, name)
    ON CONFLICT (scope, name, aircraft) DO UPDATE
    SET departed = d.departed + excluded.departed,
        arrived = d.arrived + excluded.arrived,
        cancelled = d.cancelled + excluded.cancelled,
        departure_minutes = d.departure_minutes + excluded.departure_minutes,
        arrival_minutes = d.arrival_minutes + excluded.arrival_minutes,
        worst_departure = greatest(d.worst_departure, excluded.worst_departure),
        worst_arrival = greatest(d.worst_arrival, excluded.worst_arrival)
), added AS (
    SELECT CASE WHEN $2 = 'arrived' THEN $5 ELSE 0 END AS minutes
), chained AS (
    INSERT INTO flights.aircraft AS a (aircraft, events, chain, last_event, delay_minutes, crossings)
    SELECT $1, 1, md5($6::text), $6, minutes, (minutes >= $7::integer)::integer FROM added
    ON CONFLICT (aircraft) DO UPDATE
    SET events = a.events + 1,
        chain = md5(a.chain || $6),
        last_event = $6,
        delay_minutes = a.delay_minutes + excluded.delay_minutes,
        crossings = a.crossings + (a.delay_minutes < $7 AND a.delay_minutes + excluded.delay_minutes >= $7)::integer
    RETURNING delay_minutes, crossings
)
SELECT crossings, delay_minutes
FROM chained, added
WHERE delay_minutes >= $7 AND delay_minutes - added.minutes < $7;

-- :name alert : an aircraft.delayed event
INSERT INTO flights.alerts AS a (alert, minutes) VALUES ($1, $2)
ON CONFLICT (alert) DO UPDATE SET times = a.times + 1;

-- :name progress : events of flights and alerts that were applied
SELECT coalesce((SELECT sum(events) FROM flights.aircraft), 0)::bigint,
       coalesce((SELECT sum(times) FROM flights.alerts), 0)::bigint,
       coalesce((SELECT sum(crossings) FROM flights.aircraft), 0)::bigint;

-- :name totals : what each carrier and airport comes to
SELECT scope, name, departed, arrived, cancelled, departure_minutes, arrival_minutes, worst_departure, worst_arrival
FROM flights.totals;

-- :name aircraft : the last state of each aircraft
SELECT aircraft, events, chain, last_event, delay_minutes, crossings FROM flights.aircraft;

-- :name alerts : every alert that was applied
SELECT alert, minutes, times FROM flights.alerts;

-- :name falsify : spoil one row, to see that the comparison notices
UPDATE flights.delays SET departure_minutes = departure_minutes + 1
WHERE (scope, name, aircraft) = (SELECT scope, name, aircraft FROM flights.delays
                                 WHERE scope = 'carrier' AND departed > 0 ORDER BY name, aircraft LIMIT 1);
