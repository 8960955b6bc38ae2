"""CORS: the answers that pages of other origins may read; server and origin are real."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.origin import Origin, Status
from tests.server import BROWSER, Answer, Site
from tests.test_pages import NOWHERE, QUOTED_TOKEN, TOKEN, film, live

Serve = Callable[..., Site]
TRUSTED = {"token": TOKEN, "trusted": ["127.0.0.0/8"]}
PREFLIGHT = {
    "Origin": "https://player.example",
    "Access-Control-Request-Method": "GET",
    "Access-Control-Request-Headers": "authorization,range",
}
FOR_PLAYERS = [
    "/news",
    "/news.m3u8",
    "/news.m3u",
    "/news/7.ts",
    "/playlist.m3u",
    "/auto/v7",
    "/nothing",
]
FOR_OTHERS = ["/", "/health", "/status", "/metrics", "/discover.json", "/lineup.json", "/x/y"]


def cors(answer: Answer) -> dict[str, str]:
    """The CORS headers of an answer."""
    return {k: v for k, v in answer.headers.items() if k.startswith("Access-Control-")}


ANYBODY = {"Access-Control-Allow-Origin": "*"}


def test_media_lists_and_hls_may_be_read_by_other_pages(origin: Origin, serve: Serve) -> None:
    site = serve({"news": live(origin).url, "film": film(origin).url})
    hls = site.get("/news.m3u8")
    segment = re.findall(r"^news/\d+\.ts$", hls.body.decode(), re.M)[0]
    answers = [hls, *map(site.get, ("/film", f"/{segment}", "/news.m3u", "/playlist.m3u"))]
    answers += [site.ask("HEAD", path) for path in ("/news", "/news.m3u8", f"/{segment}")]
    assert [answer.status for answer in answers] == len(answers) * [200]
    assert [cors(answer) for answer in answers] == len(answers) * [ANYBODY]


def test_errors_of_media_may_be_read_by_other_pages(origin: Origin, serve: Serve) -> None:
    origin.fault("/bad*", Status(503), times=None)
    site = serve({"bad": f"{origin.url}/bad.m3u8", "film": film(origin).url})
    paths = ("/bad", "/bad.m3u8", "/nothing", "/film?quality=4k", "/film.m3u8", "/film/1.ts")
    answers = [site.get(path) for path in paths]
    assert [answer.status for answer in answers] == [502, 502, 404, 404, 404, 404]
    answers += [site.ask("POST", "/film"), site.ask("HEAD", "/nothing")]
    assert site.channels.stop(1)
    answers.append(site.get("/film"))
    assert answers[-1].status == 503
    assert [cors(answer) for answer in answers] == len(answers) * [ANYBODY]


@pytest.mark.parametrize("path", FOR_PLAYERS)
def test_other_pages_may_read_a_401(serve: Serve, path: str) -> None:
    answer = serve({"news": NOWHERE}, server={"token": TOKEN}).get(path)
    assert (answer.status, cors(answer)) == (401, ANYBODY)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT"])
@pytest.mark.parametrize("path", FOR_OTHERS)
def test_other_pages_may_not_read_anything_else(serve: Serve, method: str, path: str) -> None:
    assert cors(serve({"news": NOWHERE}).ask(method, path, **PREFLIGHT)) == {}


@pytest.mark.parametrize("path", ["/", "/film", "/news", "/nothing"])
@pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "with token"])
def test_other_pages_may_not_read_pages(
    origin: Origin, serve: Serve, path: str, token: str | None
) -> None:
    site = serve({"film": film(origin).url, "news": NOWHERE}, server={"token": token})
    answer = site.get(path, Accept=BROWSER)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert cors(answer) == {}


@pytest.mark.parametrize("path", FOR_PLAYERS)
@pytest.mark.parametrize("server", [{}, {"token": TOKEN}, TRUSTED], ids=["open", "token", "trust"])
def test_preflight_is_always_answered(serve: Serve, server: dict[str, object], path: str) -> None:
    answer = serve({"news": NOWHERE}, server=server).ask("OPTIONS", path, **PREFLIGHT)
    assert (answer.status, answer.headers["Allow"]) == (204, "GET, HEAD, OPTIONS")
    methods = {"Access-Control-Allow-Methods": "GET, HEAD"}
    headers = {"Access-Control-Allow-Headers": "Authorization, Range"}
    assert cors(answer) == {**ANYBODY, **methods, **headers}


def test_trusted_client_without_token_shares_nothing(origin: Origin, serve: Serve) -> None:
    """Otherwise any page opened on a trusted machine could read the token from the playlist."""
    site = serve({"news": live(origin).url, "film": film(origin).url}, server=TRUSTED)
    hls = site.get("/news.m3u8")
    segment = re.findall(r"^news/\d+\.ts\?", hls.body.decode(), re.M)[0].rstrip("?")
    paths = ("/film", f"/{segment}", "/news.m3u", "/playlist.m3u", "/nothing", "/film?quality=4k")
    answers = {"/news.m3u8": hls, **{path: site.get(path) for path in paths}}
    assert {path for path, answer in answers.items() if cors(answer)} == set()
    assert cors(site.ask("HEAD", "/news")) == {}
    assert cors(site.get("/playlist.m3u?token=wrong")) == {}


@pytest.mark.parametrize(
    ("query", "headers"),
    [(f"?token={QUOTED_TOKEN}", {}), ("", {"Authorization": f"Bearer {TOKEN}"})],
    ids=["query", "Bearer"],
)
def test_trusted_client_with_the_token_shares_its_answers(
    serve: Serve, query: str, headers: dict[str, str]
) -> None:
    answer = serve({"news": NOWHERE}, server=TRUSTED).ask("GET", f"/news.m3u{query}", **headers)
    assert (answer.status, cors(answer)) == (200, ANYBODY)
