"""The middleware for Django, under WSGI and under ASGI.

MIDDLEWARE = ["soma_common.middleware.django.RequestContextMiddleware", ...]
SOMA_REQUEST_CONTEXT = {"require_tenant": True}
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.http import HttpResponse

from soma_common.errors import ConfigurationError
from soma_common.middleware.headers import ContextSettings
from soma_common.middleware.requests import Request

_SETTING: Final = "SOMA_REQUEST_CONTEXT"


class RequestContextMiddleware:
    """Reads tenant, correlation, trace and baggage from the headers of requests; as the one for ASGI does.

    Put it first. Its options are the dictionary ``SOMA_REQUEST_CONTEXT`` in Django's settings, with the names of
    :class:`ContextSettings`. It works without a detour in either kind of stack, and for streaming answers.

    Raises:
        ConfigurationError: an option is none that can be.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self._get_response = get_response
        try:
            self._settings = ContextSettings(**getattr(settings, _SETTING, {}))
        except TypeError as error:
            raise ConfigurationError(f"{_SETTING}: {error}.", cure="use the names of ContextSettings.") from error
        self._awaits = iscoroutinefunction(get_response)
        if self._awaits:
            markcoroutinefunction(self)

    def __call__(self, django_request: Any) -> Any:
        """Serve one request, or give what is to be awaited for it."""
        request = _request(self._settings, django_request)
        return self._awaited(request, django_request) if self._awaits else self._plain(request, django_request)

    def _plain(self, request: Request, django_request: Any) -> Any:
        if request.refusal:
            return _finished(_refused(request), request, django_request)
        try:
            with request.current():
                response = self._get_response(django_request)
        except BaseException as error:
            request.end(error)
            raise
        return _finished(response, request, django_request)

    async def _awaited(self, request: Request, django_request: Any) -> Any:
        if request.refusal:
            return _finished(_refused(request), request, django_request)
        try:
            with request.current():
                response = await self._get_response(django_request)
        except BaseException as error:
            request.end(error)
            raise
        return _finished(response, request, django_request)


def _request(known: ContextSettings, django_request: Any) -> Request:
    def values(name: str) -> tuple[str, ...]:
        value = django_request.META.get(f"HTTP_{name.upper().replace('-', '_')}")
        return () if value is None else (value,)

    return Request(known, values, django_request.method, django_request.path, django_request.scheme)


def _refused(request: Request) -> Any:
    return HttpResponse(request.refusal + "\n", status=400, content_type="text/plain; charset=utf-8")


def _finished(response: Any, request: Request, django_request: Any) -> Any:
    """The answer with its header; the request ends with it, or with the last part of a stream."""
    response[request.header] = request.correlation_id
    request.answered(response.status_code)
    route = _route(django_request)
    if not response.streaming:
        request.end(route=route)
    elif response.is_async:
        response.streaming_content = _awaited_parts(response.streaming_content, request, route)
    else:
        response.streaming_content = _parts(response.streaming_content, request, route)
    return response


def _parts(content: Iterator[bytes], request: Request, route: str | None) -> Iterator[bytes]:
    try:
        while True:
            with request.current():
                part = next(content, None)
            if part is None:
                break
            yield part
    except BaseException as error:
        request.end(None if isinstance(error, GeneratorExit) else error, route=route)
        raise
    request.end(route=route)


async def _awaited_parts(content: AsyncIterator[bytes], request: Request, route: str | None) -> AsyncIterator[bytes]:
    try:
        while True:
            with request.current():
                part = await _next(content)
            if part is None:
                break
            yield part
    except BaseException as error:
        request.end(None if isinstance(error, GeneratorExit) else error, route=route)
        raise
    request.end(route=route)


def _next(content: AsyncIterator[bytes]) -> Awaitable[bytes | None]:
    return anext(content, None)


def _route(django_request: Any) -> str | None:
    """The pattern of the view's path; never the path, which has ids."""
    found = getattr(django_request, "resolver_match", None)
    return f"/{found.route}" if found is not None and found.route is not None else None
