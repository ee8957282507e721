"""Reading flights from good and from hostile files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.flights.reading import COLUMNS, LONGEST_LINE, Reading, UnusableFile, read_flights
from examples.flights.truth import truth

WEEK = Path(__file__).parents[2] / "examples" / "data" / "flights-2013-02-04.csv"
HEADER = (
    b"year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,"
    b"origin,dest,air_time,distance,hour,minute,time_hour"
)
GOOD = b"2013,2,4,502,500,2,640,641,-1,US,1117,N171US,EWR,CLT,80,529,5,0,2013-02-04T10:00:00Z"
GONE = b"2013,2,5,NA,2029,NA,NA,2140,NA,9E,3609,NA,JFK,PHL,NA,94,20,29,2013-02-06T01:00:00Z"


def read(tmp_path: Path, *lines: bytes, end: bytes = b"\n") -> Reading:
    """What a file of these lines holds."""
    path = tmp_path / "flights.csv"
    path.write_bytes(end.join(lines) + end)
    return read_flights(path)


def changed(**values: str) -> bytes:
    """The good row with other values."""
    row = dict(zip(HEADER.decode().split(","), GOOD.decode().split(","), strict=True))
    return ",".join((row | values).values()).encode()


def test_the_week_is_whole() -> None:
    week = read_flights(WEEK)
    assert (len(week.flights), week.refused, week.without_tail, week.diverted) == (6104, (), 345, 16)
    assert list(week.flights) == sorted(week.flights, key=lambda flight: (flight.scheduled, flight.label))


def test_a_row_becomes_a_flight(tmp_path: Path) -> None:
    (flight,) = read(tmp_path, HEADER, GOOD).flights
    assert flight.label == "2013-02-04T10:00Z/US1117/EWR-CLT"
    assert (flight.departure_delay, flight.arrival_delay, flight.air_time, flight.line) == (2, -1, 80, 2)


def test_a_cancelled_flight_has_no_delays(tmp_path: Path) -> None:
    (flight,) = read(tmp_path, HEADER, GONE).flights
    assert (flight.tail, flight.departure_delay, flight.arrival_delay) == ("", None, None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"", "0 fields"),
        (b"2013,2,4", "3 fields"),
        (GOOD + b",extra", "20 fields"),
        (GOOD.replace(b"N171US", b"N1\x0071"), "NUL"),
        (GOOD.replace(b"N171US", b"N\xff71US"), "not UTF-8"),
        (GOOD.replace(b"EWR", b'"EWR'), "not CSV"),
        (GOOD.replace(b"N171US", b"N" * (LONGEST_LINE + 1)), "more than 65536 bytes"),
        (changed(dep_delay="soon"), "dep_delay is 'soon', not a whole number"),
        (changed(dep_delay="2.5"), "dep_delay"),
        (changed(dep_delay="999999"), "dep_delay"),
        (changed(arr_delay="1e9"), "arr_delay"),
        (changed(arr_delay="9" * 5000), "arr_delay"),
        (changed(arr_delay="١٢"), "arr_delay"),
        (changed(dep_delay="NA"), "both be"),
        (changed(dep_time="NA"), "both be"),
        (changed(dep_time="NA", dep_delay="NA"), "arrived without having departed"),
        (changed(flight="0"), "flight is '0'"),
        (changed(flight="-3"), "flight is '-3'"),
        (changed(carrier="united airlines"), "carrier is"),
        (changed(carrier=""), "carrier is empty"),
        (changed(tailnum="N171\x1b[31m"), r"tailnum is 'N171\x1b[31m'"),
        (changed(tailnum="N" * 600), "tailnum is"),
        (changed(origin="NA"), "origin is 'NA'"),
        (changed(minute="60"), "minute is '60'"),
        (changed(time_hour="yesterday"), "time_hour is 'yesterday'"),
        (changed(time_hour="2013-02-30T10:00:00Z"), "time_hour"),
        (changed(time_hour="2013-02-04T10:00:00"), "time_hour"),
        (changed(time_hour="0001-01-01T00:00:00+14:00"), "time_hour"),
        (changed(time_hour="9999-12-31T23:00:00-14:00"), "time_hour"),
        (changed(time_hour="1066-10-14T09:00:00Z"), "age of flight"),
    ],
)
def test_a_bad_row_is_refused_with_its_line_and_the_good_ones_go_on(tmp_path: Path, row: bytes, reason: str) -> None:
    found = read(tmp_path, HEADER, row, GOOD, GONE)
    assert [refused.line for refused in found.refused] == [2]
    assert reason in found.refused[0].reason
    assert found.refused[0].reason.isprintable()
    assert len(found.refused[0].reason) < 200
    assert [flight.line for flight in found.flights] == [3, 4]


def test_a_repeated_flight_names_the_first(tmp_path: Path) -> None:
    found = read(tmp_path, HEADER, GOOD, GONE, GOOD, changed(tailnum="N999ZZ"))
    assert [(refused.line, refused.reason) for refused in found.refused] == [
        (4, "it is the same flight as line 2"),
        (5, "it is the same flight as line 2"),
    ]


def test_other_spellings_of_the_same_columns(tmp_path: Path) -> None:
    swapped = b",".join([HEADER.replace(b"year", b"extra"), b" day2 "])
    pandas = changed(dep_delay="2.0", arr_delay="-1.0", dep_time="502.0", time_hour="2013-02-04 05:00:00-05:00")
    found = read(tmp_path, b"\xef\xbb\xbf" + swapped, pandas + b", x ", end=b"\r\n")
    assert found.refused == ()
    assert found.flights[0].label == "2013-02-04T10:00Z/US1117/EWR-CLT"
    assert truth(found.path).carriers["US"].arrival_minutes == -1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n", "lacks the columns"),
        (HEADER, "not one usable flight"),
        (HEADER + b"\n" + b"nonsense\n", "line 2"),
        (HEADER.replace(b"tailnum", b"tail") + b"\n" + GOOD, "lacks the columns tailnum"),
        (HEADER.replace(b",", b";") + b"\n" + GOOD, "lacks the columns"),
        (HEADER.replace(b"year", b"minute") + b"\n" + GOOD, "minute twice"),
        ((HEADER + b"\n" + GOOD).decode().encode("utf-16"), "UTF-8"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 50, "UTF-8"),
        (b"x" * (LONGEST_LINE * 3), "not a text file"),
    ],
)
def test_an_unusable_file_has_a_cause_and_a_cure(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "flights.csv"
    path.write_bytes(content)
    with pytest.raises(UnusableFile, match=words) as caught:
        read_flights(path)
    assert caught.value.cure


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnusableFile, match="cannot be read"):
        read_flights(tmp_path / name)


FIELD = st.one_of(
    st.sampled_from(["", "NA", "0", "-1", "17", "17.0", "EWR", "UA", "N14228", "2013-02-04T10:00:00Z", '"', "5e5"]),
    st.text(max_size=8),
)
LINE = st.one_of(
    st.just(GOOD),
    st.just(GONE),
    st.binary(max_size=200),
    st.lists(FIELD, min_size=19, max_size=19).map(lambda fields: ",".join(fields).encode("utf-8", "surrogatepass")),
    st.tuples(st.sampled_from(COLUMNS), FIELD).map(
        lambda pair: changed(**{pair[0]: pair[1].encode("utf-8", "replace").decode()})
    ),
)


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(LINE, max_size=12), end=st.sampled_from([b"\n", b"\r\n"]))
def test_any_bytes_after_a_header(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes) -> None:
    """Every line is a flight or refused, whatever it holds, and the truth agrees about the flights."""
    path = tmp_path_factory.mktemp("any") / "flights.csv"
    content = HEADER + end + end.join(lines)
    path.write_bytes(content)
    try:
        found = read_flights(path)
    except UnusableFile as error:
        if "not one usable flight" not in error.message:
            raise
        return
    seen = [flight.line for flight in found.flights] + [refused.line for refused in found.refused]
    assert sorted(seen) == list(range(2, 1 + len(content.removesuffix(b"\n").split(b"\n"))))
    expected = truth(path, refused=[refused.line for refused in found.refused])
    assert expected.events == sum(
        1 + (flight.departure_delay is not None and flight.arrival_delay is not None) for flight in found.flights
    )


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=2000))
def test_any_bytes_at_all(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "flights.csv"
    path.write_bytes(content)
    with pytest.raises(UnusableFile):
        read_flights(path)
