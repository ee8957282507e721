"""Policies: what matches which type, and what is refused."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from soma_common.cli.show import login
from soma_common.errors import ArchiveUnavailable, ConfigurationError
from soma_common.retention.catalog import Partition
from soma_common.retention.places import open_storage
from soma_common.retention.planning import Action, decide
from soma_common.retention.policy import RetentionPolicy, duration
from soma_common.retention.s3 import S3Storage
from soma_common.retention.storage import FolderStorage

DAY = timedelta(days=1)
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def test_the_longest_match_counts() -> None:
    policy = RetentionPolicy(
        default=90 * DAY, events={"cognitive.*": 7 * DAY, "cognitive.state.*": None, "cognitive.state.changed": 2 * DAY}
    )
    assert policy.keeps("cognitive.state.changed") == 2 * DAY
    assert policy.keeps("cognitive.state.read") is None
    assert policy.keeps("cognitive.other") == 7 * DAY
    assert policy.keeps("cognitive") == 90 * DAY
    assert policy.keeps("cognitivestate.x") == 90 * DAY
    assert policy.keeps("Whatever\x00'; DROP TABLE soma.events; --.*") == 90 * DAY
    assert not RetentionPolicy().archives
    assert RetentionPolicy(events={"a.*": DAY}).archives
    assert not RetentionPolicy(events={"a.*": None}, inbox=DAY).archives


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*",
        ".*",
        "a*",
        "*.a",
        "a.*.b",
        "A.b",
        "a..b",
        "a.b;",
        "a.*\n",
        "a%",
        "_",
        "é.*",
        "a" * 300,
        "a.**",
        " a",
        7,
        None,
    ],
)
def test_patterns_that_no_type_can_match_are_refused(pattern: Any) -> None:
    with pytest.raises(ConfigurationError, match="no pattern of event types"):
        RetentionPolicy(events={pattern: DAY})


@pytest.mark.parametrize("keep", [timedelta(0), -DAY, DAY - timedelta(seconds=1), timedelta.max, 7, "7 days", True])
def test_times_that_are_none_are_refused(keep: Any) -> None:
    for given in ({"default": keep}, {"inbox": keep}, {"events": {"a.b": keep}}, {"letters": keep}):
        with pytest.raises(ConfigurationError, match="is kept for"):
            RetentionPolicy(**given)


@pytest.mark.parametrize(
    ("text", "keep"),
    [("forever", None), ("1 day", DAY), ("90 days", 90 * DAY), ("48 hours", 2 * DAY), ("2weeks", 14 * DAY),
     ("1 year", timedelta(hours=8766))],
)  # fmt: skip
def test_durations(text: str, keep: timedelta | None) -> None:
    assert duration("x", text) == keep


@pytest.mark.parametrize(
    "text",
    ["", "90", "days", "-1 days", "1.5 days", "1 month", "9999999 days", "1 day\n", "Forever", 90, None, [], "١ day"],
)
def test_durations_that_are_none(text: Any) -> None:
    with pytest.raises(ConfigurationError, match="x is kept for"):
        duration("x", text)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "retention.toml"
    path.write_text(
        'archive = "/var/archive"\n[events]\ndefault = "2 years"\n"telemetry.*" = "7 days"\n"txn.started" = "forever"\n'
        '[keep]\ninbox = "30 days"\nletters = "1 year"\n'
    )
    policy, archive = RetentionPolicy.load(path)
    assert archive == "/var/archive"
    assert policy.keeps("telemetry.x") == 7 * DAY
    assert policy.keeps("txn.started") is None
    assert (policy.inbox, policy.replays) == (30 * DAY, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [("inbox = '1 day'", "'inbox'"), ("[keep]\noutbox = '1 day'", "'outbox'"), ("[events]\n'*' = '1 day'", "no pattern"),
     ("[keep]\ninbox = 30", "inbox is kept for 30"), ("[keep]\nevents = '1 day'", "'events'"), ("keep = 3", "keep is 3"),
     ("archive = 7", "archive is 7"), ("archive = ''", "archive is ''"), ("[events", "cannot be read"), ("\x00", "cannot be read")],
)  # fmt: skip
def test_files_with_unknown_names_and_values(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "retention.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="(?s).*") as raised:
        RetentionPolicy.load(path)
    assert said in raised.value.message
    assert raised.value.cure


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "bytes"):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            RetentionPolicy.load(path)


def partition(tick: int | None = 7, behind: tuple[str, ...] = ()) -> Partition:
    return Partition(name="p", lower_position=0, upper_position=10, size=1, tick_id=tick, behind=behind)


def test_what_becomes_of_a_partition() -> None:
    policy = RetentionPolicy(default=30 * DAY, events={"long.*": 60 * DAY, "ever.*": None})
    old, older = NOW - 31 * DAY, NOW - 61 * DAY
    assert decide(partition(), {}, policy, NOW).action is Action.KEEP
    assert decide(partition(), {"a": NOW - 30 * DAY}, policy, NOW).action is Action.KEEP
    assert decide(partition(), {"a": old, "b": older}, policy, NOW).action is Action.DROP
    step = decide(partition(), {"a": old, "long.x": old, "ever.x": older}, policy, NOW)
    assert (step.action, step.expired, step.kept, step.waits) == (Action.THIN, ("a",), ("ever.x", "long.x"), None)
    waits = decide(partition(None), {"a": old}, policy, NOW)
    assert (waits.action, waits.behind) == (Action.DROP, ())
    assert "still runs" in str(waits.waits)
    behind = decide(partition(7, ("relay:x",)), {"a": old}, policy, NOW)
    assert behind.behind == ("relay:x",)


@pytest.mark.parametrize("place", ["", "ftp://x/y", "http://x", "s3://", "s3://UPPER/x", "s3://a", "a\0b"])
def test_places_that_are_none(place: str) -> None:
    with pytest.raises(ConfigurationError):
        open_storage(place, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})


@pytest.mark.parametrize(
    "env",
    [{"AWS_ENDPOINT_URL": "http://host name:9000"}, {"AWS_ENDPOINT_URL": "http://"}, {"AWS_ENDPOINT_URL": "http://[::1"},
     {"AWS_ENDPOINT_URL": "http://ann:hunter2@host:9000"}, {"AWS_REGION": "bad region!"}],
)  # fmt: skip
def test_settings_of_s3_that_are_none(env: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        open_storage("s3://bucket", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"} | env)
    assert raised.value.cure
    assert "hunter2" not in str(raised.value)


def test_a_profile_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with pytest.raises(ConfigurationError, match="nobodys"):
        open_storage("s3://bucket", {})


def test_a_folder_that_may_not_be_read_is_not_passed_over() -> None:
    """Root may read everything, so this test is somebody else for a moment."""
    with TemporaryDirectory() as place:
        storage = FolderStorage(Path(place))
        storage.write("log/a/manifest.json", b"{}")
        storage.write("log/b/manifest.json", b"{}")
        Path(place).chmod(0o755)
        (Path(place) / "log" / "b").chmod(0)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(ArchiveUnavailable, match="cannot be listed: Permission denied"):
                storage.names("manifest.json")
        finally:
            if root:
                os.seteuid(0)
            (Path(place) / "log" / "b").chmod(0o755)
        assert storage.names("manifest.json") == ["log/a/manifest.json", "log/b/manifest.json"]
        assert storage.names("manifest.json", "log/none") == []


def test_the_folder_above_the_archives_need_not_be_ours_to_read() -> None:
    with TemporaryDirectory() as place:
        root = os.geteuid() == 0
        mine = Path(place) / "archives"
        mine.mkdir()
        if root:
            os.chown(mine, 65534, 65534)
        Path(place).chmod(0o711 if root else 0o300)
        try:
            if root:
                os.seteuid(65534)
            FolderStorage(mine).write("log/a/manifest.json", b"{}")
        finally:
            if root:
                os.seteuid(0)
            Path(place).chmod(0o755)
        assert FolderStorage(mine).names("") == ["log/a/manifest.json"]


def test_every_folder_that_was_made_for_a_file_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut may take the whole place away, after its events have left the log."""
    opened: list[str] = []
    real = os.open

    def note(path: Any, flags: int, *given: Any, **more: Any) -> int:
        opened.append(str(path))
        return real(path, flags, *given, **more)

    monkeypatch.setattr(os, "open", note)
    storage = FolderStorage(tmp_path / "new" / "er" / "archives")
    storage.write("log/manifest.json", b"{}")
    storage.write("log/other.json", b"{}")
    monkeypatch.undo()
    made = ["new/er/archives/log", "new/er/archives", "new/er", "new"]
    assert {str(tmp_path), *(str(tmp_path / each) for each in made)} <= set(opened)


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert login() == f"uid {2**31 - 7}"


def test_places(tmp_path: Path) -> None:
    folder = open_storage(f"file://{tmp_path}/x", {})
    assert isinstance(folder, FolderStorage)
    assert folder.uri == f"file://{tmp_path}/x"
    with pytest.raises(ConfigurationError, match="no web address"):
        open_storage("s3://bucket", {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "x:1"})
    env = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "very secret", "AWS_REGION": "eu-west-1"}
    bucket = open_storage("s3://bucket/deep/er/", env)
    assert isinstance(bucket, S3Storage)
    assert (bucket.uri, bucket.endpoint) == ("s3://bucket/deep/er", None)
    assert bucket._client.meta.endpoint_url == "https://s3.eu-west-1.amazonaws.com"
    assert "very secret" not in repr(vars(bucket))
