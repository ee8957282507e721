"""The same promises for a bucket as for a folder, on a real server with the S3 API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from soma_common.errors import ArchiveCorrupt, ArchiveUnavailable, ConfigurationError
from soma_common.retention import s3
from soma_common.retention.places import open_storage
from soma_common.retention.reader import ArchiveReader
from soma_common.retention.storage import FolderStorage, Storage
from tests.integration.retention.conftest import EVERYTHING
from tests.s3_server import S3Server, s3_server

# On a new machine the first of these builds the server, and the others wait for it.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "data", "event-archive", "other") as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_TRIES", 2)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Both implementations of the protocol keep one contract."""
    if request.param == "folder":
        (tmp_path / "archives").mkdir()
        return FolderStorage(tmp_path / "archives")
    server: S3Server = request.getfixturevalue("server")
    return open_storage(f"s3://event-archive/contract/{tmp_path.name}", server.env())


def test_the_contract_of_storages(storage: Storage) -> None:
    assert storage.names("") == []
    storage.write("log/a b+ü/part-0.avro", b"x" * 100_000)
    storage.write("log/a b+ü/manifest.json", b"{}")
    storage.write("log/c/manifest.json", b"")
    assert storage.names("manifest.json") == ["log/a b+ü/manifest.json", "log/c/manifest.json"]
    assert storage.names("", "log/c") == ["log/c/manifest.json"]
    assert storage.names(".avro", "log/a b+ü") == ["log/a b+ü/part-0.avro"]
    assert storage.read("log/a b+ü/part-0.avro") == b"x" * 100_000
    assert storage.read("log/c/manifest.json") == b""
    with pytest.raises(ArchiveUnavailable, match="cannot be written"):
        storage.write("log/a b+ü/part-0.avro", b"other")
    assert storage.read("log/a b+ü/part-0.avro") == b"x" * 100_000
    with pytest.raises(ArchiveUnavailable, match="cannot be read"):
        storage.read("log/none")
    for name in ("../x", "/x", "a//b", "."):
        with pytest.raises(ArchiveUnavailable, match="no name"):
            storage.write(name, b"x")
    storage.remove("log/c/manifest.json")
    storage.remove("log/c/manifest.json")
    assert storage.names("manifest.json") == ["log/a b+ü/manifest.json"]


def test_a_list_of_many_keys_comes_page_by_page(server: S3Server) -> None:
    storage = open_storage("s3://other/many", server.env())
    for n in range(1050):
        storage.write(f"a/{n:05d}.avro", b"x")
    assert storage.names(".avro") == [f"a/{n:05d}.avro" for n in range(1050)]


async def test_archives_in_a_bucket(retained: Any, server: S3Server, tmp_path: Path) -> None:
    events = await retained.fill(300)
    retained.storage = open_storage(f"s3://event-archive/{tmp_path.name}", server.env())
    assert len((await retained.retain()).removed) == 3
    await retained.whole(events)
    page = await ArchiveReader(retained.storage).query(EVERYTHING, limit=10, newest_first=True)
    assert len(page) == 10
    name = retained.storage.names(".avro")[0]
    data = retained.storage.read(name)
    retained.storage.remove(name)
    retained.storage.write(name, data[:-1])
    with pytest.raises(ArchiveCorrupt):
        await retained.archived()


@pytest.mark.parametrize(
    ("place", "changed", "said"),
    [("missing-bucket", {}, "404 NoSuchBucket"), ("event-archive", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "403"),
     ("event-archive", {"AWS_ACCESS_KEY_ID": "nobody"}, "40"),
     ("event-archive", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be reached")],
)  # fmt: skip
async def test_a_bucket_that_cannot_be_used_leaves_the_log_as_it_was(
    retained: Any, server: S3Server, place: str, changed: dict[str, str], said: str
) -> None:
    events = await retained.fill(200)
    storage = open_storage(f"s3://{place}/x", server.env(**changed))
    with pytest.raises(ArchiveUnavailable, match=said) as raised:
        await retained.retain(storage=storage)
    assert server.secret_key not in str(raised.value)
    assert await retained.log() == events


def test_no_credentials(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    storage = open_storage("s3://event-archive/x", {"AWS_ENDPOINT_URL": server.endpoint})
    with pytest.raises(ConfigurationError, match="no credentials"):
        storage.names("")


async def test_a_server_that_dies_in_the_middle(retained: Any, tmp_path: Path) -> None:
    events = await retained.fill(400)
    with s3_server(tmp_path / "own" / "data", "event-archive") as own:
        storage = open_storage("s3://event-archive/x", own.env())
        real, calls = storage.write, 0

        def write(name: str, data: bytes) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                own.process.kill()
            real(name, data)

        storage.write = write  # type: ignore[method-assign]
        with pytest.raises(ArchiveUnavailable, match="cannot be reached"):
            await retained.retain(storage=storage)
        left = await retained.log()
    assert 0 < len(left) <= len(events)
    first = [event for event in events if event not in left]
    assert [event.position for event in left] == [event.position for event in events[len(first) :]]
