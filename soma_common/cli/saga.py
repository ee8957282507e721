"""``somastack saga``: sagas, as an operator finds them, looks at them, and helps those that are stuck."""

from __future__ import annotations

import asyncio
import signal as signals
import sys
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any

import click
import orjson

from soma_common.cli import saga_output as output
from soma_common.cli.db import dsn_of
from soma_common.cli.saga_watch import watch
from soma_common.cli.show import login
from soma_common.cli.telling import reporting, told
from soma_common.cli.tenants import whose
from soma_common.config import SomaConfig
from soma_common.errors import SagaError, ValidationError
from soma_common.escaping import plain
from soma_common.moments import TIMES, stamp, utc
from soma_common.sagas.journal import What
from soma_common.sagas.models import Saga, SagaStatus
from soma_common.sagas.orchestrator import SagaOrchestrator
from soma_common.sagas.views import ACTIVE, LoggedEntry, SagaFilter
from soma_common.wiring import make_pool

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of a line.")
_WHO = click.option("--who", default=login, help="Name in the journal.  [default: your login]")
_WHY = click.option("--why", required=True, help="A reason for the journal.")
_ID = click.argument("saga_id")
_TIME = click.DateTime(TIMES)
_reports = reporting(SagaError)
_DONE = {
    What.RETRY: "is tried again", What.SKIPPED: "is passed over", What.UNDO_SKIPPED: "is passed over, and not undone",
    What.DONE: "is done", What.UNDONE: "is undone",
    What.FAILED: "did not happen: the saga turns around, where it is not behind a pivot",
}  # fmt: skip


def _of_a_person(command: Callable[..., None]) -> Callable[..., None]:
    """A verb that a person does to a saga: it has a reason, and a name."""
    command = _reports(command)
    for option in (_WHO, _JSON, _WHY, _ID):
        command = option(command)
    return command


@click.group()
def saga() -> None:
    """Sagas: list, inspect, retry, skip, resolve, compensate, cancel, signal, forget, graph.

    Exit codes: 0 done, 1 refused or nothing to do (no such saga, not in that state, asked for before), 2 it could not
    be tried.
    """


@saga.command(name="list")
@click.option("--tenant", help="Sagas of this tenant.")
@click.option("--all-tenants", is_flag=True, help="Of every tenant.")
@click.option("--name", help="Of this definition.")
@click.option(
    "--status", multiple=True, type=click.Choice([status.value for status in SagaStatus]),
    help="May be repeated.  [default: those that did not end]",
)  # fmt: skip
@click.option("--all", "ended_too", is_flag=True, help="Also those that ended.")
@click.option("--key", "saga_key", help="Started under this key.")
@click.option("--correlation-id", help="Of this business transaction.")
@click.option(
    "--since", type=_TIME, metavar="TIME", help="Started then or later; UTC unless it has an offset."
)  # fmt: skip
@click.option("--until", type=_TIME, metavar="TIME", help="Started before.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1000))
@click.option("--cursor", help="The next page, as the page before named it.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
@_reports
def list_sagas(limit: int, cursor: str | None, as_json: bool, **given: Any) -> None:
    """Sagas, the newest first."""
    wanted = _filter(given)
    page = _run(lambda orchestrator: orchestrator.list(wanted, cursor=cursor, limit=limit))
    output.sagas(page, as_json=as_json)


@saga.command()
@_ID
@click.option("--watch", "watching", is_flag=True, help="Go on until it ends, or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@_reports
def inspect(saga_id: str, watching: bool, as_json: bool) -> None:
    """One saga: where it stands, what happened to it, and what can help it."""
    if watching and as_json:
        raise click.UsageError("--watch and --json exclude each other.")
    if watching:
        _until_interrupted(lambda: _run(lambda orchestrator: watch(orchestrator, saga_id)))
        return
    output.saga(_run(lambda orchestrator: orchestrator.get_saga(saga_id)), as_json=as_json)


@saga.command()
@_of_a_person
def retry(saga_id: str, why: str, as_json: bool, who: str) -> None:
    """Try the step, or the compensation, again at which a saga is stuck, with all its retries."""
    _unstick(saga_id, as_json, lambda orchestrator: orchestrator.retry(saga_id, why=why, who=who))


@saga.command()
@_of_a_person
def skip(saga_id: str, why: str, as_json: bool, who: str) -> None:
    """Pass over the step, or the compensation, at which a saga is stuck. The step's result is null then."""
    _unstick(saga_id, as_json, lambda orchestrator: orchestrator.skip(saga_id, why=why, who=who))


@saga.command()
@click.option(
    "--happened/--did-not-happen", default=None,
    help="It took effect (a compensation: it is undone), or it did not, and the saga turns around.",
)  # fmt: skip
@click.option("--result", metavar="JSON", help="What the step came to.  [default: null]")
@click.option("--app", metavar="MODULE:NAME", help="Check the result with the definitions of this Soma or Saga.")
@_of_a_person
def resolve(
    saga_id: str, happened: bool | None, result: str | None, app: str | None, why: str, as_json: bool, who: str
) -> None:  # fmt: skip
    """Say what happened at the step at which a saga is stuck."""
    if happened is None:
        raise click.UsageError("Say --happened or --did-not-happen.")
    if result is not None and not happened:
        raise ValidationError("What did not happen has no result.", cure="leave --result out.")
    value = None if result is None else _json(result, "result")

    def work(orchestrator: SagaOrchestrator) -> Awaitable[None]:
        return orchestrator.resolve(saga_id, happened=happened, why=why, result=value, who=who)

    _unstick(saga_id, as_json, work, _definitions(app))


@saga.command()
@_of_a_person
def compensate(saga_id: str, why: str, as_json: bool, who: str) -> None:
    """Undo all that a saga did. What is under way ends first."""
    done = _run(lambda orchestrator: orchestrator.compensate(saga_id, reason=why, who=who))
    _turned(saga_id, done, "it turns around when what is under way has ended", as_json)


@saga.command()
@_of_a_person
def cancel(saga_id: str, why: str, as_json: bool, who: str) -> None:
    """Undo all that a saga did, at once: a step that is under way is cancelled."""
    done = _run(lambda orchestrator: orchestrator.cancel(saga_id, reason=why, who=who))
    _turned(saga_id, done, "what is under way is cancelled, and it turns around", as_json)


@saga.command()
@_ID
@click.argument("name")
@click.argument("payload", required=False)
@click.option("--signal-id", help="The same signal twice is one.  [default: a new one]")
@_JSON
@_WHO
@_reports
def signal(saga_id: str, name: str, payload: str | None, signal_id: str | None, as_json: bool, who: str) -> None:
    """Send a saga a signal. PAYLOAD is JSON, or - for standard input; without it: null."""
    text: str | bytes | None = payload
    if payload == "-":
        text = sys.stdin.buffer.read()
    value = None if text is None else _json(text, "payload")
    done = _run(lambda orchestrator: orchestrator.signal(saga_id, name, value, signal_id=signal_id, who=who))
    words = f"signal {name} is left for it" if done else "nothing to do: this signal came before"
    told(words, done, as_json=as_json, saga_id=saga_id, signal=name)


@saga.command()
@click.option(
    "--ended-before", "moment", required=True, type=_TIME, metavar="TIME",
    help="Those that ended before; UTC unless it has an offset.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only count.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_JSON
@_reports
def forget(moment: datetime, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove sagas that ended, of every tenant, with their journals. Their events stay in the log.

    Only the role that owns the tables may. What was broken off goes on where it is called again.
    """
    if as_json and not (dry_run or yes):
        raise click.UsageError("With --json nobody is asked: pass --yes or --dry-run.")
    before = utc(moment)
    assert before is not None
    count = _run(lambda orchestrator: orchestrator.forget(ended_before=before, dry_run=True))
    if not dry_run and count:
        if not yes:
            click.confirm(f"Remove {_ended(count, before)}?", abort=True, err=True)
        count = _run(lambda orchestrator: orchestrator.forget(ended_before=before))
    words = "would be removed" if dry_run else "removed"
    told(
        f"{words}: {_ended(count, before)}",
        True,
        as_json=as_json,
        sagas=count,
        ended_before=before.isoformat(),
        dry_run=dry_run,
    )


@saga.command()
@click.argument("name")
@click.option(
    "--app", metavar="MODULE:NAME", help="A Soma, a Saga, or a list of them.  [default: what workers registered]"
)
@click.option("--version", type=click.IntRange(min=1), help="Which one, where there are several.")
@_reports
def graph(name: str, app: str | None, version: int | None) -> None:
    """A definition as a Mermaid flowchart.

    With --app: with its compensations and transactions. Without: as the database knows it.
    """
    from soma_common.cli.saga_graph import of_application, of_database

    if app is not None:
        text = of_application(app, name, version)
    else:
        text = of_database(_run(lambda orchestrator: orchestrator.known()), name, version)
    click.echo(plain(text, lines=True), nl=False)


def _ended(count: int, before: datetime) -> str:
    return f"{count} {'saga' if count == 1 else 'sagas'} that ended before {stamp(before)}"


def _unstick(
    saga_id: str, as_json: bool, verb: Callable[[SagaOrchestrator], Awaitable[None]],
    sagas: Iterable[Saga] = (),
) -> None:  # fmt: skip
    """Do something to a stuck saga, and say to which step it was done."""

    async def work(orchestrator: SagaOrchestrator) -> LoggedEntry | None:
        await verb(orchestrator)
        journal = (await orchestrator.get_saga(saga_id)).journal
        return next((entry for entry in reversed(journal) if entry.who is not None), None)

    entry = _run(work, sagas)
    step, words = (entry.step, _DONE.get(entry.what, entry.what)) if entry else ("", "goes on")
    told(f"{step or 'the saga'} {words}", True, as_json=as_json, saga_id=saga_id, step=step or None)


def _turned(saga_id: str, done: bool, words: str, as_json: bool) -> None:
    told(words if done else "nothing to do: it was asked for before", done, as_json=as_json, saga_id=saga_id)


def _definitions(app: str | None) -> Iterable[Saga]:
    if app is None:
        return ()
    from soma_common.cli.saga_graph import sagas_of

    return sagas_of(app)


def _json(text: str | bytes, what: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValidationError(
            f"The {what} is not JSON: {error}.", cure="write it as '{\"paid\": 5}', '\"text\"', 5."
        ) from error


def _filter(given: dict[str, Any]) -> SagaFilter:
    tenant = whose("sagas", given.pop("tenant"), given.pop("all_tenants"))
    statuses, ended_too = given.pop("status"), given.pop("ended_too")
    if statuses and ended_too:
        raise ValidationError("--status and --all exclude each other.", cure="leave one of them out.")
    times: dict[str, Any] = {name: utc(given.pop(name)) for name in ("since", "until")}
    return SagaFilter(
        tenant_id=tenant,
        statuses=None if ended_too else statuses or ACTIVE,
        **times,
        **given,
    )


def _run(work: Callable[[SagaOrchestrator], Awaitable[Any]], sagas: Iterable[Saga] = ()) -> Any:
    async def run() -> Any:
        async with make_pool(config, dsn) as pool:
            orchestrator = SagaOrchestrator(pool, sagas)
            try:
                return await work(orchestrator)
            finally:
                await orchestrator.close()

    config = SomaConfig.from_env()
    with dsn_of(config) as dsn:
        return asyncio.run(run())


def _until_interrupted(work: Callable[[], Any]) -> None:
    # Also where a script started it in the background: its shell made it deaf to SIGINT.
    signals.signal(signals.SIGINT, signals.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        sys.exit(130)
