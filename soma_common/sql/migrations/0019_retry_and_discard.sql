-- As before, but of open letters only: asked for a settled one, it marked what stands behind that in its sequence.
CREATE OR REPLACE FUNCTION soma.redrive_letters(p_letters uuid[], p_who text, p_why text) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    v_sequence record;
    v_marked   uuid[];
BEGIN
    -- In one order, so that two who ask for the same sequences cannot deadlock.
    FOR v_sequence IN
        SELECT d.consumer_id, d.sequence FROM soma.dead_sequences d
        WHERE (d.consumer_id, d.sequence) IN (SELECT l.consumer_id, l.sequence FROM soma.dead_letters l
                                              WHERE l.letter_id = ANY (p_letters)
                                                AND l.status IN ('retrying', 'blocked', 'dead', 'redriving'))
        ORDER BY d.consumer_id, d.sequence FOR UPDATE
    LOOP
        WITH marked AS (
            UPDATE soma.dead_letters l SET status = 'redriving', next_at = NULL, changed_at = soma.now()
            WHERE l.consumer_id = v_sequence.consumer_id AND l.sequence = v_sequence.sequence
              AND l.status IN ('dead', 'retrying')
            RETURNING l.letter_id
        )
        SELECT array_agg(letter_id) INTO v_marked FROM marked;
        CONTINUE WHEN v_marked IS NULL;
        INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
        SELECT m, soma.now(), p_who, 'redriving', p_why FROM unnest(v_marked) m;
        PERFORM soma.advance_sequence(v_sequence.consumer_id, v_sequence.sequence);
        RETURN QUERY SELECT unnest(v_marked);
    END LOOP;
END $$;

-- As before, but the relay sends whole keys: while any row of the key is to be tried, the relay may have this one in its
-- hands, though nobody asked for it (it was parked behind the others since). Given up then, it would be sent all the same.
CREATE OR REPLACE FUNCTION soma.discard_any(p_letter uuid, p_who text, p_why text) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_letter record;
    v_row    soma.outbox_parked;
BEGIN
    SELECT l.consumer_id, c.name, l.topic, l.record_offset, l.status INTO v_letter
    FROM soma.dead_letters l JOIN soma.consumers c ON c.consumer_id = l.consumer_id
    WHERE l.letter_id = p_letter AND l.partition = -1 AND c.name LIKE 'relay:%';
    IF NOT FOUND THEN
        RETURN soma.discard_letter(p_letter, p_who, p_why);
    END IF;
    PERFORM soma.lock_parked(v_letter.name);
    SELECT * INTO v_row FROM soma.outbox_parked p
    WHERE p.reader = v_letter.name AND p.position = v_letter.record_offset FOR UPDATE;
    IF NOT FOUND THEN
        RETURN (SELECT l.status FROM soma.dead_letters l WHERE l.letter_id = p_letter);
    END IF;
    IF EXISTS (SELECT FROM soma.outbox_parked w
               WHERE w.reader = v_row.reader AND w.topic = v_row.topic AND w.key = v_row.key AND w.wanted) THEN
        RETURN 'sending';
    END IF;
    UPDATE soma.dead_letters l SET status = 'discarded', changed_at = soma.now() WHERE l.letter_id = p_letter;
    INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why)
    VALUES (p_letter, soma.now(), p_who, 'discarded', p_why);
    DELETE FROM soma.outbox_parked p WHERE p.reader = v_row.reader AND p.position = v_row.position;
    -- What stands behind it goes, unless its first row waits for people itself.
    UPDATE soma.outbox_parked p SET wanted = true
    WHERE p.reader = v_row.reader AND p.topic = v_row.topic AND p.key = v_row.key
      AND (SELECT h.reason IS NULL FROM soma.outbox_parked h
           WHERE h.reader = p.reader AND h.topic = p.topic AND h.key = p.key ORDER BY h.position LIMIT 1);
    RETURN v_letter.status;
END $$;
