"""The middleware for WSGI: Flask, Django under WSGI, or a plain application.

application = RequestContextMiddleware(application, require_tenant=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Unpack

from soma_common.middleware.asgi import ContextOptions
from soma_common.middleware.headers import ContextSettings
from soma_common.middleware.requests import Request

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


class RequestContextMiddleware:
    """Reads tenant, correlation, trace and baggage from the headers of requests; as the one for ASGI does.

    They are known while the application is called and while a part of its answer is made; in between the thread knows
    nothing of them, so that it may serve whom it likes, and an answer that nobody closes leaves nothing behind.

    Args:
        app: the application.
        options: those of :class:`ContextSettings`.

    Raises:
        ConfigurationError: an option is none that can be.
    """

    def __init__(self, app: Application, **options: Unpack[ContextOptions]) -> None:
        self._app, self._settings = app, ContextSettings(**options)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        request = _request(self._settings, environ)
        if request.refusal:
            body = request.refusal.encode() + b"\n"
            headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
            _starting(request, start_response)("400 Bad Request", headers)
            request.end()
            return [body]
        try:
            with request.current():
                answer = self._app(environ, _starting(request, start_response))
        except BaseException as error:
            request.end(error)
            raise
        if isinstance(answer, list | tuple) or _is_file(answer, environ):  # complete: nothing more is worked for it
            request.end()
            return answer
        return _Answer(answer, request)


class _Answer:
    """An answer that is made part by part."""

    def __init__(self, parts: Iterable[bytes], request: Request) -> None:
        self._parts, self._request = parts, request
        self._iterator: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            with self._request.current():
                if self._iterator is None:
                    self._iterator = iter(self._parts)
                return next(self._iterator)
        except StopIteration:
            self._request.end()
            raise
        except BaseException as error:
            self._request.end(error)
            raise

    def close(self) -> None:
        """What servers call when they are done with it, or the client has gone."""
        closing = getattr(self._parts, "close", None)
        try:
            with self._request.current():
                if closing is not None:
                    closing()
        finally:
            self._request.end()


def _request(settings: ContextSettings, environ: Environ) -> Request:
    def values(name: str) -> tuple[str, ...]:
        value = environ.get(f"HTTP_{name.upper().replace('-', '_')}")
        return () if value is None else (value,)

    method, path = environ.get("REQUEST_METHOD", "GET"), environ.get("PATH_INFO", "")
    return Request(settings, values, method, path, environ.get("wsgi.url_scheme", "http"))


def _starting(request: Request, start_response: StartResponse) -> StartResponse:
    def starting(status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
        request.answered(int(status[:3]))
        name = request.header.lower()
        kept = [(known, value) for known, value in headers if known.lower() != name]
        return start_response(status, [*kept, (request.header, request.correlation_id)], *exc_info)

    return starting


def _is_file(answer: object, environ: Environ) -> bool:
    """Whether the server sends it by its own means."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(wrapper, type) and isinstance(answer, wrapper)
