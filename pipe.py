#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["streamlink>=8.6.2,<9", "pyyaml>=6"]
# ///
"""StreamPipe: serve HLS channels as plain HTTP streams.

`GET /news` answers with an endless stream that VLC, Kodi, TVHeadend, Plex or curl can read.  A live
channel is pulled once, by streamlink, for all of its viewers; everything stays in memory.

Data flow
    origin -> Download -> ReaderBuffer -> Channel (Splicer, framer) -> Window -> viewers -> sockets
    Up to `threads` Downloads fetch segments at once; the bytes of the oldest one are passed on as
    they arrive.  A ReaderBuffer hands bytes and segment events (a segment starts, ends or is
    missing) from one thread to another.  HLS passes through two: each Download has its own, and the
    writer moves their bytes, in order, to the upstream's.  Each track that ffmpeg joins has one
    between these.  A live raw body has no Download.
    The Splicer joins several openings of the upstream into one stream that repeats nothing at the
    seams.  The framer cuts MPEG-TS into whole packets, removes ID3 tags and marks the join points.
    The Window keeps the newest blocks and segments of a live channel, knows each Viewer's place in
    them, and lists the segments for clients that poll (HLS) instead of streaming.
    A finite stream takes the same path, with one upstream and window for each viewer; its window
    waits for the viewer instead of evicting blocks.

A byte's path, live HLS in MPEG-TS, thread by thread
    executor   Http.request, Download.parts, fill, ReaderBuffer.write of the download's buffer
    writer     ReaderBuffer.take, DownloadingWriter._items, fill, ReaderBuffer.write of the
               upstream's buffer
    feeder     Upstream.read, Channel._move, InsertFilter.pass_on, Splicer.pass_bytes,
               TsFramer.feed, Window.append
    viewer     Window.take, Handler._send_body, send_some; for HLS, Handler.answer_segment and
               Window.find

Words
    source         the media that an address offers: live, or finite (a film, a recording)
    variant        one quality of a stream, as its master playlist lists it; a copy is another
                   entry of the playlist for the same quality, and a backup of the first
    upstream       what a channel has open at its origin.  An opening is one life of it: after an
                   outage, the next opening continues the same channel
    relay          a live raw body: it has no segments, and may repeat media when it is opened again
    track          one of the two playlists, picture and sound, that ffmpeg joins
    start          the opening for the first viewer of a channel; others may wait for it
    slot           the permission for an upstream, of the server and of an account (max_upstreams)
    insert         segments of another container among those of a stream
    seam           a place where the next bytes do not continue those that viewers have
    wanted segment the segment that viewers need next
    block          packets in MPEG-TS, any bytes otherwise; a window keeps and evicts whole blocks
    join point     a block with which a decoder can start; a makeshift one has no key frame
    preamble       bytes that go before a join point: PAT and PMT, an initialization section, or
                   ID3 tags
    apart          of a segment: it does not continue the one before it (EXT-X-DISCONTINUITY)
    feeder         the thread of a channel
    polling client a player that requests the channel as HLS

Threads
    main           parses arguments, waits for signals, reloads, closes everything
    listener       accepts connections; refuses those above the limits
    viewer-N       one for each connection: reads requests and answers them; a viewer's thread
                   then only takes from a Window, and is named viewer-NAME-N with a new number
    feed-NAME-0    one for each Channel: opens its upstream, judges it, reopens it
    pump-NAME-0    for a raw body or ffmpeg's output: moves it to the ReaderBuffer
    close-NAME-0   closes an upstream, which may have to wait for streamlink's threads
    log            writes the log, so that no other thread waits for the program that reads it
    list-NAME-0    one for each playlist: loads its channel list and applies it
    check-N        for --check: each starts a Channel for one address after the other
    judge_N        for addresses on the command line: finds out whether each is a list or a stream
    demo           for --demo: an origin, with a thread for each of its connections
    timers         threading.Timer: one aborts an opening, or the load of a list or a guide, that
                   takes too long; one ends a process that hangs in close()
    Threads of streamlink are named after the channel: a worker loads playlists and queues segments,
    a writer passes on the oldest download, an executor runs the downloads.  For ffmpeg, a thread of
    FFMPEGMuxer.copy_to_pipe reads each track.

Locks
    Lists._applying          makes and applies one configuration at a time
    Lists._changed           the known channel lists, and when to load each
    Channels.changed         the set of channels, the state of each, the records of streams
    Window._lock             blocks, join points, segments and viewers of one window
    ReaderBuffer._lock       the bytes and events that have not been taken yet
    Http._lock               the connections of one session
    DownloadingWriter._lock  the segments that wait, and the downloads
    Server._counts_lock      counts of answers and refusals, and the latest wrong tokens
    Server._open_lock        the sockets of all connections
    Checker._changed         which of the checks of --check are running
    LogHandler.lock          the log lines not written yet; may be taken under any lock
    _answered_lock           the address that answered last, for each origin's host
    A thread that holds the first lock of a line may take one of the others:
    Lists._applying > Lists._changed, Channels.changed, Window._lock
    Lists._applying > ReaderBuffer._lock, Http._lock
    Lists._changed > Http._lock
    Channels.changed > Window._lock, ReaderBuffer._lock, Http._lock
    DownloadingWriter._lock > ReaderBuffer._lock
    No other locks are held together, except that a reload holds Lists._applying around the pairs
    of Channels.changed.  Library locks may be taken inside any of them: each guards a few lines of
    an executor, a queue or a connection pool.  No lock is held across a socket write, a request or
    a join; shutting sockets down under a lock does not block.
    ProcessUpstream._first_failure is a lock that no thread waits for: only the first track gets it.

Where it is decided
    meaning of a configuration key   Configuration: the dataclasses, with each key's parser
    a list's entry becomes a stream  Channel lists: ListParser, name_entries, with_lists
    whether a loaded list is used    Lists._accept_or_refuse
    a viewer's first byte, in time   Channels.watch, Handler._first_blocks; HLS: _await_news
    its place in the stream          Window._choose_join; join points: Join, TsFramer._join_at
    eviction, or waiting for viewers Window._make_room and _foremost_wait, with their cases
    blocks kept for late viewers     Window._update_needed
    sharing of an upstream           Channels._find, _find_start; the states stand above State
    refusing and giving way          Channels._attach; the cases stand above Channels
    holders of a slot                Channels._holding and _room_at, for the server and each account
    a source has ended               the table above Upstream; Channel._read, _begin and _finish
    an upstream has failed           Channel._judge; within a segment Download._note_failed_try and
                                     SegmentDownload.is_fatal
    words for a failure, and advice  explain() and its table _SIGNS; Pages: ADVICE
    the next try, and its time       Channel._open_first and _keep_going
    a seam, as viewers see it        Splicer; its docstring has the table of its states
    segments of HLS                  Window.begin and finish; without segments: Window._cut_at
    length of a playlist             Window._trim_list; its text: media_playlist
    a viewer leaves, a channel ends  the tables above Channels list all ways
    a polling client has left        Viewer.is_gone, which Channels._add_poller sets; _has_moved
    end of a playlist                Channel._see_pollers_off; clients that get it: Channels.poll
    an answer                        Handler._route, _answer_path, _answer_stream; documents: Pages
    update of an open page           update_page; in the browser, PAGE_SCRIPT
    threads that may call a method   the class's docstring, or a comment above its methods

What to change for
    a container           its constant, `sniff` and load_list; a Framer if it has units; media_in
                          and UnitCounter, which prove that a key was right; Window._media_of and
                          media_playlist, if HLS can carry it
    a page                a function from Site to Page, and PAGES; RESERVED_NAMES if a stream could
                          have the same path; Handler._route if it needs no token
    a configuration key   its field, with parser and mark, in the dataclass of its section; its use.
                          PlaylistSettings and _stream_of if lists set it; secrets_of if it may hold
                          a secret; `restarts=False` if no upstream depends on it
    a reason of a failure its constant in Errors, _SIGNS if an exception causes it, and ADVICE
    Each of them: README's table, config.example.yml for a key, and the tests compare these.

Is it over?
    the server            Server.stopping: nobody new is served; Channels.stop sets it
    a channel             Channel.is_over: it is CLOSED, or ENDED: then its thread has ended, or
                          only sees polling clients off.  Channel.stop wakes its thread
    an opening            Session.closed, which its Http, its Upstream and its raw body share
    a track of it         its writer's `closing`, which is streamlink's own
    a handed-over source  ReaderBuffer.closed; is_exhausted once everything was taken
    a window              WindowEnded from Window.take, after end() or abort()
    a channel list        LoadingList.is_over

How long may this take?
    a request head        HEAD_TIMEOUT in all
    a start               `timeout` in all, shared by addresses and copies: Channel._open_first; a
                          busy address may get a second share
    an opening            its part of that: the Deadline of Session.resolve() and open(); tracks
                          for ffmpeg: ProcessUpstream._open_tracks
    a request             its time-out is for each wait, not for the whole of it
    a reload              `timeout` for each wait; it is requested twice in that time:
                          WatchedWorker._request_playlist
    a segment             two target durations (a film: `timeout`) without a byte:
                          Download._note_failed_try
    a silent source       `timeout` or two target durations: Channel._judge
    an outage             `reconnect` since the last byte; if it was noticed later, backups have
                          another `timeout` once: Channel._keep_going
    an idle channel       `linger`: Channels.close_if_abandoned; no time at all if it is PRIVATE, or
                          in a pause between two tries: Channels.close_if_unwatched.  A start is
                          not idle
    a paused viewer       `viewer_timeout`: Handler._send_pieces; it holds up the feeder of a live
                          channel for FOREMOST_PATIENCE
    a list, a guide       LIST_TIME, GUIDE_TIME: the Deadline of Fetch
    a key                 as a segment, all tries together: DownloadingWriter._decryptor
    a silent HLS client   three target durations or `linger`, the longer: Channel.poll_patience
    an ended playlist     as long: Channel._see_pollers_off
    a shutdown            STOP_TIME + DRAIN_TIME: close()

What goes wrong, in four words
    failure        why something ended, in words for people: an upstream, a download, a start
    trouble        why something that continues has no media or no news: a channel, a playlist
    failed         the state after a failure
    error          an exception; /status and /metrics call failures and troubles errors, too

Reading order
    Window, Channels.watch, Channel._run, Splicer, then Handler.stream_channel.  Configuration,
    Media and Pages start no thread and have no lock of their own.  Everything that streamlink runs
    is in Upstream; Errors and Configuration use a few of streamlink's names.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import binascii
import codecs
import contextlib
import difflib
import enum
import errno
import fnmatch
import functools
import gzip
import hashlib
import hmac
import html
import http.client
import importlib.metadata
import inspect
import io
import ipaddress
import itertools
import json
import logging
import lzma
import math
import os
import queue
import random
import re
import select
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import uuid
import warnings
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from http.cookiejar import MozillaCookieJar
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO, cast
from urllib.parse import parse_qs, parse_qsl, quote, unquote, unquote_to_bytes, urlencode, urlsplit

# Signals that arrive while the packages load are held until release_signals().  Otherwise SIGHUP
# would end a service that is reloaded right after its start, and a container's first process would
# never receive SIGTERM.
HELD_SIGNALS = {signal.SIGTERM, signal.SIGHUP} if hasattr(signal, "pthread_sigmask") else set()
if __name__ == "__main__" and HELD_SIGNALS:  # not on Windows
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)

try:
    import requests
    import socks  # type: ignore[import-untyped]
    import urllib3
    import yaml
    from Crypto.Util.Padding import unpad
    from requests.adapters import HTTPAdapter
    from streamlink.exceptions import StreamError as EngineStreamError
    from streamlink.options import Options as PluginOptions
    from streamlink.plugin.plugin import parse_params, stream_weight
    from streamlink.plugins import hls as _hls_plugin  # noqa: F401  (or the first viewer waits)
    from streamlink.plugins import http as _http_plugin  # noqa: F401  (or the first viewer waits)
    from streamlink.session.http import HTTPSession
    from streamlink.session.session import Streamlink
    from streamlink.stream.dash.dash import DASHStream, DASHStreamReader
    from streamlink.stream.ffmpegmux import FFMPEGMuxer, MuxedStream
    from streamlink.stream.hls.hls import (
        HLSStream,
        HLSStreamReader,
        HLSStreamWorker,
        HLSStreamWriter,
    )
    from streamlink.stream.hls.m3u8 import M3U8Parser
    from streamlink.stream.hls.segment import HLSPlaylist
    from streamlink.stream.http import HTTPStream
    from streamlink.stream.segmented.segmented import SegmentedStreamReader
    from streamlink.utils.id3v2 import ID3v2Error
    from streamlink.utils.l10n import Localization
    from streamlink.utils.url import update_scheme
    from urllib3.util.ssltransport import SSLTransport
except ImportError as error:
    sys.exit(f"StreamPipe needs its packages ({error}): pip install -r requirements.txt")
except RuntimeError as error:  # importing streamlink's cache looks up the home directory
    sys.exit(f"StreamPipe cannot start: {error} Set the environment variable HOME.")

__version__ = "1.0.0"

log = logging.getLogger("streampipe")


# --------------------------------------------------------------------------------------------------
# Constants that several sections use
#
# The constants of a single section stand at its head.  Users configure none of them.
# --------------------------------------------------------------------------------------------------

KIB, MIB = 1 << 10, 1 << 20  # bytes
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2  # exit statuses; 2 is also argparse's

SEND_BLOCKS = 512  # blocks that a viewer takes at once: a call accepts 1,024 pieces on Linux
SNIFF_LIMIT = 752  # bytes to detect a container from: three TS packets at any offset
TAG_LIMIT = 1 * MIB  # bytes of ID3 tags read at most to detect the container behind them

FOREMOST_PATIENCE = 5.0  # seconds without a byte until the foremost viewer counts as paused
KEY_FRAME_LIFE = 30.0  # seconds; a viewer that joined at an older one would lag too far behind
REPEAT_TIME = 10.0  # seconds between log lines of one kind: a player may cause forty a second
START_TICK = 0.5  # seconds between two checks of whether a waiting client is still connected
FEEDER_TICK = 1.0  # a feeder checks its viewers or its upstream at least this often, in seconds
LISTED_TIME = 60.0  # seconds; hardly any live playlist covers more
JUDGE_GRACE = 1.5  # extra seconds for Channel._judge, so that a download abandons a segment first
STOP_TIME = 4.0  # seconds that Channels.stop() may take, so that the process exits within 5 s

STREAM_NAME = re.compile(r"[a-z0-9-]+")
# Paths of the server that look like a stream's.
RESERVED_NAMES = frozenset({"health", "status", "metrics", "playlist"})
LEAST_SECRET = 4  # characters; shorter texts also occur in ordinary words
PLAYING = ("live", "private")  # states in which media flows


# --------------------------------------------------------------------------------------------------
# Errors
#
#   class             meaning                                   caught by
#   PipeError         the root; by itself: a try of a download  Download: may try again
#                     failed, or the server cannot run          main: exits with status 1
#   ConfigError       the configuration has mistakes            main: prints them; a reload: logs
#                                                               them
#   StreamError       a request cannot be answered with media   Handler: answers with its status
#     UpstreamError   because the origin failed                 before that, Channel: tries again
#     LimitReached    because there is no room                  before that, Channels.watch: waits
#                                                               if the client zaps; Channel: tries
#                                                               another address
#   ViewerGone        a viewer left, or is disconnected         Handler: logs and counts it
#   WindowEnded       a window has no more data for a viewer    Handler: ends the body
#   SourceEnded       a source truly ended                      Channel: ends its window
#   Stop              a channel's thread must end               Channel: closes
#
# Other sections derive errors of their own: ListError, DownloadError, DecryptionError, BadPlaylist
# and NoHls.
# --------------------------------------------------------------------------------------------------

RETRY_AFTER = 5  # seconds after which a client that was refused may repeat its request


class PipeError(Exception):
    """Root of StreamPipe's own errors."""


class ConfigError(PipeError):
    """The configuration cannot be used; `mistakes` has one line for each mistake."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


class StreamError(PipeError):
    """A request cannot be answered with media; the client may see `status` and `reason`."""

    def __init__(self, status: HTTPStatus, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after  # seconds

    def copy(self) -> StreamError:
        """A copy to raise or keep: a raised exception keeps every frame that it passed alive."""
        return StreamError(self.status, self.reason, self.retry_after)


class UpstreamError(StreamError):
    """The origin failed; `reason` names neither an address nor an exception."""

    def __init__(self, reason: str) -> None:
        status = HTTPStatus.BAD_GATEWAY
        if reason == TIMED_OUT:
            status = HTTPStatus.GATEWAY_TIMEOUT
        super().__init__(status, reason)


# The limits, as the metric names them.  `account` is the `max_upstreams` of a playlist.
LIMITS = ("max_viewers", "max_upstreams", "account", "connections", "threads")


class LimitReached(StreamError):
    """There is no room for another viewer, upstream or thread; `limit` is one of LIMITS.

    `held_by` has the addresses of the clients that occupy the slots.
    """

    def __init__(self, reason: str, limit: str, held_by: Collection[str] = ()) -> None:
        super().__init__(HTTPStatus.SERVICE_UNAVAILABLE, reason, RETRY_AFTER)
        self.limit = limit
        self.held_by = held_by

    def copy(self) -> LimitReached:
        return LimitReached(self.reason, self.limit, self.held_by)


class ViewerGone(PipeError):
    """A viewer left, or StreamPipe disconnects it.

    The log shows `reason`.  `label` is the reason in the metric of disconnected viewers; None if
    the viewer left by itself.
    """

    def __init__(self, reason: str = "left", label: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.label = label


class WindowEnded(PipeError):
    """A window has no more data for its viewer.

    `is_complete` is true if the source truly ended.
    """

    def __init__(self, is_complete: bool) -> None:
        super().__init__("complete" if is_complete else "broken off")
        self.is_complete = is_complete


class SourceEnded(PipeError):
    """The source of an upstream truly ended, and all of its data has been read."""


class Stop(PipeError):
    """Ends a channel's thread: it is no longer needed, or nothing can continue its output."""


# Reasons: why an origin failed, for people.  ADVICE says what to do about most of them.  In a
# report of --check, the position of the address replaces "the origin".


def answered(status: int) -> str:
    """The reason for an HTTP error status from the origin."""
    return f"the origin answered {status}"


CONNECTION_REFUSED = "the origin refuses connections"
UNKNOWN_HOST = "the origin's host name is unknown"
NO_ROUTE = "there is no network route to the origin"
CONNECTION_CLOSED = "the origin closed the connection"
TIMED_OUT = "the origin did not answer in time"
PROXY_FAILED = "the proxy does not answer"
BAD_CERTIFICATE = "the origin's certificate is not valid"
NO_TLS = "the origin refuses secure connections: write http:// in front of its address"
FROM_HTTPS_TO_HTTP = "the origin switches from https to http: configure the http:// address"
REDIRECT_LOOP = "the origin redirects in a loop"
NOT_HTTP = "the origin does not speak HTTP"
BAD_COMPRESSION = "the origin's answer cannot be decompressed"

UNSUPPORTED_SCHEME = "is not supported: use http:// or https://"
UNSUPPORTED_ADDRESS = "the origin refers to an unsupported kind of address"
LOCAL_FILE = "the origin refers to a local file: refused"
WEB_PAGE = "the origin sent a web page, not a stream"
SHORT_TEXT = "the origin sent text, not a stream"
CHANNEL_LIST = "the address is a channel list: put it under playlists:, not under streams:"
NOT_HLS = "the origin sent something that is not an HLS playlist"
INVALID_TAG = "the origin's playlist has an invalid key, map or byte range"
TOO_LARGE_PLAYLIST = "the origin's playlist is too large"
EMPTY_PLAYLIST = "the origin's playlist is empty"
NO_VARIANT = "the origin's playlist lists no playable stream"
NO_STREAM = "the origin offers no stream at this address"
NO_SUCH_QUALITY = "the configured quality does not exist"

DRM_PROTECTED = "the stream is DRM-protected"
NOT_A_KEY = "the decryption key is not an AES-128 key"
WRONG_KEY = "decryption failed: wrong key"
CUT_SEGMENT = "decryption failed: the segment is incomplete"

EMPTY_ANSWER = "the origin sent an empty answer"
BROKEN_ANSWER = "the origin's answer broke off"
NO_MEDIA = "the origin sent no media"
ENDED_BEFORE = "the origin's playlist ends before the next segment"
NO_DATA = "the origin sends no data"
NO_MORE_SEGMENTS = "the origin sends no more segments"
NOT_BACK = "the origin did not recover in time"
OTHER_FILE = "the origin sent a different file"
NOT_RESUMABLE = "a film of separate files cannot continue in the middle"
JUST_ENDED = "the stream has just ended"
OTHER_FAILURE = "the origin's stream cannot be opened"

UNREADABLE_COOKIES = "a file in http-cookies-files cannot be read"
NO_FFMPEG = "audio and video are separate: install ffmpeg"
FFMPEG_NOT_STARTED = "ffmpeg cannot be started"
FFMPEG_FAILED = "ffmpeg failed"
TOO_MANY_FILES = "the server has too many open files: raise the limit of open files"
TOO_MANY_THREADS = "the server has too many threads: raise the limit of threads"

# There is no server at the address.
NO_SERVER = frozenset({CONNECTION_REFUSED, UNKNOWN_HOST, NO_ROUTE, CONNECTION_CLOSED})
# The address may have expired: it must be resolved again.
EXPIRED = frozenset(answered(status) for status in (401, 403, 404, 410))
# The origin may allow no more connections; panels use statuses of their own.
BUSY = frozenset(answered(status) for status in (403, 429, 458, 503, 509))
NOT_MEDIA = frozenset({WEB_PAGE, SHORT_TEXT})
# Another try to fetch the key cannot help.
HOPELESS_KEY = NOT_MEDIA | {UNSUPPORTED_ADDRESS, LOCAL_FILE, NOT_A_KEY, INVALID_TAG}


class Sign(NamedTuple):
    """How to recognize a reason: by types of exceptions, or by parts of their texts.

    Either may belong to the error itself or to any of its causes.
    """

    reason: str
    types: tuple[type[BaseException], ...] = ()
    texts: tuple[str, ...] = ()


def _error_numbers(*numbers: int) -> tuple[str, ...]:
    """The beginnings of the texts of an OSError with one of these numbers."""
    return tuple(f"[Errno {number}]" for number in numbers)


# The first match wins, so causes stand before their consequences.  Errors that call for the same
# action share a reason.
_SIGNS = (
    Sign(PROXY_FAILED, types=(requests.exceptions.ProxyError, socks.ProxyError)),
    Sign(UNKNOWN_HOST, types=(socket.gaierror,)),
    Sign(CONNECTION_REFUSED, types=(ConnectionRefusedError,)),
    Sign(
        TIMED_OUT,
        types=(requests.Timeout, urllib3.exceptions.ReadTimeoutError, TimeoutError),
    ),
    Sign(BAD_CERTIFICATE, types=(ssl.SSLCertVerificationError,)),
    Sign(LOCAL_FILE, texts=("file:", "scheme='file'")),
    Sign(FROM_HTTPS_TO_HTTP, texts=(" scheme='http'", "Disallowed redirection to http:")),
    Sign(
        UNSUPPORTED_ADDRESS,
        types=(requests.exceptions.InvalidSchema,),
        texts=(
            "Invalid URL",
            "Invalid IPv6",
            "Failed to parse: ",
            "insecure resource",
            "Disallowed redirection",
        ),
    ),
    Sign(REDIRECT_LOOP, types=(requests.TooManyRedirects,)),
    Sign(
        BROKEN_ANSWER,
        types=(http.client.IncompleteRead, urllib3.exceptions.IncompleteRead),
    ),
    Sign(CONNECTION_CLOSED, types=(ConnectionError,)),
    Sign(NOT_HTTP, types=(http.client.HTTPException,)),
    Sign(
        BAD_COMPRESSION,
        types=(requests.exceptions.ContentDecodingError, urllib3.exceptions.DecodeError),
    ),
    Sign(FFMPEG_NOT_STARTED, types=(FileNotFoundError,)),
    Sign(
        NO_ROUTE,
        texts=_error_numbers(
            errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN
        ),
    ),
    Sign(TOO_MANY_FILES, texts=_error_numbers(errno.EMFILE)),
    Sign(NO_TLS, texts=("[SSL",)),
    Sign(NOT_HLS, texts=("EXTM3U",)),
    Sign(NO_VARIANT, texts=("variant playlist", "I-frames only")),
    Sign(INVALID_TAG, texts=("Missing URI for decryption key",)),
    Sign(TOO_MANY_THREADS, texts=("new thread",)),
    Sign(CONNECTION_CLOSED, types=(requests.ConnectionError,)),
)


def explain(error: BaseException) -> str:
    """The reason for an upstream's failure, without any address or any library's text."""
    chain = _with_causes(error)
    for each in chain:
        if isinstance(each, PipeError):
            return str(each)
        if isinstance(each, requests.HTTPError) and each.response is not None:
            return answered(each.response.status_code)
    texts = "\n".join(str(each) for each in chain)
    for sign in _SIGNS:
        if any(isinstance(each, sign.types) for each in chain):
            return sign.reason
        if any(text in texts for text in sign.texts):
            return sign.reason
    return OTHER_FAILURE


def _with_causes(error: BaseException) -> list[BaseException]:
    """An error, followed by its causes in turn."""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        wrapped = getattr(each, "err", None)  # streamlink's errors keep their cause here
        each = wrapped or each.__cause__ or each.__context__
    return chain


def _many(count: int, word: str) -> str:
    """A count with its word: `1 segment`, `2 segments`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _joined(texts: Sequence[str], most: int) -> str:
    """At least one text in words: `A`, `A and B`, or `A, B and 7 more` if there are many."""
    shown = list(texts[:most])
    if len(texts) > most:
        shown.append(f"{len(texts) - most} more")
    *others, last = shown
    if not others:
        return last
    return f"{', '.join(others)} and {last}"


def _unique(texts: Iterable[str]) -> list[str]:
    """The texts without repeats, in the order in which each first occurs."""
    return list(dict.fromkeys(texts))


# --------------------------------------------------------------------------------------------------
# Configuration: dataclasses, and the reader that turns YAML into them or into a list of mistakes
#
# The reader works on the YAML library's nodes, not on YAML 1.1 values.  It takes a scalar as
# written, so `on:` and `007:` are names and `token: 0123` is text.  Every node knows its line.
# No message quotes anything that may be a secret: an address, a token, a header, a key with unusual
# characters, or the value of an environment variable.
# --------------------------------------------------------------------------------------------------

HOUR, DAY = 3600, 86_400  # seconds

# The options of streamlink that the file may set under `streamlink:`, by name.  The value is an
# example of the option's type, or `...` if only StreamPipe may set it.
EngineOptions = Mapping[str, Any]
GLOBAL_ENGINE_OPTIONS = frozenset({"ipv4", "ipv6"})  # they affect the whole process

# A parser turns a text into a value.  A reader turns a node of the file into a value, or into None,
# which stands for the default.  Both raise ValueError with the message to show.
Parse = Callable[[str], Any]
Read = Callable[["ConfigReader", yaml.Node], Any]
Section = dict[str, tuple[yaml.Node, yaml.Node]]  # by key: the nodes of the key and its value

NULL_TAG = "tag:yaml.org,2002:null"  # of `null`, `~` and an empty value
STREAM_NAME_RULE = (
    "a stream name may only contain a-z, 0-9 and -, e.g. channel-1; "
    "use title: for the name that people see"
)
PLAYLIST_NAME_RULE = "a playlist's name may only contain a-z, 0-9 and -, e.g. provider-1"
# The similarity that difflib measures between a misspelled key and a known one: `group` and
# `groups` reach it.
ALMOST_EQUAL = 0.9


class TaggedNode(yaml.Node):
    """Replaces a node with a tag (`!secret tv`), whose value would silently lose the tag."""


class NodeLoader(yaml.SafeLoader):
    """Builds the nodes of a file; one with a tag becomes a TaggedNode, which all readers refuse."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if node is None or getattr(event, "tag", None) is None:
            return node
        tagged = TaggedNode("!", None, node.start_mark, node.end_mark)
        if event.anchor is not None:
            self.anchors[event.anchor] = tagged
        return tagged


# What each kind of node is called in messages.
NODE_KINDS = {
    yaml.ScalarNode: "text",
    yaml.SequenceNode: "a list",
    yaml.MappingNode: "a section",
    TaggedNode: "a YAML tag, which is not supported: put quotes around a text that begins with !, "
    "or write ${NAME} for an environment variable",
}

CURLY_QUOTES = 'use straight quotes (") instead of curly quotes'
# Matches a whole text that begins with a curly quote.  After a double one, another double one may
# only be at the end; after a single one, the text must end with a single one.  So the titles
# "Best of" TV and 't Journaal do not match if their quotes are curly.
_DOUBLE, _SINGLE = r"[\u201c-\u201e]", r"[\u2018-\u201a]"
_IN_CURLY_QUOTES = re.compile(rf"{_DOUBLE}[^\u201c-\u201e]*{_DOUBLE}?|{_SINGLE}.*{_SINGLE}")

# Matches `$${`, `${NAME}`, and any other `${`, which is a mistake.
_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)\}|\$\{")


class YamlSlip(NamedTuple):
    """A common mistake in YAML: how to recognize it, and the advice to show.

    The mistake is often in a line above the place that the library names.  The reported line is
    the nearest one that matches `line`, searched backwards from that place.
    """

    problem: str  # a pattern of the library's message
    line: str  # a pattern of the line to report; an empty one matches every line
    advice: str


YAML_SLIPS = (
    YamlSlip(r"'\\t'", r".*\t", "found a tab: use spaces"),
    YamlSlip("mapping values", rf".*[:,[{{-]\s*(?:{_DOUBLE}|{_SINGLE})", CURLY_QUOTES),
    YamlSlip(
        "tag handle|URI escape|expected '>'",
        r".*\s!",
        "put quotes around a text that begins with !",
    ),
    YamlSlip(r"got '\{'", r".*\$\{", "put quotes around a value with ${ inside brackets"),
    YamlSlip(
        "end of stream|'<scalar>'",
        r""".*[:,[{-]\s*(["'])(?:(?!\1).)*$""",
        "this quoted text has no closing quote",
    ),
    YamlSlip("mapping values|expected ':'", r"\s*[\w.-]+:[^\s/]", "put a space after the colon"),
    YamlSlip(
        "'<scalar>'",
        "",
        "found text after a closing quote: use the other kind of quotes around the value",
    ),
    YamlSlip(
        "mapping values|<block ",
        "",
        "align this line with those above, or put quotes around a value with a colon",
    ),
    YamlSlip("cannot start any token", "", "put quotes around this value"),
    YamlSlip("another document", "", "found a second document: remove it"),
    YamlSlip("second occurrence", "", "duplicate anchor"),
)


def text_of(node: yaml.Node) -> str:
    """The text of a single value as written; empty for `null` or `~`.

    Raises ValueError for any other node, for a text in curly quotes, and for half a character.
    """
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"expected a single value, got {NODE_KINDS[type(node)]}")
    if node.tag == NULL_TAG:
        return ""
    if node.style is None and _IN_CURLY_QUOTES.fullmatch(node.value):
        raise ValueError(CURLY_QUOTES)
    return _with_whole_characters(str(node.value))


def _with_whole_characters(text: str) -> str:
    """A text in which each pair of surrogates is the character that it stands for.

    JSON writes an emoji as such a pair, and the YAML library reads that as two characters.  Raises
    ValueError for a surrogate without its partner.
    """
    pairs = text.encode("utf-16", "surrogatepass")
    try:
        return pairs.decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError("found half of a character (a lone surrogate)") from None


def with_environment(text: str) -> str:
    """Replace `${NAME}` with environment variables, and `$${` with `${`.

    Raises ValueError for any other `${`, and for a variable that is not set or not printable.
    """

    def value_of(found: re.Match[str]) -> str:
        name = found[1]
        if found[0] == "$${":
            return "${"
        if name is None:
            raise ValueError(
                "expected the name of an environment variable, like ${NAME}; write $${ for ${"
            )
        value = os.environ.get(name)
        if value is None:
            raise ValueError(f"the environment variable {name} is not set")
        if not value.isprintable():
            raise ValueError(
                f"the environment variable {name} contains a character that cannot be printed"
            )
        return value

    return _VARIABLE.sub(value_of, text)


def parsed(parse: Parse, node: yaml.Node) -> Any:
    """Parse a single value after replacing environment variables in it; may raise ValueError."""
    written = text_of(node)
    text = with_environment(written)
    try:
        return parse(text)
    except ValueError as error:
        # The message may quote a short value, but never that of an environment variable.
        raise ValueError(str(error).replace(f'"{text}"', f'"{written}"')) from None


def checked(check: Callable[[str], object], message: str) -> Parse:
    """A parser that returns a text unchanged if `check` is true and does not raise."""

    def parse(text: str) -> str:
        with contextlib.suppress(ValueError, OSError, RuntimeError):
            if check(text):
                return text
        raise ValueError(message)

    return parse


def number_from(kind: type[int] | type[float], least: float, most: float | None = None) -> Parse:
    """A parser of numbers from `least` to `most`, or without an upper limit."""
    expected = "expected a whole number" if kind is int else "expected a number"
    if most is None:
        expected += f", {least} or more"
    else:
        expected += f" from {least} to {most}"

    def parse(text: str) -> float:
        value = _finite_number(kind, text)
        if value is not None and value >= least and (most is None or value <= most):
            return value
        got = ""
        if re.fullmatch(r"[\w.+-]{0,20}", text):  # too short and plain to be a secret
            got = f', got "{text}"'
        raise ValueError(expected + got)

    return parse


def _finite_number(kind: type[int] | type[float], text: str) -> float | None:
    """A number as written, or None for any other text, also for `nan` and `inf`."""
    if not re.fullmatch(r"[-+.\d_eE]+", text):
        return None
    try:
        value = kind(text)
    except ValueError:
        return None
    if abs(value) == math.inf:  # as 1e999 is
        return None
    return value


def refused(message: str) -> Parse:
    """A parser that accepts no value."""

    def parse(text: str) -> NoReturn:
        raise ValueError(message)

    return parse


def true_or_false(text: str) -> bool:
    value = yaml.SafeLoader.bool_values.get(text.lower())
    if value is None:
        raise ValueError("expected true or false")
    return value


NO_SCHEME = "begin the address with http:// or https://"
NOT_HTTP_ADDRESS = "expected an address that starts with http:// or https://"
# A scheme, or several: a prefix of streamlink stands before the address (`hls://https://...`).
_SCHEMES = re.compile(r"^([\w.+-]+://)+")
_SCHEMES_BUT_FILE = re.compile(r"^((?!file:)[\w.+-]+://)+", re.I)
# A file: address, or a path: ~/a, /a, ./a, ../a, c:/a, or the same with backslashes; but not //.
_LOCAL_PATH = re.compile(r"file:|~|\.{0,2}[/\\](?!/)|[a-z]:[/\\]", re.I)


def check_port(address: str) -> None:
    """Raise ValueError if an address names a port that does not exist."""
    target = _SCHEMES.sub("", address)
    authority = re.split(r"[/?#\s]", target)[0]
    host = authority.rpartition("@")[2]
    port = re.fullmatch(r"(?:\[.*\]|[^:\[]*):(.+)", host)
    if port is None:
        return
    if not re.fullmatch(r"[0-9]{1,5}", port[1]) or not 1 <= int(port[1]) <= 65535:
        raise ValueError("the address has an invalid port: expected a number from 1 to 65535")


def with_port(parse: Parse) -> Parse:
    """A parser of addresses that first refuses a port that does not exist."""

    def parse_address(text: str) -> Any:
        check_port(text)
        return parse(text)

    return parse_address


def stream_address(text: str) -> str:
    """The address for the upstream to open, with any prefixes (`hls://https://...`).

    Raises ValueError for a local file or a malformed address.
    """
    address = text.strip()
    target = _SCHEMES_BUT_FILE.sub("", address)
    if not target:
        raise ValueError("the address is missing")
    if _LOCAL_PATH.match(target):
        raise ValueError("local files are never opened: use an http:// or https:// address")
    if re.match(r"\w+:\w+://", address):  # news:http://...
        raise ValueError("put a space after the first colon")
    if target == address:
        raise ValueError(NO_SCHEME)
    if not address.isprintable():
        raise ValueError("the address contains a control character")
    check_port(address)
    try:
        urlsplit(without_prefixes(address))
    except ValueError:  # brackets that do not enclose an IPv6 address, for example
        raise ValueError("the address has an invalid host") from None
    return address


def list_address(text: str) -> str:
    """The address of a channel list, or the path of a local one; raises ValueError otherwise."""
    address = text.strip()
    if "://" not in address:
        if not re.search(r"\.m3u8?$", address, re.I):
            raise ValueError(
                "begin the address with http://, or name a local file that ends in .m3u"
            )
        return address
    return str(web_url(stream_address(address)))


def without_prefixes(address: str) -> str:
    """An address without streamlink's prefix (`hls://`) in front of it."""
    return re.sub(r"^(?:hls|hlsvariant|httpstream|dash)://(?=\w+://)", "", address)


def _scheme_and_host(address: str) -> tuple[str, str]:
    """Scheme and host of an address; two empty strings if it is malformed or has no host."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        if parts.hostname and parts.port != 0:
            return parts.scheme, parts.hostname
    return "", ""


def _is_web_address(address: str) -> bool:
    scheme, _ = _scheme_and_host(address)
    return scheme in ("http", "https")


def _is_proxy_address(address: str) -> bool:
    scheme, _ = _scheme_and_host(address)
    return scheme in ("http", "https", "socks4", "socks4a", "socks5", "socks5h")


def _is_header_value(text: str) -> bool:
    """Whether HTTP can carry a value (RFC 9110, 5.5)."""
    return text.isprintable() and text.isascii() and text.strip() == text


def _is_file(path: str) -> bool:
    return Path(path).is_file()


def _is_cookies_file(file: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # http.cookiejar warns about a bad line with a traceback
        MozillaCookieJar(Path(file).expanduser()).load()
    return True


def _is_locale(text: str) -> bool:
    try:
        Localization(text)
    except LookupError:
        return False
    return True


def _is_reload_time(text: str) -> bool:
    """Whether streamlink uses this interval between two loads of a playlist.

    It silently ignores a number below 2.
    """
    if text in ("default", "segment", "live-edge"):
        return True
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None and float(text) >= 2.0


def _is_own_interface(text: str) -> bool:
    """Return true if this machine has an interface or address; raises OSError otherwise."""
    name, host = _interface_and_host(text)
    if name:
        socket.if_nametoindex(name)
    if host:
        family = socket.AF_INET
        if ":" in host:
            family = socket.AF_INET6
        with socket.socket(family) as probe:
            probe.bind((host, 0))
    return True


def _interface_and_host(text: str) -> tuple[str | None, str | None]:
    """The interface and the address of streamlink's option `interface`, as streamlink reads it."""
    if sys.platform == "win32":
        return None, text
    kind, _, rest = text.partition("!")
    if kind == "if":
        return rest, None
    if kind == "host":
        return None, rest
    if kind == "ifhost" and "!" in rest:
        name, _, host = rest.partition("!")
        return name, host
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return text, None  # an interface, perhaps that of a VLAN, such as eth0.100
    return None, text


# A text that must not be empty: an empty token, for example, would let everyone in.
filled_text = checked(bool, "the value is empty: fill it in, or remove the key")
own_address = checked(
    re.compile(r"[\w.:%-]+").fullmatch, "expected an address of this machine, like 0.0.0.0"
)


def host_address(text: str) -> str:
    """An address of this machine, without a port; raises ValueError otherwise."""
    if re.fullmatch(r"[^:]*:[0-9]+", text):
        raise ValueError("write the port under port:, not after the host")
    return str(own_address(text))


network = checked(ipaddress.ip_network, "expected a network like 192.168.0.0/16")
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.1
header_value = checked(
    _is_header_value, "a header value must be one line of ASCII text without surrounding blanks"
)
web_url = with_port(checked(_is_web_address, NOT_HTTP_ADDRESS))
proxy_url = with_port(
    checked(_is_proxy_address, "expected an address that starts with http:// or socks5h://")
)
name_prefix = checked(
    re.compile(r"[a-z0-9-]*").fullmatch, "a prefix may only contain a-z, 0-9 and -, e.g. uk-"
)
thread_count = number_from(int, 1, 64)  # hardly any origin allows more connections
ring_size = number_from(int, 256 * KIB, 4096 * MIB)  # bytes
request_time = number_from(float, 0.1, HOUR)  # seconds


def reader_of(parse: Parse, example: Any) -> Read:
    """The reader of a key whose value is a map, a list or a single value, as `example` is.

    The reader parses each text in the value with `parse`.
    """
    if isinstance(example, Mapping):
        return functools.partial(read_map, parse)
    if isinstance(example, (list, tuple)):
        return functools.partial(read_list, parse)
    return functools.partial(read_single, parse)


def read_single(parse: Parse, reader: ConfigReader, node: yaml.Node) -> Any:
    if node.tag == NULL_TAG:
        return None
    return parsed(parse, node)


def read_list(parse: Parse, reader: ConfigReader, node: yaml.Node) -> tuple[Any, ...] | None:
    if node.tag == NULL_TAG:
        return None
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError(f"expected a list like [a, b], got {NODE_KINDS[type(node)]}")
    return _read_items(parse, reader, node.value)


def _read_items(parse: Parse, reader: ConfigReader, items: Iterable[yaml.Node]) -> tuple[Any, ...]:
    """Parse each item; one with a mistake is left out."""
    found = []
    for item in items:
        with reader.at(item):
            found.append(parsed(parse, item))
    return tuple(found)


def read_map(parse: Parse, reader: ConfigReader, node: yaml.Node) -> dict[str, Any]:
    """Read a map of texts by header name; cookies and query parameters have such names, too."""
    found = {}
    for name, (key, value) in reader.section(node).items():
        with reader.at(key, name):
            if not HEADER_NAME.fullmatch(name):
                raise ValueError("this is not a valid header name")
            found[name] = parsed(parse, value)
    return found


def read_addresses(reader: ConfigReader, node: yaml.Node) -> tuple[Any, ...]:
    """Read one address or a list of addresses."""
    if not isinstance(node, yaml.SequenceNode):
        return _read_items(stream_address, reader, [node])
    if not node.value:
        raise ValueError("the list of addresses is empty")
    return _read_items(stream_address, reader, node.value)


def read_engine_options(reader: ConfigReader, node: yaml.Node) -> dict[str, Any]:
    """Read the `streamlink:` map."""
    is_global = reader.path[0] == "options"
    readers: dict[str, Read] = {}
    for name, example in reader.engine.items():
        if name in GLOBAL_ENGINE_OPTIONS and not is_global:
            parse = refused("this affects the whole process: set it under options.streamlink")
        elif name in ENGINE_PARSERS:
            parse = ENGINE_PARSERS[name]
        else:
            parse = ENGINE_PARSERS.get(type(example), str)
        readers[name] = reader_of(parse, example)
    return reader.table(node, readers)


# Parsers by the option's type; or by its name, if some values of the type would make streamlink
# raise, hang or do nothing.
ENGINE_PARSERS: dict[str | type, Parse] = {
    type(...): refused("StreamPipe sets this itself, for safety: remove it"),
    bool: true_or_false,
    int: number_from(int, 0),
    float: number_from(float, 0),
    dict: header_value,
    "ringbuffer-size": ring_size,
    "stream-segment-threads": thread_count,
    "stream-segment-timeout": request_time,
    "stream-segmented-queue-deadline": number_from(float, 0),  # target durations
    "stream-timeout": request_time,
    "http-timeout": request_time,
    "http-proxy": proxy_url,
    "http-ssl-cert": checked(_is_file, "there is no such file"),
    "http-cookies-files": checked(
        _is_cookies_file, "expected a readable cookies.txt file in Netscape format"
    ),
    "locale": checked(_is_locale, "expected a language and a country, like en_US"),
    "interface": checked(_is_own_interface, "expected an interface or address of this machine"),
    "ffmpeg-loglevel": checked(
        re.compile("quiet|panic|fatal|error|warning|info|verbose|debug|trace").fullmatch,
        "expected a log level of ffmpeg, like error",
    ),
    "hls-playlist-reload-time": checked(
        _is_reload_time,
        "expected segment, live-edge, default or a number of seconds, 2 or more: "
        "streamlink ignores a shorter interval",
    ),
    "hls-live-edge": number_from(int, 1),
    "hls-start-offset": number_from(float, -7 * DAY, 7 * DAY),  # seconds; negative: from the end
}


# Settings.  Each field that is a key of the file carries the key's reader and default.


def setting(parse: Parse, default: Any, *, restarts: bool = True) -> Any:
    """A field for a key whose value is shaped like `default`; `parse` parses each text in it.

    A default may be a map: dataclasses refuse one, so this passes it as a factory.
    `restarts`, which counts in Options and StreamSettings alone: an open upstream depends on it, so
    a reload that changes it ends the channel.
    """
    metadata = {"read": reader_of(parse, default), "restarts": restarts}
    return field(default_factory=lambda: default, metadata=metadata)


def readers_of(settings: type[Any]) -> dict[str, Read]:
    """The reader of each key, by the key's name."""
    return {item.name: item.metadata["read"] for item in fields(settings) if item.metadata}


def restarting_keys(settings: type[Any]) -> list[str]:
    """The keys that an open upstream depends on."""
    return [item.name for item in fields(settings) if item.metadata.get("restarts")]


def read_section(settings: type[Any], reader: ConfigReader, node: yaml.Node) -> Any:
    """Read a section into its dataclass, `settings`."""
    return settings(**reader.table(node, readers_of(settings)))


@dataclass(frozen=True)
class ServerSettings:
    """The section `server:`."""

    host: str = setting(host_address, "0.0.0.0")
    port: int = setting(number_from(int, 0, 65535), 8080)
    max_viewers: int = setting(number_from(int, 0), 1000)  # 0 = no limit
    max_upstreams: int = setting(number_from(int, 0), 64)  # 0 = no limit
    token: str | None = setting(filled_text, None)
    trusted: tuple[str, ...] = setting(network, ())  # CIDR
    public_url: str | None = setting(web_url, None)
    name: str = setting(str, "StreamPipe")
    epg: str | None = setting(web_url, None)
    proxies: tuple[str, ...] = setting(network, ())  # CIDR; their X-Forwarded-For is trusted


@dataclass(frozen=True)
class Options:
    """The section `options:`, or the options of one stream or playlist."""

    user_agent: str = setting(header_value, "StreamPipe/1.0")
    threads: int = setting(thread_count, 4)
    timeout: float = setting(request_time, 20.0)  # seconds
    buffer_size: int = setting(number_from(int, 1, 64 * MIB), 8192)  # bytes
    ringbuffer_size: int = setting(ring_size, 16 * MIB)  # bytes
    linger: float = setting(number_from(float, 0, DAY), 10.0, restarts=False)  # seconds
    reconnect: float = setting(number_from(float, 0, DAY), 60.0, restarts=False)  # seconds
    # In seconds.
    viewer_timeout: float = setting(number_from(float, 0.1, DAY), 600.0, restarts=False)
    streamlink: Mapping[str, Any] = field(
        default_factory=dict, metadata={"read": read_engine_options, "restarts": True}
    )


@dataclass(frozen=True)
class StreamSettings:
    """A stream; its `options` are the file's or its playlist's, overridden by its own."""

    name: str
    urls: tuple[str, ...]
    title: str = setting(str, "", restarts=False)
    logo: str | None = setting(web_url, None, restarts=False)
    group: str | None = setting(str, None, restarts=False)
    tvg_id: str | None = setting(str, None, restarts=False)
    # Unique among the streams.
    number: int | None = setting(number_from(int, 1), None, restarts=False)
    quality: str = setting(filled_text, "best")
    headers: Mapping[str, str] = setting(header_value, {})
    proxy: str | None = setting(proxy_url, None)
    # If true, neither playlists nor pages show it.
    hide: bool = setting(true_or_false, False, restarts=False)
    options: Options = field(default_factory=Options)
    # The playlist that the stream was imported from; None if it is an entry of `streams:`.
    playlist: str | None = None
    # By address: the settings for those of `urls` that another entry supplied (`merge: true`).
    others: Mapping[str, StreamSettings] = field(default_factory=dict)

    @property
    def pulled(self) -> tuple[object, ...]:
        """Everything an open upstream depends on.

        If a reload leaves it equal, the channel keeps running.
        """
        own = [getattr(self, key) for key in RESTARTING_KEYS]
        options = [getattr(self.options, key) for key in RESTARTING_OPTIONS]
        others = [other.pulled for other in self.others.values()]
        return self.urls, own, options, others

    def at(self, address: str) -> StreamSettings:
        """The settings for opening one of the stream's addresses."""
        return self.others.get(address, self)


RESTARTING_KEYS = restarting_keys(StreamSettings)  # besides `url`
RESTARTING_OPTIONS = restarting_keys(Options)


@dataclass(frozen=True)
class PlaylistSettings:
    """An entry of `playlists:`; its `options` are the file's, overridden by its own."""

    name: str
    url: str  # or the path of a local file
    groups: tuple[str, ...] = setting(filled_text, ())  # patterns; "!" excludes; (): all
    refresh: float = setting(number_from(float, 0), 21600.0)  # seconds; 0 = on a config reload only
    max_upstreams: int = setting(number_from(int, 0), 1)  # 0 = no limit
    prefix: str = setting(name_prefix, "")
    merge: bool = setting(true_or_false, False)
    films: bool = setting(true_or_false, False)
    quality: str = setting(filled_text, "best")
    headers: Mapping[str, str] = setting(header_value, {})
    proxy: str | None = setting(proxy_url, None)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Config:
    """The whole configuration, with the streams of all channel lists that are loaded."""

    server: ServerSettings = field(default_factory=ServerSettings)
    streams: Mapping[str, StreamSettings] = field(default_factory=dict)
    playlists: Mapping[str, PlaylistSettings] = field(default_factory=dict)
    options: Options = field(default_factory=Options)
    # By name: the keys of streams without an address, which override an imported stream's.
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    guides: Mapping[str, str] = field(default_factory=dict)  # addresses, by the playlist's name


def changes_between(old: Config, new: Config) -> str:
    """The changes of a reload, for the log: `2 streams added, 1 changed, token changed`.

    A stream counts as changed if its `pulled` differs: its viewers are then disconnected.  Keys are
    named, but values never are, because one may be a secret.
    """
    parts = _counted("stream", _stream_changes(old, new))
    parts += _counted("playlist", _playlist_changes(old, new))
    parts += _changed_keys(old.server, new.server)
    parts += _changed_keys(old.options, new.options)
    return ", ".join(parts) or "no change"


def _stream_changes(old: Config, new: Config) -> dict[str, int]:
    """The number of streams for each kind of change."""
    kept = old.streams.keys() & new.streams.keys()
    changed = {name for name in kept if old.streams[name].pulled != new.streams[name].pulled}
    updated = {name for name in kept - changed if old.streams[name] != new.streams[name]}
    for name in old.overrides.keys() | new.overrides.keys():
        is_waiting = name not in old.streams and name not in new.streams  # its list is not loaded
        if is_waiting and old.overrides.get(name) != new.overrides.get(name):
            updated.add(name)
    return {
        "added": len(new.streams.keys() - kept),
        "removed": len(old.streams.keys() - kept),
        "changed": len(changed),
        "with new details": len(updated),
    }


def _playlist_changes(old: Config, new: Config) -> dict[str, int]:
    """The number of playlists for each kind of change."""
    kept = old.playlists.keys() & new.playlists.keys()
    changed = [name for name in kept if old.playlists[name] != new.playlists[name]]
    return {
        "added": len(new.playlists.keys() - kept),
        "removed": len(old.playlists.keys() - kept),
        "changed": len(changed),
    }


def _counted(word: str, counts: Mapping[str, int]) -> list[str]:
    """Texts such as `2 streams added`, `1 changed`; only the first one contains `word`."""
    parts: list[str] = []
    for change, count in counts.items():
        if count == 0:
            continue
        if parts:
            parts.append(f"{count} {change}")
        else:
            parts.append(f"{_many(count, word)} {change}")
    return parts


def _changed_keys(old: ServerSettings | Options, new: ServerSettings | Options) -> list[str]:
    names = [each.name for each in fields(old)]
    return [f"{name} changed" for name in names if getattr(old, name) != getattr(new, name)]


def load_config(path: Path, engine: EngineOptions) -> Config:
    """Read a configuration file; raises ConfigError if it has mistakes.

    `engine` has the options that the file may set under `streamlink:`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        advice = (
            "write one as in README's Quick start (config.example.yml has every option), "
            "or run: python pipe.py --demo"
        )
        for other in (path.with_suffix(".yaml"), path.with_name(f"{path.name}.txt")):
            if other.is_file():
                advice = f"rename {other} to {path.name}, or name it with -c"
        raise ConfigError([f"{path}: no such file; {advice}"]) from None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError([f"{path}: cannot be read: {problem}"]) from None
    return ConfigReader(str(path), engine).read(text)


@dataclass
class ConfigReader:
    """Turns one YAML document into a Config, and collects its mistakes."""

    file: str
    engine: EngineOptions
    path: list[str] = field(default_factory=list)  # the keys that lead to the node being read
    numbers: dict[int, str] = field(default_factory=dict)  # a stream's name by its number
    mistakes: set[tuple[int, str]] = field(default_factory=set)  # line and message

    def read(self, text: str) -> Config:
        """Parse and check a document; raises ConfigError with all mistakes."""
        config = Config()
        try:
            root = yaml.compose(text, NodeLoader)
            if root is not None and root.tag != NULL_TAG:
                with self.at(root):
                    config = self._config(root)
        except yaml.YAMLError as error:
            self.mistakes = {_yaml_mistake(error, text)}
        except RecursionError:
            self.mistakes = {(1, "invalid YAML: nested too deeply")}
        if self.mistakes:
            lines = [f"{self.file}:{line}: {text}" for line, text in sorted(self.mistakes)]
            raise ConfigError(lines)
        return config

    @contextlib.contextmanager
    def at(self, node: yaml.Node, *keys: str) -> Iterator[None]:
        """Turn a ValueError in the block into a mistake at the node's line, below these keys."""
        outer = self.path
        self.path = [*outer, *keys]
        try:
            yield
        except ValueError as error:
            message = str(error)
            if self.path:
                message = f"{self._shown_path()}: {message}"
            self.mistakes.add((node.start_mark.line + 1, message))
        finally:
            self.path = outer

    def _shown_path(self) -> str:
        """The path for a message; a key with unusual characters may be a misplaced secret."""
        shown = []
        for key in self.path:
            is_plain = re.fullmatch(r"[\w .%/<-]{0,64}", key)
            shown.append(key if is_plain else "(a key)")
        return ".".join(shown)

    def section(self, node: yaml.Node) -> Section:
        """A section's entries, including those that `<<` merges in; may raise ValueError."""
        if node.tag == NULL_TAG:
            raise ValueError(
                "this section is empty: indent the lines that belong to it, or remove it"
            )
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f'expected "key: value" lines, got {NODE_KINDS[type(node)]}')
        entries: Section = {}
        for key, value in node.value:
            name = "[]"  # a list or a section as a key: no known key has this name
            if isinstance(key, yaml.ScalarNode):
                name = key.value
            with self.at(key, name):
                if name in entries:
                    raise ValueError("duplicate key")
                entries[name] = key, value
        if "<<" in entries:
            key, other = entries.pop("<<")
            with self.at(key, "<<"):
                return {**self.section(other), **entries}
        return entries

    def table(self, node: yaml.Node, readers: Mapping[str, Read]) -> dict[str, Any]:
        """The values of a section by key, without nulls or mistakes.

        `readers` has the known keys; any other key is a mistake.
        """
        values: dict[str, Any] = {}
        for name, (key, value) in self.section(node).items():
            with self.at(key, name):
                if name not in readers:
                    raise ValueError(self._unknown_key(name, value, readers))
                values[name] = readers[name](self, value)
        return {name: value for name, value in values.items() if value is not None}

    def _unknown_key(self, name: str, value: yaml.Node, known: Collection[str]) -> str:
        """The message for an unknown key."""
        is_top_level = len(self.path) == 1
        if name == "name" and "title" in known:  # a stream's
            return "unknown key: did you mean title?"
        if not difflib.get_close_matches(name, known, 1, ALMOST_EQUAL):
            place = self._place_of(name)
            if place:
                return f"belongs {place}"
        if is_top_level and isinstance(value, yaml.ScalarNode) and "://" in value.value:
            return "unknown key; if it is a stream, put it under streams:"
        close = difflib.get_close_matches(name, sorted(known), 1)
        if close:
            return f"unknown key: did you mean {close[0]}?"
        return "unknown key"

    def _place_of(self, name: str) -> str | None:
        """Where a misplaced key belongs, for a message; None if no section has such a key."""
        if len(self.path) > 1 and self.path[-2] == "streamlink":
            return "beside streamlink:" if name in readers_of(Options) else None
        if self.path[0] == "playlists" and name == "name":
            return None  # the list's name is meant, rather than the server's
        if name not in self.engine:
            return _section_of(name)
        if len(self.path) > 1 and self.path[0] != "server":
            return "under streamlink:"
        return "under streamlink: in options:"

    def _config(self, root: yaml.Node) -> Config:
        readers: dict[str, Read] = {
            "server": functools.partial(read_section, ServerSettings),
            "streams": ConfigReader.section,
            "playlists": ConfigReader.section,
            "options": functools.partial(read_section, Options),
        }
        sections = self.table(root, readers)
        server = sections.get("server", ServerSettings())
        options = sections.get("options", Options())
        playlists = self._playlists(sections.get("playlists", {}), options)

        streams: dict[str, StreamSettings] = {}
        overrides: dict[str, Mapping[str, Any]] = {}
        for name, (key, node) in sections.get("streams", {}).items():
            with self.at(key, "streams", name):
                _check_entry(name, node, "stream", readers_of(StreamSettings))
                _check_name(name, STREAM_NAME_RULE)
                values = self._stream_values(name, node)
                if "url" in values:
                    streams[name] = _stream(name, values, options)
                elif isinstance(node, yaml.MappingNode) and "url" in self.section(node):
                    continue  # its mistakes have been recorded
                elif sections.get("playlists"):
                    overrides[name] = values
                else:
                    raise ValueError("url is missing")
        return Config(server, streams, playlists, options, overrides)

    def _playlists(self, entries: Section, options: Options) -> dict[str, PlaylistSettings]:
        playlists: dict[str, PlaylistSettings] = {}
        for name, (key, node) in entries.items():
            with self.at(key, "playlists", name):
                _check_entry(name, node, "list", readers_of(PlaylistSettings))
                _check_name(name, PLAYLIST_NAME_RULE)
                playlists[name] = self._playlist(name, node, options)
        return playlists

    def _playlist(self, name: str, node: yaml.Node, options: Options) -> PlaylistSettings:
        readers: dict[str, Read] = {"url": functools.partial(read_single, list_address)}
        readers |= readers_of(PlaylistSettings) | readers_of(Options)
        earlier = len(self.mistakes)
        if isinstance(node, yaml.MappingNode):
            values = self.table(node, readers)
        else:
            values = {"url": read_single(list_address, self, node)}
        own = _take_options(values)
        url = values.pop("url", None)
        if url is None and len(self.mistakes) == earlier:
            raise ValueError("url is missing")
        # Without a url, a mistake has been recorded, and the result is never used.
        return PlaylistSettings(name, url or "", **values, options=_laid_over(options, own))

    def _stream_values(self, name: str, node: yaml.Node) -> dict[str, Any]:
        """The values of a stream by key; a bare address becomes the value of `url`."""
        if not isinstance(node, yaml.MappingNode):
            return {"url": read_addresses(self, node)}
        readers: dict[str, Read] = {"url": read_addresses}
        readers |= readers_of(StreamSettings) | readers_of(Options)
        values = self.table(node, readers)
        if "number" in values:
            self._claim_number(values["number"], name, node)
        return values

    def _claim_number(self, number: int, name: str, node: yaml.Node) -> None:
        """Record a stream's number; it is a mistake if another stream has the same one."""
        owner = self.numbers.setdefault(number, name)
        key, _ = self.section(node)["number"]
        with self.at(key, "number"):
            if owner != name:
                raise ValueError(f"{number} is already used by {owner}")


def _section_of(name: str) -> str | None:
    """The section that has a key, for a message; None if none has it."""
    if name in readers_of(ServerSettings):
        return "under server:"
    if name in readers_of(Options):
        return "under options:"
    if name == "url":
        return 'under a stream: news: {url: "..."}'
    if name in readers_of(StreamSettings):
        return f'under a stream: news: {{url: "...", {name}: ...}}'
    if name in readers_of(PlaylistSettings):
        return f'under a list: provider: {{url: "...", {name}: ...}}'
    return None


def _check_entry(name: str, node: yaml.Node, kind: str, own: Collection[str]) -> None:
    """Raise ValueError if an entry of `streams:` or `playlists:` is a misplaced option.

    An entry may be called like an option (`films:`) if its value can be that of an entry.
    `kind` is `stream` or `list`, and `own` are the options that only this kind of entry has.
    """
    if STREAM_NAME.fullmatch(name) and _may_be_entry(node):
        return
    if name == "url" or name in own or name in readers_of(Options):
        raise ValueError(f"this is an option: write it below the {kind}'s name, beside url:")
    place = _section_of(name)
    if place:
        raise ValueError(f"this is an option: it belongs {place}")


def _may_be_entry(node: yaml.Node) -> bool:
    """Whether a value is a section, or contains an address, a list's path or a variable."""
    if isinstance(node, yaml.SequenceNode):
        return any(_may_be_entry(item) for item in node.value)
    if isinstance(node, yaml.ScalarNode):
        return re.search(r"://|\$\{|\.m3u", node.value, re.I) is not None
    return True


def _check_name(name: str, mistake: str) -> None:
    """Raise ValueError if a name cannot be part of an address, or is reserved."""
    if not STREAM_NAME.fullmatch(name):
        raise ValueError(mistake)
    if name in RESERVED_NAMES:
        raise ValueError("this name is reserved: choose another")


def _take_options(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the keys of `options:` from an entry's values, and return them."""
    return {key: values.pop(key) for key in readers_of(Options) if key in values}


def _laid_over(options: Options, own: Mapping[str, Any]) -> Options:
    """Options, overridden by an entry's own; those of `streamlink:` are merged by name."""
    if not own:
        return options
    values = dict(own)
    values["streamlink"] = {**options.streamlink, **own.get("streamlink", {})}
    return replace(options, **values)


def _stream(name: str, values: dict[str, Any], options: Options) -> StreamSettings:
    own = _take_options(values)
    urls = values.pop("url")
    values["title"] = values.get("title") or name
    return StreamSettings(name, urls, **values, options=_laid_over(options, own))


def _yaml_mistake(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Line and message of the mistake that the YAML library found."""
    # Without a mark, the text has a character that YAML does not allow, at `position`.
    position = getattr(error, "position", 0)
    named = text.count("\n", 0, position)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        named = mark.line
    message = getattr(error, "problem", None) or str(error)
    problem = message.splitlines()[0]

    lines = text.splitlines()[: named + 1]
    for slip in YAML_SLIPS:
        if not re.search(slip.problem, problem):
            continue
        for number, line in reversed(list(enumerate(lines, 1))):
            if re.match(slip.line, line):
                return number, f"invalid YAML: {slip.advice}"
    problem = re.sub(r"(alias|handle) ['\"].*", r"\1", problem)  # the name may be part of a secret
    last = max(1, len(lines))  # the end of the file may be named, which is after the last line
    return last, f"invalid YAML: {problem}"


# --------------------------------------------------------------------------------------------------
# Channel lists: the entries of a provider's M3U, and the streams made from them
#
# No standard describes these lists, so the parser accepts everything that it can read, and counts
# what it leaves out.  A list is as untrusted as any origin: the parser checks each of its texts
# like a value of the configuration.  A list can use neither a local file nor a reserved name.
#
#   ListParser       lines -> ChannelList: entries, guide, number of omissions
#   name_entries     a name for each entry; an entry of the previous load keeps its name
#   with_lists       a configuration and the lists of its playlists -> one with all streams
# --------------------------------------------------------------------------------------------------

LIST_LIMIT = 256 * MIB  # bytes of a list
LINE_LIMIT = 64 * KIB  # bytes of a line; no useful line is that long
MOST_HEADERS = 50  # headers of an entry; each takes longer to add than the one before it
CHANNEL_LIMIT = 20_000  # entries of a list that become streams
TEXT_LIMIT = 200  # characters of a title, a group or an id
NAME_LIMIT = 60  # characters of a name, without its prefix and number
ADDRESS_LIMIT = 4 * KIB  # characters

# `name=` of an attribute, with or without blanks around the `=`.  In front of a quote, any name
# matches; otherwise only a known name does, because titles and addresses contain `=`, too.
_LIST_ATTRIBUTE = re.compile(
    r"""
    (?<![^\s,"'])  # the name begins a word
    (
        [A-Za-z][\w.-]*(?=\s*=\s*["'])
        | (?:tvg-[\w-]+|group-title|url-tvg|x-tvg-url)(?=\s*=)
    )
    \s*=(?:\s*(?=["']))?
    """,
    re.ASCII | re.I | re.VERBOSE,
)
_NEXT_ATTRIBUTE = re.compile(r"\s[A-Za-z][\w-]*\s*=", re.ASCII)
_SEPARATOR = re.compile(r"\s*,")
_GUIDE_SEPARATOR = re.compile(r",|;(?=\s*https?://)", re.I)  # an address may contain semicolons
# A heading among channels: `#### SPORT ####`, `-----`.  Real titles contain a single `|`.
_RULE = r"(?:[#=*~_+<>•·●■▬━═─—\u2013★☆►◄-]{2,}|\|{3,})"
_HEADING = re.compile(rf"{_RULE}.*{_RULE}|[^\w]*_*[^\w]*")
_FILM = re.compile(r"https?://[^?#]*?/(?:movie|series)/", re.I)
# HTML entities that generators of lists write by mistake, always with a semicolon.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][\dA-Fa-f]{1,6}|amp|quot|apos|lt|gt|nbsp);")
# By the name of an attribute of #EXTINF, or of an option in #EXTVLCOPT.
_LIST_HEADERS = {
    "user-agent": "User-Agent",
    "http-user-agent": "User-Agent",
    "http-referrer": "Referer",
    "http-referer": "Referer",
    "http-origin": "Origin",
}
_KODI_HEADERS = frozenset((
    "inputstream.adaptive.stream_headers", "inputstream.adaptive.manifest_headers",
    "inputstream.adaptive.common_headers",
))  # fmt: skip
# Headers that belong to a connection, or would change the bytes of the answer.
_OWN_HEADERS = frozenset((
    "accept-encoding", "connection", "content-length", "host", "range", "te", "trailer",
    "transfer-encoding", "upgrade",
))  # fmt: skip
NO_HEADERS: Mapping[str, str] = {}  # shared by all entries without headers
NOT_A_LIST = "the provider sent a web page, not a list of channels"
A_STREAM = "this is a single stream, not a list of channels: put it under streams:"
NO_CHANNELS = "the list has no channels"
ONLY_FILMS = "the list has only films and series: add films: true to get them"
GROUPS_TOLD = 10  # groups named if a list has none of the wanted ones


class ListError(PipeError):
    """A channel list cannot be used; the message says why, without an address."""


@dataclass(frozen=True)
class Entry:
    """A channel of a list."""

    __slots__ = ("address", "group", "headers", "logo", "number", "title", "tvg_id")

    title: str
    address: str
    tvg_id: str | None
    logo: str | None
    number: int | None
    group: str | None
    headers: Mapping[str, str]


@dataclass
class ChannelList:
    """A channel list that was read to its end."""

    entries: Sequence[Entry]
    guide: str | None  # the address of its XMLTV guide
    omitted: Counter[str]  # the number of omissions by kind, as shown to people
    unmatched: Sequence[str]  # the patterns in `groups:` that match no group

    def summary(self) -> str:
        """One line for the log: the number of channels, omissions, and mistakes in `groups:`."""
        text = _many(len(self.entries), "channel")
        if self.omitted:
            text += f"; left out: {_counts(self.omitted)}"
        if self.unmatched:
            text += f"; no group matches {', '.join(self.unmatched)}"
        return text


def _counts(omitted: Mapping[str, int]) -> str:
    """The numbers of omissions by kind, the most common first."""
    kinds = Counter(omitted).most_common()
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds)


class ListParser:
    """Reads a channel list line by line as its bytes arrive.

    It keeps in memory only the entries and the start of a line, up to LINE_LIMIT.
    """

    def __init__(self, settings: PlaylistSettings) -> None:
        self._wants_films = settings.films
        self._groups = GroupFilter(settings.groups)
        self._secrets = account_secrets(settings.url)
        self._awaits_encoding = True  # too few bytes so far to know the encoding
        self._utf_16: codecs.IncrementalDecoder | None = None  # if a BOM shows that encoding
        self._carry = b""  # the start of an incomplete line
        self._size = 0  # bytes so far
        self._awaits_first_line = True  # no line with text has been read yet
        self._has_titles = False  # an #EXTINF has been read
        self._seen: set[tuple[object, ...]] = set()  # title, group, address, headers
        self._entries: list[Entry] = []
        self._omitted: Counter[str] = Counter()
        self._guide: str | None = None
        self._section = ""  # the group of entries that name none themselves; empty: none
        self._begin_entry()

    def _begin_entry(self) -> None:
        """Begin a new entry, none of whose lines has been read yet."""
        self._title: str | None = None  # None until an #EXTINF has been read
        self._attributes: Mapping[str, str] = {}
        self._group_line = ""  # the entry's group in an #EXTGRP; empty: none
        self._headers: dict[str, str] = {}

    def feed(self, data: bytes) -> None:
        """Take the next bytes, cut anywhere.

        Raises ListError as soon as they cannot be a list, or the list is too large.
        """
        self._size += len(data)
        if self._size > LIST_LIMIT:
            raise ListError(f"the list is larger than {LIST_LIMIT // MIB} MiB")

        if self._awaits_encoding:
            data = self._carry + data
            if len(data) < len(codecs.BOM_UTF16):
                self._carry = data
                return
            self._carry = b""
            self._awaits_encoding = False
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                self._utf_16 = codecs.getincrementaldecoder("utf-16")("replace")

        if self._utf_16:
            data = self._utf_16.decode(data).encode()
        data = data.replace(b"\r", b"\n")  # old Apple programs end lines with \r alone
        *lines, self._carry = (self._carry + data).split(b"\n")
        for line in lines:
            self._read_line(line)
        self._carry = self._carry[: LINE_LIMIT + 1]

    def finish(self) -> ChannelList:
        """Return the whole list; raises ListError if it has no channels."""
        self._read_line(self._carry)
        self._drop_unfinished()
        if not self._entries:
            raise ListError(self._lack())
        return ChannelList(self._entries, self._guide, self._omitted, self._groups.unmatched())

    def _lack(self) -> str:
        """Why no entry of the list became a channel."""
        if not self._has_titles:
            return NO_CHANNELS
        if self._omitted["in other groups"]:
            return f"the list has none of the wanted groups, but {self._groups.in_words()}"
        if self._omitted["films"]:
            return ONLY_FILMS
        return f"the list has no usable channels: {_counts(self._omitted)}"

    def _read_line(self, line: bytes) -> None:
        if len(line) > LINE_LIMIT:
            self._omitted["too long"] += 1
            self._begin_entry()
            return
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        text = text.strip("\ufeff\0 \t\r\n")
        if not text:
            return
        if self._awaits_first_line and text.startswith(("<", "{")):
            raise ListError(NOT_A_LIST)
        self._awaits_first_line = False
        if text.startswith("#"):
            self._read_tag(text)
        else:
            self._read_address(text)

    def _read_tag(self, text: str) -> None:
        tag, _, value = text.partition(":")
        tag = tag.upper()
        if tag.startswith("#EXTM3U"):
            self._read_header(text)
        elif tag == "#EXTINF":
            self._read_title(value)
        elif tag == "#EXTGRP":
            self._read_group(value)
        elif tag == "#EXTVLCOPT":
            option, _, wanted = value.partition("=")
            if header := _LIST_HEADERS.get(option.strip().lower()):
                self._add_header(header, wanted.strip())
        elif tag == "#EXTHTTP":
            self._read_json_headers(value)
        elif tag == "#KODIPROP":
            option, _, wanted = value.partition("=")
            if option.strip().lower() in _KODI_HEADERS:
                self._add_headers(wanted)
        elif tag in ("#EXT-X-TARGETDURATION", "#EXT-X-STREAM-INF"):
            raise ListError(A_STREAM)

    def _read_header(self, text: str) -> None:
        """Read the address of the list's guide from an #EXTM3U line: the first valid one counts."""
        attributes, _ = read_attributes(text)
        guides = attributes.get("x-tvg-url", "")
        if not guides:
            guides = attributes.get("url-tvg", "")
        for guide in _GUIDE_SEPARATOR.split(guides):
            if self._guide is not None:
                return
            with contextlib.suppress(ValueError):
                self._guide = web_url(_checked_address(guide))

    def _read_title(self, text: str) -> None:
        self._drop_unfinished()
        self._has_titles = True
        self._attributes, title = read_attributes(text)
        self._title = clean_text(title)
        if not self._title:
            self._title = clean_text(self._attributes.get("tvg-name", ""))
        for attribute, header in _LIST_HEADERS.items():
            if value := self._attributes.get(attribute):
                self._add_header(header, value)

    def _read_group(self, value: str) -> None:
        """Read an #EXTGRP line.

        Before an #EXTINF, it gives the group of all entries until the next such line; after an
        #EXTINF, the group of that entry.
        """
        group = value.strip(' \t"')
        if self._title is None:
            self._section = group
        else:
            self._group_line = group

    def _drop_unfinished(self) -> None:
        """Leave out the current entry, if there is one, because its address is missing."""
        if self._title is not None:
            kind = "without an address"
            if _HEADING.fullmatch(self._title):
                kind = "headings"
            self._omitted[kind] += 1
            self._begin_entry()

    def _read_address(self, text: str) -> None:
        """Read the line that completes an entry: `ADDRESS` or `ADDRESS|HEADERS`."""
        address, _, headers = text.partition("|")
        if "=" in headers:
            self._add_headers(headers)
        else:
            address = text
        entry = self._entry(address.strip())
        if isinstance(entry, Entry):
            self._entries.append(entry)
        else:
            self._omitted[entry] += 1
        self._begin_entry()

    def _entry(self, address: str) -> Entry | str:
        """The entry that this address completes, or the kind under which it is omitted."""
        title, attributes = self._title, self._attributes
        if title is None:
            return "without a title"
        if _HEADING.fullmatch(title):
            return "headings"
        if not re.match(r"https?://", address, re.I):
            return "with another kind of address"
        try:
            _checked_address(address)
        except ValueError:
            return "with an invalid address"
        if _FILM.match(address) and not self._wants_films:
            return "films"

        group = self._groups.choose(clean_text(self._group_text(), LINE_LIMIT))
        if group is None:
            return "in other groups"
        key = title, group, address, *self._headers.items()
        if key in self._seen:
            return "duplicates"
        if len(self._entries) >= CHANNEL_LIMIT:
            return f"above the limit of {CHANNEL_LIMIT:,} (select groups with groups:)"
        self._seen.add(key)

        headers = NO_HEADERS
        if self._headers:
            headers = self._headers
        return Entry(
            title=title,
            address=address,
            tvg_id=clean_text(attributes.get("tvg-id", "")) or None,
            logo=self._logo(attributes.get("tvg-logo", "").strip()),
            number=self._number(),
            group=sys.intern(group) or None,
            headers=headers,
        )

    def _group_text(self) -> str:
        """The groups of the entry, as written in the list; empty if it has none."""
        for text in (self._attributes.get("group-title", ""), self._group_line):
            if text:
                return text
        return self._section

    def _logo(self, address: str) -> str | None:
        """The address of a logo that pages and players may load, or None.

        None replaces an invalid address, and one that contains a secret of the account.
        """
        try:
            _checked_address(web_url(address))
        except ValueError:
            return None
        if "@" in urlsplit(address).netloc:
            return None
        if any(secret in address for secret in self._secrets):
            return None
        return address

    def _number(self) -> int | None:
        """The channel number of the entry, from the first attribute that has one."""
        for attribute in ("tvg-chno", "tvh-chnum", "channel-number"):
            number = _channel_number(self._attributes.get(attribute, ""))
            if number is not None:
                return number
        return None

    def _read_json_headers(self, text: str) -> None:
        """Keep the headers of an #EXTHTTP line: `{"User-Agent": "...", "Cookie": "..."}`."""
        try:
            headers = json.loads(text)
        except (ValueError, RecursionError):
            headers = None
        if not isinstance(headers, dict):
            self._omitted["unusable headers"] += 1
            return
        for name, value in headers.items():
            self._add_header(name.strip(), str(value).strip())

    def _add_headers(self, text: str) -> None:
        """Keep headers written in Kodi's way: `User-Agent=a%2Fb&Referer=...`."""
        for pair in text.split("&"):
            name, _, value = pair.partition("=")
            self._add_header(name.strip(), unquote(value.strip()))

    def _add_header(self, name: str, value: str) -> None:
        """Keep a header of the entry without quotes around it, or count it as omitted."""
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1].strip()
        if name.lower() == "referrer":
            name = "Referer"
        if len(self._headers) < MOST_HEADERS and _is_usable_header(name, value):
            self._headers = merged_headers(self._headers, {name: header_value(value)})
        else:
            self._omitted["unusable headers"] += 1


def _is_usable_header(name: str, value: str) -> bool:
    """Whether a list may set this header: it is valid, not empty and not in _OWN_HEADERS."""
    if not HEADER_NAME.fullmatch(name) or name.lower() in _OWN_HEADERS or not value:
        return False
    try:
        header_value(value)
    except ValueError:
        return False
    return True


class AttributeValue(NamedTuple):
    """The value of an attribute in a line."""

    text: str
    end: int  # the index after it
    is_last: bool  # the title follows


def read_attributes(text: str) -> tuple[dict[str, str], str]:
    """The attributes of an #EXTINF or #EXTM3U by their names in lower case, and the title.

    Values may lack quotes, and may contain quotes (escaped by a backslash or not) and commas.  If a
    name is repeated, its first value that is not empty counts.  HTML entities are replaced.
    """
    found: dict[str, str] = {}
    end = 0  # of the attributes
    starts = list(_LIST_ATTRIBUTE.finditer(text))
    for index, start in enumerate(starts):
        next_start = None
        if index + 1 < len(starts):
            next_start = starts[index + 1].start()
        value = _attribute_value(text, start.end(), next_start)
        name = start[1].lower()
        if not found.get(name):
            found[name] = _without_entities(value.text)
        end = value.end
        if value.is_last:
            break
    before, comma, title = text[end:].partition(",")
    if not comma:
        title = before
        if not found:
            title = re.sub(r"^\s*-?[\d.]*", "", before)  # without the duration
    return found, _without_entities(title).strip()


def _without_entities(text: str) -> str:
    """A text in which characters replace the HTML entities: `A & E` for `A &amp; E`."""
    if "&" not in text:
        return text
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)


def _attribute_value(text: str, start: int, next_start: int | None) -> AttributeValue:
    """Read the value that begins at `start`.

    The next attribute begins at `next_start`, which is None if there is none.
    """
    quote_sign = text[start : start + 1]
    if quote_sign not in ('"', "'"):
        return _bare_value(text, start, next_start)
    if next_start is not None:
        closing = text.rfind(quote_sign, start + 1, next_start)
        if closing >= 0 and not text[closing + 1 : next_start].strip(" \t,"):
            value = _unescaped(text[start + 1 : closing], quote_sign)
            return AttributeValue(value, closing + 1, is_last=False)
    # The next attribute is in the title, or inside a quoted value.
    found = _last_closing_quote(text, start + 1, quote_sign)
    if found is not None:
        value = _unescaped(text[start + 1 : found], quote_sign)
        return AttributeValue(value, found + 1, is_last=True)
    comma = text.find(",", start)
    end = len(text) if comma < 0 else comma
    return AttributeValue(text[start + 1 : end], end, is_last=True)


def _bare_value(text: str, start: int, next_start: int | None) -> AttributeValue:
    """Read a value without quotes.  It may contain blanks, but ends at the next attribute."""
    value = text[start:next_start]
    if next_attribute := _NEXT_ATTRIBUTE.search(value):
        value = value[: next_attribute.start()]
    is_last = next_start is None
    if is_last:
        value = value.partition(",")[0]
    return AttributeValue(value.strip(" \t,"), start + len(value), is_last)


def _last_closing_quote(text: str, start: int, quote_sign: str) -> int | None:
    """The index of the quote before the title; None if there is no quote.

    It is the first quote followed by a comma, preferably one without a backslash before it.  If no
    quote is followed by a comma, it is the last one.
    """
    escaped: int | None = None
    last: int | None = None
    place = text.find(quote_sign, start)
    while place >= 0:
        last = place
        if _SEPARATOR.match(text, place + 1):
            if text[place - 1] != "\\":
                return place
            if escaped is None:
                escaped = place
        place = text.find(quote_sign, place + 1)
    if escaped is not None:
        return escaped
    return last


def _unescaped(value: str, quote_sign: str) -> str:
    """The text of a quoted value, without the backslashes in front of its quotes."""
    return value.replace(f"\\{quote_sign}", quote_sign)


class GroupFilter:
    """The `groups:` of a playlist: names or patterns; "!" in front of one excludes its groups."""

    def __init__(self, patterns: Sequence[str]) -> None:
        # Tests of groups, by pattern.
        self._wanted: dict[str, Callable[[str], bool]] = {}
        self._unwanted: dict[str, Callable[[str], bool]] = {}
        for pattern in patterns:
            if pattern.startswith("!"):
                self._unwanted[pattern] = _matcher(pattern[1:])
            else:
                self._wanted[pattern] = _matcher(pattern)
        self._chosen: dict[str, str | None] = {}  # a cache: lists repeat few groups many times

    def choose(self, text: str) -> str | None:
        """Choose the group in which an entry is shown from those that its `group-title` names.

        Returns None if the entry is not wanted, and an empty text if it has no group.
        """
        if text not in self._chosen:
            self._chosen[text] = self._choose(_group_names(text))
        return self._chosen[text]

    def in_words(self) -> str:
        """The groups of the entries seen so far, at least one: `"News", "Sport" and 7 more`."""
        quoted = [f'"{group}"' for group in self._all_groups()]
        return _joined(quoted, GROUPS_TOLD)

    def unmatched(self) -> list[str]:
        """The patterns that match no group of the entries seen so far."""
        groups = self._all_groups()
        found = []
        for pattern, matches in (self._wanted | self._unwanted).items():
            if not any(matches(group) for group in groups):
                found.append(pattern)
        return found

    def _all_groups(self) -> list[str]:
        groups: list[str] = []
        for text in self._chosen:
            groups += _group_names(text)
        return _unique(groups)

    def _choose(self, groups: Sequence[str]) -> str | None:
        for matches in self._unwanted.values():
            if any(matches(group) for group in groups):
                return None
        if not self._wanted:
            return groups[0]
        for group in groups:
            if any(matches(group) for matches in self._wanted.values()):
                return group
        return None


def _group_names(text: str) -> list[str]:
    """The groups that a `group-title` names; an empty name if it names none.

    So patterns such as "*" match entries without a group, too.
    """
    names = [clean_text(name) for name in text.split(";")]
    groups = [name for name in names if name]
    if not groups:
        return [""]
    return groups


def _matcher(pattern: str) -> Callable[[str], bool]:
    """A test for groups with this name or matching this pattern (fnmatch), ignoring case."""
    name = pattern.strip().casefold()
    # `[` is special in a pattern but common in names, so matches() also compares the plain text.
    expression = re.compile(fnmatch.translate(name))

    def matches(group: str) -> bool:
        folded = group.casefold()
        return folded == name or bool(expression.match(folded))

    return matches


def clean_text(text: str, limit: int = TEXT_LIMIT) -> str:
    """A text as one printable line of at most `limit` characters, without superfluous blanks."""
    if not text.isprintable():
        kept = []
        for character in text:
            if character.isprintable():
                kept.append(character)
            elif character.isspace():
                kept.append(" ")
        text = "".join(kept)
    return " ".join(text.split())[:limit].rstrip()


def _checked_address(text: str) -> str:
    """An address without surrounding blanks.

    Raises ValueError if it is malformed, has no host or is longer than ADDRESS_LIMIT.
    """
    address = stream_address(text)
    if len(address) > ADDRESS_LIMIT or not _scheme_and_host(address)[1]:
        raise ValueError("not an address")
    return address


def _channel_number(text: str) -> int | None:
    """A whole number above 0; None if the text is anything else."""
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        return None
    number = int(text)
    return number if number > 0 else None


def account_secrets(address: str) -> list[str]:
    """The texts in a list's address that may be secrets: a user, a password, a token."""
    if "://" not in address:
        return []
    parts = urlsplit(address)
    account, _, _ = parts.netloc.rpartition("@")
    user, _, password = account.partition(":")
    found = [unquote(user), unquote(password)]
    for key, value in parse_qsl(parts.query):
        if key not in ("type", "output"):  # they name the list's format: m3u_plus, ts
            found.append(value)
    return [secret for secret in found if len(secret) >= LEAST_SECRET]


def merged_headers(*layers: Mapping[str, str]) -> dict[str, str]:
    """Headers of several sources; a later one wins, and the case of names does not matter."""
    merged: dict[str, str] = {}
    spellings: dict[str, str] = {}  # by name in lower case: the name in `merged`
    for layer in layers:
        for name, value in layer.items():
            earlier = spellings.get(name.lower())
            if earlier is not None:
                del merged[earlier]
            spellings[name.lower()] = name
            merged[name] = value
    return merged


# Names


class Identity(NamedTuple):
    """The facts by which a reload recognizes an entry."""

    playlist: str
    prefix: str
    tvg_id: str | None
    title: str
    group: str | None
    position: int  # among the entries that share all of the above


def plain_name(text: str) -> str:
    """Turn a text into a stream's name of a-z, 0-9 and hyphens; it may be empty.

    Letters lose their accents; hyphens replace all other characters.
    """
    text = unicodedata.normalize("NFKD", text).casefold()
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:NAME_LIMIT].rstrip("-")


def identities(settings: PlaylistSettings, entries: Iterable[Entry]) -> list[Identity]:
    """The identity of each entry of a list, in the same order."""
    counts: Counter[tuple[str | None, str, str | None]] = Counter()
    found: list[Identity] = []
    for entry in entries:
        key = entry.tvg_id, entry.title, entry.group
        identity = Identity(
            playlist=settings.name,
            prefix=settings.prefix,
            tvg_id=entry.tvg_id,
            title=entry.title,
            group=entry.group,
            position=counts[key],
        )
        found.append(identity)
        counts[key] += 1
    return found


class Names:
    """Assigns a unique name to each stream."""

    def __init__(self) -> None:
        self._taken = set(RESERVED_NAMES)
        # The next number to try, by the name without its number and the first number.  Trying all
        # numbers for each of 20,000 entries with one title would take minutes.
        self._next: dict[tuple[str, int], int] = {}

    def claim(self, name: str) -> bool:
        """Reserve exactly this name; returns False if it is taken."""
        if name in self._taken:
            return False
        self._taken.add(name)
        return True

    def give(self, settings: PlaylistSettings, entry: Entry) -> str:
        """Reserve a name for a new entry, made from its title, tvg-id or playlist's name."""
        base = plain_name(entry.title)
        has_letter = re.search(r"[a-z]", base) is not None
        if not has_letter:
            base = ""
            if entry.tvg_id is not None:
                base = plain_name(entry.tvg_id)
        if not base:
            return self._numbered(settings.prefix + settings.name, first=1)
        name = settings.prefix + base
        if self.claim(name):
            return name
        return self._numbered(name, first=2)

    def _numbered(self, start: str, *, first: int) -> str:
        """Reserve `start` with the next free number, from `first` on."""
        number = self._next.get((start, first), first)
        while not self.claim(f"{start}-{number}"):
            number += 1
        self._next[start, first] = number + 1
        return f"{start}-{number}"


@dataclass
class Merged:
    """The entries of one stream: a single one, unless `merge` is set."""

    sources: list[tuple[PlaylistSettings, Entry]]
    identities: list[Identity]


def merge_entries(
    playlists: Mapping[str, PlaylistSettings], lists: Mapping[str, ChannelList]
) -> list[Merged]:
    """The entries of all lists in the order of the configuration.

    Entries with the same title and group are merged into the first of them if their playlists have
    `merge: true`.
    """
    found: list[Merged] = []
    by_title: dict[tuple[str, str], Merged] = {}  # of the playlists that merge
    for name, settings in playlists.items():
        if name not in lists:
            continue
        entries = lists[name].entries
        for entry, identity in zip(entries, identities(settings, entries), strict=True):
            merged = Merged([(settings, entry)], [identity])
            if settings.merge:
                key = entry.title.casefold(), (entry.group or "").casefold()
                first = by_title.setdefault(key, merged)
                if first is not merged:
                    first.sources += merged.sources
                    first.identities += merged.identities
                    continue
            found.append(merged)
    return found


def name_entries(found: Sequence[Merged], known: Mapping[Identity, str]) -> dict[Identity, str]:
    """Name all entries, and return their names by identity for the next call.

    `known` has the names that the last call returned.  An entry keeps its name even if others are
    inserted before it; only new entries get new names.
    """
    names = Names()
    given: dict[Identity, str] = {}
    new: list[Merged] = []
    for merged in found:
        name = _kept_name(merged, known, names)
        if name is None:
            new.append(merged)
            continue
        for identity in merged.identities:
            given[identity] = name

    for merged in new:
        settings, entry = merged.sources[0]
        name = names.give(settings, entry)
        for identity in merged.identities:
            given[identity] = name
    return given


def _kept_name(merged: Merged, known: Mapping[Identity, str], names: Names) -> str | None:
    """Reserve the first of these entries' earlier names that is still free; None if none is."""
    for identity in merged.identities:
        name = known.get(identity)
        if name is not None and names.claim(name):
            return name
    return None


# Streams


def with_lists(
    config: Config, lists: Mapping[str, ChannelList], known: Mapping[Identity, str]
) -> tuple[Config, dict[Identity, str]]:
    """The configuration with the streams and guides of these lists, and the names of all entries.

    `lists` has the loaded lists by the name of their playlist, and `known` the names that an
    earlier call returned.
    """
    found = merge_entries(config.playlists, lists)
    names = name_entries(found, known)

    streams = dict(config.streams)
    numbers = _configured_numbers(config)
    for merged in found:
        name = names[merged.identities[0]]
        if name in config.streams:
            continue
        stream = _imported(name, merged)
        number = stream.number
        if number in numbers:
            stream = replace(stream, number=None)
        elif number is not None:
            numbers.add(number)
        if name in config.overrides:
            stream = overridden(stream, config.overrides[name])
        streams[name] = stream

    guides: dict[str, str] = {}
    for playlist in config.playlists:
        if playlist in lists:
            guide = lists[playlist].guide
            if guide is not None:
                guides[playlist] = guide
    return replace(config, streams=streams, guides=guides), names


def _configured_numbers(config: Config) -> set[int]:
    """The numbers that the file gives to its own streams and to imported ones."""
    numbers: set[int] = set()
    for stream in config.streams.values():
        if stream.number is not None:
            numbers.add(stream.number)
    for given in config.overrides.values():
        if "number" in given:
            numbers.add(given["number"])
    return numbers


def _imported(name: str, merged: Merged) -> StreamSettings:
    """The stream of these entries: made from the first one, with the addresses of all.

    `others` holds the settings for the addresses that the other entries supply.
    """
    settings, entry = merged.sources[0]
    first = _stream_of(name, settings, entry)
    urls = [entry.address]
    others: dict[str, StreamSettings] = {}
    for other_settings, other in merged.sources[1:]:
        if other.address not in urls:
            urls.append(other.address)
            others[other.address] = _stream_of(name, other_settings, other)
    if not others:
        return first
    return replace(first, urls=tuple(urls), others=others)


def _stream_of(name: str, settings: PlaylistSettings, entry: Entry) -> StreamSettings:
    headers = settings.headers
    if entry.headers:
        headers = merged_headers(headers, entry.headers)
    return StreamSettings(
        name,
        (entry.address,),
        title=entry.title,
        logo=entry.logo,
        group=entry.group,
        tvg_id=entry.tvg_id,
        number=entry.number,
        quality=settings.quality,
        headers=headers,
        proxy=settings.proxy,
        options=settings.options,
        playlist=settings.name,
    )


def overridden(stream: StreamSettings, given: Mapping[str, Any]) -> StreamSettings:
    """An imported stream, overridden by the keys of its entry in `streams:`."""
    values = dict(given)
    options = _laid_over(stream.options, _take_options(values))
    if "headers" in values:
        values["headers"] = merged_headers(stream.headers, values["headers"])
    others = {address: overridden(other, given) for address, other in stream.others.items()}
    return replace(stream, **values, options=options, others=others)


# Accounts


def account_of(config: Config, stream: StreamSettings, address: str) -> PlaylistSettings | None:
    """The playlist whose account an address of a stream belongs to; None if it has no account.

    an imported stream      the playlist that supplied the address
    an entry of `streams:`  the first playlist whose address has the same host, port and user
    """
    imported = stream.at(address).playlist
    if imported is not None:
        return config.playlists.get(imported)
    for playlist in config.playlists.values():
        if _is_of_account(address, playlist.url):
            return playlist
    return None


def account_name_of(config: Config, stream: StreamSettings, address: str) -> str | None:
    """The name of the playlist that account_of() returns; None if it returns none."""
    playlist = account_of(config, stream, address)
    if playlist is None:
        return None
    return playlist.name


DEFAULT_PORTS = {"http": 80, "https": 443}


def _is_of_account(address: str, list_address: str) -> bool:
    """Whether an address has the same host, port and user as a list's address."""
    try:
        ours = urlsplit(without_prefixes(address))
        theirs = urlsplit(list_address)
        our_port = ours.port or DEFAULT_PORTS.get(ours.scheme)
        their_port = theirs.port or DEFAULT_PORTS.get(theirs.scheme)
    except ValueError:  # the host or the port is not valid
        return False
    is_same_port = ours.port == theirs.port or our_port == their_port
    if theirs.hostname is None or ours.hostname != theirs.hostname or not is_same_port:
        return False
    user = _user_of(list_address)
    if user is None:
        return _user_of(address) is None
    # Panels put the user into the path of a stream: /live/USER/PASSWORD/1.ts.
    return user == _user_of(address) or user in unquote(ours.path).split("/")


def _user_of(address: str) -> str | None:
    """The user in front of an address's host or in its query; None if there is none."""
    parts = urlsplit(without_prefixes(address))
    if parts.username:
        return unquote(parts.username)
    query = dict(parse_qsl(parts.query))  # without empty values
    for key in ("username", "user"):
        if key in query:
            return query[key]
    return None


# --------------------------------------------------------------------------------------------------
# Media: detecting containers, splitting them into whole units, finding join points
#
# A framer receives an upstream's bytes in order and hands all of them on in blocks, except ID3
# tags.  A block of MPEG-TS ends where a packet ends, so a viewer that moves from one block to
# another never gets half a packet.  A mark (Join) stands between two blocks wherever a decoder can
# start, so no block is ever split for a viewer.
# --------------------------------------------------------------------------------------------------

Block = bytes | memoryview  # bytes appended to a window at once

TS_PACKET = 188
TS_SYNC = b"G"
TIMESTAMP_MODULUS = 1 << 33
NULL_PID = 0x1FFF
NULL_PACKET = b"G\x1f\xff\x10" + 184 * b"\xff"  # ISO/IEC 13818-1, 2.4.1: has no payload
BLOCK_LIMIT = 64 * KIB  # bytes of a block: small enough that one send gathers several whole ones
SEARCH_LIMIT = 4 * KIB  # bytes searched for TS packets that follow other data, such as an image
SEAM_PATIENCE = 10.0  # seconds in which a relay may repeat media that viewers already have
NEW_CLOCK_TICKS = 60 * 90_000  # a clock this far back was reset: no backlog is that long
JUMP_SEARCH = 1 * MIB  # bytes searched for each PID's first packet after a jump
NEWEST_LIMIT = 256 * KIB  # bytes of packets kept to find each PID's counter: audio is rare
VIDEO_PATIENCE = 3 * 90_000  # ticks of audio without video, until the PMT's video counts as absent


@dataclass(eq=False)
class Join:
    """A mark between blocks: a decoder can start with the next one."""

    preamble: bytes = b""  # sent first: PAT and PMT, an initialization section, or nothing
    is_key_frame: bool = False  # a picture that depends on no other
    dts: int | None = None  # in ticks; MPEG-TS only
    at_start: bool = False  # a decoder can start with the first block of the open segment
    is_makeshift: bool = False  # a picture that depends on others, for want of a key frame
    time: float = field(default_factory=time.monotonic)
    # Number of the block to start with.  The window sets it; until then, it does not exist.
    block: int = field(init=False, repr=False)


Framed = Block | Join  # a framer's output: blocks, and marks between them


class Framer:
    """Base of the framers, and the framer of media that can only be joined at segment starts.

    Not thread-safe: a feeder owns it.
    """

    def __init__(self) -> None:
        self.preamble = b""  # what a decoder needs before a segment that does not contain it
        self.unplayed: Sequence[str] = ()  # the codecs that no browser plays, once known
        self._handed_on = 0  # bytes
        self._carry = b""  # the start of a packet, or of an ID3 tag
        self._in_segments = False
        self.last_dts: int | None = None  # of the video, or of the audio if there is no video

    def feed_init_section(self, data: bytes) -> list[Framed]:
        """Take a whole initialization section, which applies to all segments until the next one."""
        self.preamble = data
        return self.feed(data)

    def start_segment(self) -> list[Framed]:
        """Start a segment with the next byte, and return the marks at its start.

        Bytes still held back belong to no segment.
        """
        self.drop()
        self._in_segments = True
        return [Join(self.preamble, at_start=True)]

    def leave_segments(self) -> None:
        """Expect bytes without segments, after a seam."""
        self._in_segments = False

    def feed(self, data: bytes) -> list[Framed]:
        """Take any bytes and return blocks; hold back an incomplete packet or tag."""
        return self._hand_on(data, 0, len(data))

    def flush(self) -> list[Framed]:
        """Return the bytes held back: the rest of their packet or tag will not arrive."""
        carry = self._carry
        self._carry = b""
        return self._hand_on(carry, 0, len(carry))

    def drop(self) -> None:
        """Discard the bytes held back: the rest of their packet or tag will not arrive."""
        self._carry = b""

    def expect_jump(self, is_certain: bool) -> None:
        """Expect that the next bytes may not continue the last; if `is_certain`, they do not."""

    def shut(self, is_backlog: bool) -> None:
        """Drop everything until a decoder can start.  Only MPEG-TS can and must do so.

        `is_backlog`: the source may first repeat media that viewers already have.
        """

    @property
    def is_shut(self) -> bool:
        """Whether bytes are dropped, because no decoder could start with them."""
        return False

    def _hand_on(self, data: bytes, start: int, end: int, unit: int = 1) -> list[Framed]:
        """Return data[start:end] in blocks of at most BLOCK_LIMIT bytes, a multiple of `unit`.

        The blocks are memoryviews, which saves copying every byte of every stream.
        """
        self._handed_on += end - start
        size = BLOCK_LIMIT - BLOCK_LIMIT % unit
        view = memoryview(data)
        return [view[at : min(at + size, end)] for at in range(start, end, size)]


# MPEG-TS (ISO/IEC 13818-1)

# Flags in the second byte of an adaptation field (2.4.3.4).
DISCONTINUITY_FLAG, RANDOM_ACCESS_FLAG, PCR_FLAG = 0x80, 0x40, 0x10
SHORTEST_SECTION = 12  # bytes of a PAT without entries (2.4.4.3); a PMT has more
SECTION_PACKETS = 8  # packets kept of an incomplete section, which has 1,024 bytes at most
# Stream types of video: those of table 2-34, and those of AVS, Dirac and VC-1.
VIDEO_TYPES = frozenset({0x01, 0x02, 0x10, 0x1B, 0x20, 0x24, 0x33, 0x42, 0xD1, 0xEA})
SOUND_TYPES = frozenset({0x03, 0x04, 0x0F, 0x11, 0x81, 0x87})  # MPEG audio, AAC, AC-3, E-AC-3
_UNIT_START = re.compile(rb"[\x40-\x7f\xc0-\xff]")  # second bytes with starts_unit()'s flag
_ANY_BYTE = re.compile(rb".", re.DOTALL)
# A sync byte.  If there is a byte one packet later, it must be a sync byte, too.
_PACKET_START = re.compile(rb"G(?!.{187}[^G])", re.DOTALL)
# By stream type: start codes of units that are a key frame, or occur only before one.
_KEY_UNITS = {
    0x01: re.compile(rb"\x00\x00\x01\xb3"),  # MPEG-1 and -2: sequence header
    0x02: re.compile(rb"\x00\x00\x01\xb3"),
    0x1B: re.compile(rb"\x00\x00\x01[\x25\x45\x65\x27\x47\x67]"),  # H.264: IDR slice, SPS
    0x24: re.compile(rb"\x00\x00\x01[\x20-\x2b\x40-\x43]"),  # H.265: IRAP picture, VPS, SPS
}
PRIVATE_TYPE = 0x06
# Codecs in MPEG-TS that no browser plays, by stream type.  For PRIVATE_TYPE, DVB names an audio
# codec by a descriptor (ETSI EN 300 468, annex D); the tags added below are not stream types.
UNPLAYED = {0x02: "MPEG-2", 0x24: "HEVC", 0x81: "AC-3", 0x87: "E-AC-3"}
UNPLAYED |= {0x6A: "AC-3", 0x7A: "E-AC-3"}


def _reversed_bits(value: int, width: int) -> int:
    """Return a number of `width` bits with the order of its bits reversed."""
    digits = f"{value:0{width}b}"
    return int(digits[::-1], 2)


_SWAPPED_BITS = bytes(_reversed_bits(byte, 8) for byte in range(256))  # by byte


def pid_of(packet: bytes | bytearray) -> int:
    return (packet[1] & 0x1F) << 8 | packet[2]


def payload_start(packet: bytes | bytearray) -> int:
    """Return the index of the payload, after the adaptation field if there is one (2.4.3.2)."""
    has_adaptation_field = packet[3] & 0x20
    if has_adaptation_field:
        return 5 + packet[4]
    return 4


def starts_unit(packet: bytes | bytearray) -> bool:
    """Whether a section or a PES packet starts here: payload_unit_start_indicator (2.4.3.3)."""
    return packet[1] & 0x40 != 0


def has_adaptation_flag(packet: bytes | bytearray, flag: int) -> bool:
    """Whether the packet has an adaptation field with this flag in its second byte (2.4.3.4)."""
    has_adaptation_field = packet[3] & 0x20 != 0
    return has_adaptation_field and packet[4] > 0 and packet[5] & flag != 0


def counter_before(packet: bytes) -> int:
    """Return the counter expected of the PID's previous packet: only payloads count (2.4.3.3)."""
    counter = packet[3] & 0x0F
    has_payload = packet[3] & 0x10
    if has_payload:
        return (counter - 1) & 0x0F
    return counter


def discontinuity_before(packet: bytes) -> bytes:
    """A packet without payload that signals a jump of its PID's counter and clock (2.4.3.5)."""
    field_length = TS_PACKET - 5
    header = (
        TS_SYNC[0],
        packet[1] & 0x1F,
        packet[2],
        0x20 | counter_before(packet),
        field_length,
        DISCONTINUITY_FLAG,
    )
    return bytes(header).ljust(TS_PACKET, b"\xff")


def table_checksum(data: bytes | bytearray) -> int:
    """Return CRC_32 (annex A); zlib.crc32() reverses the order of bits and inverts its result."""
    swapped = zlib.crc32(data.translate(_SWAPPED_BITS)) ^ 0xFFFF_FFFF
    return _reversed_bits(swapped, 32)


def read_timestamp(data: bytes | bytearray, at: int) -> int:
    """Return the PTS or DTS in the five bytes at `at`, in ticks of 1/90000 s (2.4.3.7)."""
    value = int.from_bytes(data[at : at + 5], "big")
    return value >> 3 & 0x1_C000_0000 | value >> 2 & 0x3FFF_8000 | value >> 1 & 0x7FFF


def timestamp_positions(packet: bytes | bytearray) -> Iterator[int]:
    """Yield the indexes of PTS and DTS, if a PES header in this packet has them (2.4.3.6)."""
    has_payload = packet[3] & 0x10
    if not starts_unit(packet) or not has_payload:
        return
    start = payload_start(packet)
    is_whole = start + 19 <= len(packet)  # a PES header with both timestamps
    if not is_whole or packet[start : start + 3] != b"\0\0\1":
        return
    flags = packet[start + 7]
    if flags & 0x80:
        yield start + 9
    if flags & 0x40:
        yield start + 14


class ProgramTables:
    """The newest PAT and PMT of a transport stream, as packets and as parsed values (2.4.4)."""

    def __init__(self) -> None:
        self.programs: Sequence[int] = ()  # PIDs of the PMTs, from the PAT
        self.streams: Mapping[int, int] = {}  # types of the elementary streams, by PID
        self.named_video_pid: int | None = None  # of the video that the PMT names, if any
        self.clock_pid = NULL_PID  # of the PCR; NULL_PID: none (2.4.4.9)
        self.unplayed: Sequence[str] = ()  # codecs of the streams that no browser plays
        self.lacks_video = False  # the video that the PMT names does not arrive
        self.sound_pid: int | None = None  # of the first sound that arrived with a timestamp
        self._packets: dict[int, bytes] = {}  # by PID: PAT and PMT as received
        self.parts: dict[int, bytes] = {}  # by PID: sections that continue in a later packet

    @property
    def video_pid(self) -> int | None:
        """The PID of the video that arrives; None if there is none."""
        return None if self.lacks_video else self.named_video_pid

    @property
    def main_pid(self) -> int | None:
        """The PID of the video, or of the sound if there is no video; None if unknown."""
        if self.video_pid is not None:
            return self.video_pid
        return self.sound_pid

    def may_be_sound(self, pid: int) -> bool:
        """Whether a stream is sound.  Only if the PMT names no other sound, it may be any stream.

        A PMT also lists sections, timed tags and sounds that never arrive.
        """
        has_sound = any(kind in SOUND_TYPES for kind in self.streams.values())
        return self.streams[pid] in SOUND_TYPES or not has_sound

    @property
    def program_pid(self) -> int | None:
        """The PID of the PMT; None until a PMT is received.

        The PAT may name PMTs that are never sent: gateways keep the PAT of a whole multiplex.
        """
        for pid in self.programs:
            if pid in self._packets:
                return pid
        return None

    @property
    def pids(self) -> set[int]:
        """The PIDs of the program that are known so far, the PAT's included."""
        pids = {0, self.clock_pid, *self.streams}
        if self.program_pid is not None:
            pids.add(self.program_pid)
        return pids

    @property
    def packets(self) -> bytes:
        """PAT and PMT to put before a join point; empty until both are received."""
        if self.program_pid is None or 0 not in self._packets:
            return b""
        return self._packets[0] + self._packets[self.program_pid]

    def add(self, pid: int, packet: bytes) -> None:
        """Take a packet of the PAT or PMT, the first of its section or a later one."""
        packets = self.parts.pop(pid, b"")
        if starts_unit(packet):
            packets = packet
        elif packets:
            packets += packet
        section = _section(packets)
        if section is None:
            if 0 < len(packets) <= SECTION_PACKETS * TS_PACKET:
                self.parts[pid] = packets
            return
        self._packets[pid] = packets
        table_id = section[0]
        if pid == 0 and table_id == 0x00:
            self._read_pat(section)
        elif pid == self.program_pid and table_id == 0x02:
            self._read_pmt(section)

    def announcement(self, pid: int, packet: bytes) -> bytes:
        """Return a packet to put before this one if it changes the PAT or PMT; else nothing.

        The returned packet differs only in its version_number (2.4.4.5, 2.4.4.9): VLC and GStreamer
        ignore a table whose version they know, and most encoders always send version 0.
        """
        is_table = pid == 0 or pid in self.programs
        if not is_table or not starts_unit(packet):
            return b""
        new = _section(packet)
        if new is None or new == _section(self._packets.get(pid, b"")):
            return b""
        section = bytearray(new)
        section[5] ^= 0x02  # the lowest bit of version_number
        section[-4:] = table_checksum(section[:-4]).to_bytes(4, "big")
        header = packet[:3] + bytes([packet[3] & 0xF0 | counter_before(packet)])
        start = _section_start(packet)
        return header + packet[4:start] + section + packet[start + len(section) :]

    def _read_pat(self, section: bytes) -> None:
        programs = []
        for at in range(8, len(section) - 4, 4):
            number, entry = struct.unpack_from(">HH", section, at)
            if number:  # program number 0 names the PID of the network information
                programs.append(entry & 0x1FFF)
        if programs:
            self.programs = programs
        for other in self._packets.keys() - {0, *self.programs}:
            del self._packets[other]

    def _read_pmt(self, section: bytes) -> None:
        streams: dict[int, int] = {}
        codecs: set[int] = set()  # stream types, or the descriptor tags of PRIVATE_TYPE
        self.clock_pid = int.from_bytes(section[8:10], "big") & 0x1FFF
        at = 12 + (int.from_bytes(section[10:12], "big") & 0xFFF)
        while at + 5 <= len(section) - 4:
            kind, pid, length = struct.unpack_from(">BHH", section, at)
            start = at + 5
            at = start + (length & 0xFFF)
            streams[pid & 0x1FFF] = kind
            if kind == PRIVATE_TYPE:
                codecs.update(_descriptor_tags(section[start:at]))
            else:
                codecs.add(kind)

        self.streams = streams
        if self.sound_pid not in streams:
            self.sound_pid = None
        self.named_video_pid = None
        for pid, kind in streams.items():
            if kind in VIDEO_TYPES:
                self.named_video_pid = pid
                break
        self.unplayed = sorted({UNPLAYED[codec] for codec in codecs & UNPLAYED.keys()})


def _descriptor_tags(data: bytes) -> Iterator[int]:
    at = 0
    while at + 2 <= len(data):
        yield data[at]
        at += 2 + data[at + 1]


def _section_start(packet: bytes | bytearray) -> int:
    """Return the index of the section that starts in this packet, after its pointer_field."""
    start = payload_start(packet)
    if start >= TS_PACKET:
        return start  # no payload
    return start + 1 + packet[start]


def _section(packets: bytes | bytearray) -> bytes | None:
    """Return the section in these packets of one PID; None while it is incomplete."""
    data = b""
    for at in range(0, len(packets), TS_PACKET):
        packet = packets[at : at + TS_PACKET]
        start = _section_start(packet) if starts_unit(packet) else payload_start(packet)
        data += packet[start:]
    length = 3 + (int.from_bytes(data[1:3], "big") & 0xFFF)
    is_whole = SHORTEST_SECTION <= length <= len(data)
    return data[:length] if is_whole else None


def _newest_counter(blocks: Sequence[Block], pid: int) -> int | None:
    """Return the counter of a PID's newest packet in these blocks (oldest first), or None."""
    for packets in reversed(blocks):
        pids = bytes(packets[2::TS_PACKET])  # their low bytes
        number = pids.rfind(pid & 0xFF)
        while number >= 0:
            at = number * TS_PACKET
            packet = bytes(packets[at : at + TS_PACKET])
            if pid_of(packet) == pid:
                return packet[3] & 0x0F
            number = pids.rfind(pid & 0xFF, 0, number)
    return None


class TsFramer(Framer):
    """Hands on whole packets, with join points at key frames.

    If the source has no segments and no key frame is recent, any PES packet may be a join point.
    A segment's join point is its first byte if its first picture is a key frame; PAT and PMT are
    put before it unless the segment starts with them, as RFC 8216 section 3 asks.  Otherwise the
    join point is the segment's first key frame, with PAT and PMT put before it.

    At a jump, a packet that signals it is put before the first packet of each PID.  Without it,
    demuxers would consider the data that they hold of that PID damaged.  A changed PAT or PMT is
    sent twice, because some players ignore a change that keeps the version (see announcement()).

    While shut, it drops packets up to a key frame that is new to the viewers.  Then it hands on
    PAT, PMT and everything from that key frame on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tables = ProgramTables()
        self._first_sounds: dict[int, int] = {}  # by PID: the first DTS since the last picture
        self._key_frame_time: float | None = None  # when the newest key frame arrived
        self._awaits_start = False  # the open segment has no join point yet
        self._has_unit = False  # the open segment has a picture, or audio if there is no video
        self._has_pat = False  # the open segment has a PAT
        self._has_tables = False  # the open segment has a PMT after it
        self._has_join = False  # this feed() has found a join point
        self._newest: deque[Block] = deque()  # the newest packets handed on; empty after a jump
        # Since the newest place where the stream may jump:
        self._may_jump = False
        self._is_jump = False  # the jump is certain
        self._before: Sequence[Block] = ()  # the packets before that place, the newest last
        self._seen: set[int] = set()  # PIDs whose first packet was checked
        self._search_end = 0  # the search for first packets ends at this many bytes handed on
        # While shut:
        self._is_shut = False
        self._shown = self.tables  # the tables that viewers have
        self._patience_end = 0.0  # time.monotonic(), after which the start of any unit opens it
        self._backlog_end: int | None = None  # the last DTS that a backlog may repeat, if any
        self._dropped_dts: int | None = None  # the newest DTS among the dropped packets

    def start_segment(self) -> list[Framed]:
        self._in_segments = True
        self._awaits_start = True
        self._has_unit = False
        self._has_pat = False
        self._has_tables = False
        return []

    def leave_segments(self) -> None:
        super().leave_segments()
        self._awaits_start = False
        self._key_frame_time = None

    def expect_jump(self, is_certain: bool) -> None:
        """Expect that the next bytes may not continue the last ones.

        If a jump is certain, the first packet of each PID gets a notice.  Otherwise (at another
        opening of the same source, or at a segment) the counters decide: the jump becomes certain
        at the first packet that does not continue its PID's counter or that changes a table.
        """
        if is_certain:
            self._newest.clear()
        if not self._handed_on:
            return
        self._may_jump = True
        has_counters = bool(self._newest)
        self._is_jump = is_certain or not has_counters
        if self._is_jump:
            self._before = ()
        else:
            tables = self._shown if self._is_shut else self.tables
            self._before = (tables.packets, *self._newest)
        self._seen = {NULL_PID}
        self._search_end = self._handed_on + JUMP_SEARCH

    def shut(self, is_backlog: bool) -> None:
        self.drop()
        if not self._is_shut:
            self._shown = self.tables
        self.tables = ProgramTables()  # it may be another source: the old tables do not apply
        self._first_sounds.clear()
        self._is_shut = True
        self._patience_end = time.monotonic() + SEAM_PATIENCE
        self._backlog_end = self.last_dts if is_backlog else None
        self._dropped_dts = None

    @property
    def is_shut(self) -> bool:
        return self._is_shut

    def feed(self, data: bytes) -> list[Framed]:
        self._has_join = False
        carry = self._carry
        self._carry = b""
        missing = TS_PACKET - len(carry)
        if carry.startswith(TS_SYNC) and len(data) >= missing:
            # Join only this packet: joining all the data would copy all of it.
            return self._split(carry + data[:missing], 0) + self._split(data, missing)
        return self._split(carry + data, 0)

    def _split(self, data: bytes, at: int) -> list[Framed]:
        """Hand on the data from `at` on, including bytes between packets; hold back the rest."""
        blocks: list[Framed] = []
        while len(data) - at >= TS_PACKET:
            whole = (len(data) - at) // TS_PACKET
            first_bytes = data[at : at + whole * TS_PACKET : TS_PACKET]
            packets = whole - len(first_bytes.lstrip(TS_SYNC))  # before the first wrong byte
            end = at + packets * TS_PACKET
            if not packets:
                found = _PACKET_START.search(data, at + 1)
                end = found.start() if found else len(data)
                blocks += self._hand_on(data, at, end)
            elif self._is_shut:
                blocks += self._pass_if_opened(data, at, end)
            else:
                blocks += self._pass(data, at, end)
            at = end
        self._carry = data[at:]
        return blocks

    def _hand_on(self, data: bytes, start: int, end: int, unit: int = 1) -> list[Framed]:
        if self._is_shut:
            return []
        return super()._hand_on(data, start, end, unit)

    def _pass_if_opened(self, data: bytes, start: int, end: int) -> list[Framed]:
        """Drop packets up to the first that a decoder can start with, and hand on the rest."""
        flags = data[start + 1 : end : TS_PACKET]
        index = self._next_place(flags, 0)
        while index is not None:
            at = start + index * TS_PACKET
            packet = data[at : at + TS_PACKET]
            pid = pid_of(packet)
            if pid == 0 or pid in self.tables.programs:
                self.tables.add(pid, packet)
            elif starts_unit(packet) and pid in self.tables.streams:
                self._note_dropped(pid, packet)
                if self._opens(pid, packet):
                    return self._open(self.tables.packets + data[at:end])
            index = self._next_place(flags, index + 1)
        if not self.tables.packets and time.monotonic() > self._patience_end:
            return self._open(data[start:end])  # no tables: a later place is no better
        return []

    def _open(self, data: bytes) -> list[Framed]:
        """Hand on these packets and everything after them."""
        self._is_shut = False
        self.tables = self._shown
        return self._pass(data, 0, len(data))

    def _note_dropped(self, pid: int, packet: bytes) -> None:
        """Note the DTS of a unit that starts in a dropped packet."""
        dts = self._take_dts(pid, packet)
        if dts is not None:
            self._dropped_dts = dts

    def _opens(self, pid: int, packet: bytes) -> bool:
        """Whether viewers can continue with this packet.

        They can at a key frame that is new to them, or whose clock was reset.  After SEAM_PATIENCE,
        they can at the start of any unit, because some encoders send no key frame at all (intra
        refresh).
        """
        if time.monotonic() > self._patience_end:
            return True
        video_pid = self.tables.video_pid
        if video_pid is not None and not (pid == video_pid and self._is_key_frame(packet)):
            return False
        if self._backlog_end is None:
            return True
        if self._dropped_dts is None:  # so far only sections, or units without timestamps
            return False
        ahead = (self._dropped_dts - self._backlog_end) % TIMESTAMP_MODULUS
        return 0 < ahead < TIMESTAMP_MODULUS - NEW_CLOCK_TICKS

    def _pass(self, data: bytes, start: int, end: int) -> list[Framed]:
        """Hand on these packets, with marks between them.

        Usually it looks only at packets that start a section or a PES packet: one in fifty.
        """
        blocks: list[Framed] = []
        flags = data[start + 1 : end : TS_PACKET]
        begin = start
        firsts = self._first_places(data, begin, end)
        index = self._next_place(flags, 0, firsts)
        while index is not None:
            at = begin + index * TS_PACKET
            packet = data[at : at + TS_PACKET]
            pid = pid_of(packet)

            notice = self._notice(pid, packet) if self._may_jump else b""
            if notice:
                blocks += self._hand_on(data, start, at, TS_PACKET)
                blocks += self._hand_on(notice, 0, len(notice), TS_PACKET)
                start = at

            if pid == 0 or pid in self.tables.programs:
                self._take_table(pid, packet)
                firsts = self._first_places(data, begin, end)  # the table may name other PIDs
            elif starts_unit(packet) and pid in self.tables.streams:
                join = self._see_unit(pid, packet)
                if join:
                    if not join.at_start:
                        blocks += self._hand_on(data, start, at, TS_PACKET)
                        start = at
                    blocks.append(join)
            index = self._next_place(flags, index + 1, firsts)

        blocks += self._hand_on(data, start, end, TS_PACKET)
        self._remember(memoryview(data)[begin:end])
        return blocks

    def _take_table(self, pid: int, packet: bytes) -> None:
        self.tables.add(pid, packet)
        if pid == 0:
            self._has_pat = True
        elif pid == self.tables.program_pid and self._has_pat:  # demuxers ignore a PMT before it
            self._has_tables = True
        self.preamble = self.tables.packets
        self.unplayed = self.tables.unplayed

    def _remember(self, packets: Block) -> None:
        """Keep packets for their counters, in the fewest blocks that hold NEWEST_LIMIT bytes."""
        self._newest.append(packets)
        excess = sum(len(block) for block in self._newest) - NEWEST_LIMIT
        while excess >= len(self._newest[0]):
            oldest = self._newest.popleft()
            excess -= len(oldest)

    def _next_place(self, flags: bytes, index: int, firsts: Sequence[int] = ()) -> int | None:
        """Return the index of the next packet to look at, from `index` on; None if there is none.

        `flags` has the second byte of each packet, and `firsts` the indexes of packets to look at
        in any case.  While a section continues in a later packet, all packets must be looked at.
        """
        wanted = _ANY_BYTE if self.tables.parts else _UNIT_START
        found = wanted.search(flags, index)
        place = found.start() if found else None
        for first in firsts:
            if first >= index and (place is None or first < place):
                place = first
        return place

    def _first_places(self, data: bytes, start: int, end: int) -> list[int]:
        """Return the indexes of the packets that are their PID's first after a possible jump."""
        if not self._may_jump:
            return []
        if self._handed_on >= self._search_end:
            if not self._is_jump:
                self._may_jump = False
            return []
        pids = data[start + 2 : end : TS_PACKET]  # their low bytes
        places = []
        for pid in self.tables.pids - self._seen:
            number = pids.find(pid & 0xFF)
            while number >= 0:
                at = start + number * TS_PACKET
                if pid_of(data[at : at + 3]) == pid:
                    places.append(number)
                    break
                number = pids.find(pid & 0xFF, number + 1)
        return places

    def _notice(self, pid: int, packet: bytes) -> bytes:
        """Return the packets to put before a PID's first packet if it does not signal its jump."""
        if pid in self._seen:
            return b""
        last: int | None = None
        if not self._is_jump:
            last = self._counter_before(pid)
            if last is None or pid not in self.tables.pids:
                return b""
        self._seen.add(pid)
        table = self.tables.announcement(pid, packet)
        if not self._is_jump and (table or last != counter_before(packet)):
            self._is_jump = True  # then no other PID continues, either
            self._before = ()
        if not self._is_jump or has_adaptation_flag(packet, DISCONTINUITY_FLAG):
            return b""
        return discontinuity_before(table or packet) + table

    def _counter_before(self, pid: int) -> int | None:
        """Return the counter of this PID's newest packet before the possible jump, or None."""
        if pid in (0, self.tables.program_pid):
            # The first item holds the newest tables.  The PIDs of media often have the same low
            # byte as theirs, so a search through the media would look at most of its packets.
            found = _newest_counter(self._before[:1], pid)
            if found is not None:
                return found
        return _newest_counter(self._before, pid)

    def _see_unit(self, pid: int, packet: bytes) -> Join | None:
        """Look at a PES packet that starts a unit; return a mark if a decoder can start there."""
        dts = self._take_dts(pid, packet)
        if dts is not None:
            self.last_dts = dts
        video_pid = self.tables.video_pid
        is_key_frame = pid == video_pid and self._is_key_frame(packet)
        join = self._join_at(pid, is_key_frame)
        if join:
            self._has_join = True
        if video_pid is None or pid == video_pid:
            self._has_unit = True
        if is_key_frame:
            self._key_frame_time = time.monotonic()
        return join

    def _join_at(self, pid: int, is_key_frame: bool) -> Join | None:
        """Return the mark for a unit that starts here, or None."""
        has_video = self.tables.video_pid is not None
        if self._awaits_start and (is_key_frame or not has_video):
            # At the segment's start, unless pictures that depend on others precede this one.
            self._awaits_start = False
            is_whole = not self._has_unit
            preamble = self.preamble
            if is_whole and self._has_tables:
                preamble = b""
            return Join(preamble, is_key_frame, self.last_dts, at_start=is_whole)
        if is_key_frame:
            return Join(self.preamble, is_key_frame, self.last_dts)
        if self._in_segments:
            is_first_picture = pid == self.tables.video_pid and not self._has_unit
            if self._awaits_start and is_first_picture and self.preamble:
                return Join(self.preamble, is_makeshift=True)
            return None
        waits_for_key_frame = has_video and self._has_key_frame
        if waits_for_key_frame or self._has_join:  # one in each feed() is enough
            return None
        return Join(self.preamble, dts=self.last_dts)

    @property
    def _has_key_frame(self) -> bool:
        """Whether the newest key frame is recent enough for a viewer to start with."""
        if self._key_frame_time is None:
            return False
        return time.monotonic() - self._key_frame_time < KEY_FRAME_LIFE

    def _take_dts(self, pid: int, packet: bytes) -> int | None:
        """Return the DTS of a unit of the video, or of the audio if there is no video; else None.

        Also notes whether the video that the PMT names arrives.
        """
        dts = None
        for at in timestamp_positions(packet):  # the DTS is the last; without one, the PTS counts
            dts = read_timestamp(packet, at)
        named_video_pid = self.tables.named_video_pid
        if named_video_pid is None or pid == named_video_pid:
            self._first_sounds.clear()
            self.tables.lacks_video = False
        elif dts is not None:
            first_sound = self._first_sounds.setdefault(pid, dts)
            silence = (dts - first_sound) % TIMESTAMP_MODULUS
            if VIDEO_PATIENCE < silence < TIMESTAMP_MODULUS // 2:  # above that, the clock went back
                self.tables.lacks_video = True

        is_other = pid != named_video_pid and self.tables.sound_pid is None
        if is_other and dts is not None and self.tables.may_be_sound(pid):
            self.tables.sound_pid = pid
        return dts if pid == self.tables.main_pid else None

    def _is_key_frame(self, packet: bytes) -> bool:
        """Whether random_access_indicator (2.4.3.4) or a unit in the packet shows a key frame."""
        if has_adaptation_flag(packet, RANDOM_ACCESS_FLAG):
            return True
        units = _KEY_UNITS.get(self.tables.streams[pid_of(packet)])
        if units is None:
            return False
        return units.search(packet, payload_start(packet)) is not None


# Packed audio, with ID3 tags in front of a segment's first frame (RFC 8216, 3.4)

ID3_HEADER = 10  # bytes


def _id3_size(start: bytes) -> int | None:
    """Return the size of the ID3 tag at the start; None without a tag or its whole header.

    The size in the header has 28 bits, and does not include the footer that version 4 may add.
    """
    if not start.startswith(b"ID3") or len(start) < ID3_HEADER:
        return None
    content_size = 0
    for byte in start[6:10]:
        content_size = content_size << 7 | byte & 0x7F
    has_footer = start[3] >= 4 and start[5] & 0x10
    footer_size = ID3_HEADER if has_footer else 0
    return ID3_HEADER + content_size + footer_size


class AudioFramer(Framer):
    """Removes ID3 tags of any version in front of packed audio.

    Viewers can join anywhere: players find the next frame by themselves, as with any radio server.
    The preamble of a segment is its tags: they contain its timestamp, which HLS needs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._may_be_tag = True  # nothing but tags since the start, a segment's start or a seam
        self._tag_left = 0  # bytes missing from an open tag

    def start_segment(self) -> list[Framed]:
        self.preamble = b""
        return super().start_segment()

    def drop(self) -> None:
        super().drop()
        self._may_be_tag = True
        self._tag_left = 0

    def feed(self, data: bytes) -> list[Framed]:
        start = 0
        if self._may_be_tag:
            data = self._carry + data
            self._carry = b""
            start = self._take_tags(data)
        if start == len(data):
            return []
        blocks = self._hand_on(data, start, len(data))
        if self._in_segments:
            return blocks
        return [Join(), *blocks]  # one in each feed() is enough

    def _take_tags(self, data: bytes) -> int:
        """Move the tags at the start of the data to the preamble.

        Returns the index of the media after them; len(data) if it is not known yet.
        """
        at = 0
        while at < len(data):
            if not self._tag_left:
                header = data[at : at + ID3_HEADER]
                if len(header) < ID3_HEADER and b"ID3".startswith(header[:3]):
                    self._carry = header
                    return len(data)
                size = _id3_size(header)
                if size is None:
                    self._may_be_tag = False
                    return at
                self._tag_left = size
            end = min(at + self._tag_left, len(data))
            self._tag_left -= end - at
            self.preamble = (self.preamble + data[at:end])[:TAG_LIMIT]
            at = end
        return at


# Containers and their detection


@dataclass(frozen=True, eq=False)
class Container:
    """The format of a stream, and everything that depends on it."""

    media_type: str
    extension: str = ""  # of its HLS segments; empty: it is not available as HLS
    framer: Callable[[], Framer] = Framer
    is_packed_audio: bool = False  # frames, with ID3 tags in front
    joins_late: bool = False  # late viewers can join it even if the source has no segments
    is_cut_for_hls: bool = False  # the window can cut it by its clock if it has no segments
    has_map: bool = False  # its playlist names an initialization section (RFC 8216, 4.3.2.5)
    can_skip: bool = True  # a viewer that falls behind can continue at a later place
    filler: bytes = b""  # keeps a silent connection alive
    plays_bare: bool = False  # browsers play it without HLS
    first_bytes: re.Pattern[bytes] | None = None
    other_names: Sequence[str] = ()  # other Content-Types that origins use for it

    def __repr__(self) -> str:
        return f"<Container {self.media_type}>"

    def begins(self, data: bytes) -> bool:
        """Whether the data begins like this container."""
        return self.first_bytes is not None and self.first_bytes.match(data) is not None

    def is_called(self, content_type: str) -> bool:
        """Whether an origin's Content-Type names this container."""
        name = content_type.partition(";")[0].strip().lower()
        return name in (self.media_type, *self.other_names)


MPEG_TS = Container(
    "video/mp2t", "ts", TsFramer,
    joins_late=True, is_cut_for_hls=True, filler=NULL_PACKET,
    # A whole packet followed by another's sync byte is proof enough.
    first_bytes=re.compile(rb"G.{187}G", re.DOTALL),
)  # fmt: skip
FMP4 = Container(
    "video/mp4", "m4s",
    has_map=True, can_skip=False, plays_bare=True,
    first_bytes=re.compile(rb".{4}(ftyp|styp|moov|moof|sidx|emsg|prft)", re.DOTALL),
)  # fmt: skip
MATROSKA = Container("video/x-matroska", first_bytes=re.compile(rb"\x1a\x45\xdf\xa3"))
OTHER_MEDIA = Container("application/octet-stream")


def _packed_audio(
    media_type: str,
    extension: str,
    header: bytes,
    *,
    plays_bare: bool = False,
    other_names: Sequence[str] = (),
) -> Container:
    """Return a container of audio frames; `header` is a pattern of a frame's first bytes."""
    return Container(
        media_type, extension, AudioFramer,
        is_packed_audio=True, joins_late=True, plays_bare=plays_bare,
        first_bytes=re.compile(header, re.DOTALL), other_names=other_names,
    )  # fmt: skip


# ISO/IEC 13818-7, 6.2: syncword, layer 0.
AAC = _packed_audio(
    "audio/aac", "aac", rb"\xff[\xf0\xf1\xf8\xf9].{4}",
    plays_bare=True, other_names=("audio/aacp", "audio/x-aac"),
)  # fmt: skip
# ISO/IEC 11172-3, 2.4.1.3: a valid version and layer, and a bit rate.  FF FE (layer I with a
# checksum) is left out, because it is the byte order mark of UTF-16.
MPEG_AUDIO = _packed_audio(
    "audio/mpeg", "mp3", rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xfd\xff][\x10-\xef].{3}",
    plays_bare=True, other_names=("audio/mp3", "audio/x-mpeg"),
)  # fmt: skip
# ETSI TS 102 366, 4.4.1 and E.2.2: the two differ in bsid.
AC3 = _packed_audio("audio/ac3", "ac3", rb"\x0b\x77.{3}[\x00-\x57]")
EAC3 = _packed_audio("audio/eac3", "ec3", rb"\x0b\x77.{3}[\x58-\x87]")

PACKED_AUDIO = (AAC, MPEG_AUDIO, AC3, EAC3)

# Up to three packets at any offset, of which the first is whole.  A wrong IV spoils 16 bytes,
# including the first packet's sync byte; then the match begins with the second packet, at 188.
_PACKETS = re.compile(rb".{0,188}?G(?=.{187})(?!.{187}[^G])(?!.{375}[^G])", re.DOTALL)
# Five sync bytes after other data: in SEARCH_LIMIT bytes, that many are no accident.
_FAR_PACKETS = re.compile(rb"G(?=(?:.{187}G){4})", re.DOTALL)


def sniff(start: bytes, is_all: bool = False, media_type: str = "") -> Container | None:
    """Detect the container from the first bytes of a stream; None asks for more bytes.

    `is_all`: there are no more bytes, so the result is not None.  Otherwise sniff() asks for whole
    ID3 tags, up to TAG_LIMIT, and SNIFF_LIMIT bytes after them, or SEARCH_LIMIT bytes if
    SNIFF_LIMIT bytes are not enough.  `media_type` is the Content-Type of a raw source.  It is
    needed to identify audio that begins within a frame, as a relay's does.
    """
    at = 0
    tag_size = _id3_size(start)
    while tag_size is not None:
        at += tag_size
        tag_size = _id3_size(start[at : at + ID3_HEADER])
    has_open_tag = at > len(start)
    if has_open_tag and len(start) >= TAG_LIMIT:
        return MPEG_AUDIO  # only a music file with a cover has a tag that large

    start = start[at:]
    found = _container_that_begins(start, (MPEG_TS, FMP4, MATROSKA))  # these are never mistaken
    if found:
        return found
    if not is_all and len(start) < SNIFF_LIMIT:
        return None
    if _PACKETS.match(start):  # checked before audio, because packets may look like a frame
        return MPEG_TS
    found = _container_that_begins(start, PACKED_AUDIO)
    if found is None:
        found = _named_audio(media_type)
    if found:
        return found
    if not is_all and len(start) < SEARCH_LIMIT:
        return None
    has_packets = _FAR_PACKETS.search(start, 0, SEARCH_LIMIT)
    return MPEG_TS if has_packets else OTHER_MEDIA


def _container_that_begins(start: bytes, containers: Iterable[Container]) -> Container | None:
    """Return the first of these containers that begins like these bytes, or None."""
    for container in containers:
        if container.begins(start):
            return container
    return None


def _named_audio(media_type: str) -> Container | None:
    """Return the packed audio that this Content-Type names, or None."""
    for container in PACKED_AUDIO:
        if container.is_called(media_type):
            return container
    return None


# Media or noise: decryption with a wrong key yields noise

NOISE_LIMIT = 16 * KIB  # bytes searched for media
FEW_FRAMES = 8 * KIB  # bytes; a shorter segment of packed audio may have fewer than three frames
# NOISE_LIMIT bytes of noise contain a given pair of bytes one time in four.  So three equal pairs
# confirm a frame at its expected place, and eight prove frames at any place.
CONFIRMING_FRAMES = 3
PROVING_FRAMES = 8
_FRAGMENT = re.compile(rb".{4}mo(?:of.{4}mfhd|ov.{4}mvhd)", re.DOTALL)  # boxes of fMP4


def media_in(start: bytes, is_all: bool = False) -> bytes | None:
    """Return the media in the first bytes of a decrypted segment; None asks for more bytes.

    The result is empty if the bytes are noise: then the key is wrong.  A wrong IV spoils the first
    16 bytes.  MPEG-TS keeps them, because players find the next packet; other media begins with the
    first intact fragment or frame.
    """
    if start.startswith((b"ID3", b"WEBVTT", b"\xef\xbb\xbfWEBVTT")):
        return start
    container = sniff(start, is_all)
    if container is None:
        return None
    is_proven = container is not OTHER_MEDIA
    if container.is_packed_audio:  # noise begins like a frame one time in 4,000
        is_short = is_all and len(start) < FEW_FRAMES
        is_proven = is_short or start.count(start[:2]) >= CONFIRMING_FRAMES
    if is_proven:
        return start
    if not is_all and len(start) < NOISE_LIMIT:
        return None
    return _behind_spoiled_bytes(start)


def _behind_spoiled_bytes(start: bytes) -> bytes:
    """Return the media from its first intact fragment or frame on; empty if there is none."""
    fragment = _FRAGMENT.search(start, 0, NOISE_LIMIT)
    if fragment:
        return start[fragment.start() :]
    for container in PACKED_AUDIO:
        assert container.first_bytes
        frames: dict[bytes, list[int]] = {}  # start positions, by their first two bytes
        for frame in container.first_bytes.finditer(start, 0, NOISE_LIMIT):
            frames.setdefault(frame[0][:2], []).append(frame.start())
        for places in frames.values():
            if len(places) >= PROVING_FRAMES:
                return start[places[0] :]
    return b""


# PNG (RFC 2083, 3.1), JPEG, GIF: the formats that image hosts accept.
_IMAGE = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a")
IMAGE_HEADER = 8  # bytes needed to detect an image


def behind_image(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the pieces of a segment without an image in front of its MPEG-TS packets.

    Sites that store segments on image hosts put an image there, and demuxers mistake the whole
    stream for that image.  An image that no packets follow is kept.
    """
    remaining = iter(pieces)
    start = b""
    for piece in remaining:
        start += piece
        if len(start) < IMAGE_HEADER:
            continue
        if not _IMAGE.match(start):
            break
        packets = _FAR_PACKETS.search(start, 0, SEARCH_LIMIT)
        if packets:
            start = start[packets.start() :]
            break
        if len(start) >= SEARCH_LIMIT:
            break
    if start:
        yield start
    yield from remaining


# The end of a segment: telling padding from media that looks like it

_BOX = re.compile(rb".{4}[a-z0-9]{4}", re.DOTALL)  # ISO/IEC 14496-12, 4.2
BOX_HEADER, LARGE_BOX_HEADER = 8, 16  # bytes; the size of a large box follows its type
IS_LARGE_BOX = 1  # in place of its size
NO_UNIT = 0  # a size that no unit has


def _unit_size(header: bytes) -> int | None:
    """Return the size in bytes of the ID3 tag, ADTS frame or fMP4 box with this header.

    Returns NO_UNIT if it is the header of none of these, and None to ask for more bytes.
    """
    if len(header) < BOX_HEADER:
        return None
    if header.startswith(b"ID3"):
        return _id3_size(header)
    if AAC.begins(header):  # ISO/IEC 13818-7, 6.2: aac_frame_length
        return int.from_bytes(header[3:6], "big") >> 5 & 0x1FFF
    if not _BOX.match(header):
        return NO_UNIT
    size = int.from_bytes(header[:4], "big")
    if size != IS_LARGE_BOX:
        return size
    if len(header) < LARGE_BOX_HEADER:
        return None
    return int.from_bytes(header[BOX_HEADER:LARGE_BOX_HEADER], "big")


class UnitCounter:
    """Follows the units of a segment by their sizes, to know whether its last unit is complete.

    Units are the packets of MPEG-TS, the frames of ADTS, the boxes of fMP4, and ID3 tags.
    """

    def __init__(self) -> None:
        self._size = 0  # bytes received
        self._header = b""  # the start of a unit whose size is not known yet
        self._left = 0  # bytes missing from the open unit
        self._is_counted = False  # the segment began with a tag, a frame or a box
        self._is_lost = False  # the bytes after the last known unit are not a unit
        self._tail = b""  # the newest bytes, up to the size of a packet

    def feed(self, data: bytes) -> None:
        self._size += len(data)
        self._tail = (self._tail + data[-TS_PACKET:])[-TS_PACKET:]
        if self._is_lost:
            return
        data = self._header + data
        self._header = b""
        at = self._left
        while at < len(data):
            size = _unit_size(data[at : at + LARGE_BOX_HEADER])
            if size is None:
                self._header = data[at:]
                at = len(data)
            elif size == NO_UNIT:
                self._is_lost = True
                return
            else:
                self._is_counted = True
                at += size
        self._left = at - len(data)

    @property
    def is_between_units(self) -> bool:
        """Whether the newest byte ends a unit; false if that is unknown."""
        if self._is_counted:
            is_within_unit = len(self._header) > 0 or self._left > 0
            return not self._is_lost and not is_within_unit
        return self._size % TS_PACKET == 0 and self._tail.startswith(TS_SYNC)


# --------------------------------------------------------------------------------------------------
# Test card: a clip of 1.92 s that loops without a seam
# --------------------------------------------------------------------------------------------------

# Color bars and silence, made by tests/make_test_card.py: 48 pictures at 25 fps and 90 AAC frames
# at 48 kHz, which have exactly the same duration.
TEST_CARD_TICKS = 172_800
TEST_CARD = """
0RR911poj4|NsC0{{SP9cj1F~Cq=cePhJYo#&*}E!{f?}<L99n2u3Vy_&dJtI3F$}8%}K`WSwTjOGP>`x|2^EYI@3zP@%Q=R
o5@xAlKDxmAym11>9B1IDMSE&p5m*tin9Khww1ekc{>cf!5-jd-zv^ZoO4rQ-Tx)vEv1%l<VmUV8}WGXtHkMIrkx!|ILRFHY
_~a`Q!b}V*5fsdCD?;$x<=wO8h~wH=k+npX495??fr2r1C}Rnss20Y&op2nO9;br>GiTCu5Clz}Rv#*fZ|7u@F|aZQGC%gLR
=`OMoTBT<vqUJ9xcbmjfL?InOWY;8(+IhP4{%pY<p`isF_wN=F(gky<<zs0Iy>18mLzy^itn4eQr!@N>7^aQ4$asw~$@oUzt
h2ze+upYuT;jE0fHV7R#|*hd)}(G&WyI+(A2=>8*RkUqXfd6bmv_jkcT+$JIG+_MSQ(&&E3yh5Qahn?ALVNEF3fYDR=LoJ}o
+@|fehX+<;9l(%`?Cc|^;iz0g$|i6*!gcC@0N9rAd_!2PenL3)DCdfDlr4w#RB7l>_v!&CzDAfQ(m?OlPjjJn^9%9Lc6AQ`Y
sUZH)Kpq?FHh>$YY?+|<AGSpCyTgD!avV!j3aw4>}Vl#p{IVI9)f(K0C4da23-5%WTQXsVb&Ve|Iw^7QXXF~QWW3kktU@xgY
k-970T&rU<qn#R%_)xsfBm+Wy)F$HJo>bqXGiys5uwtb6y~KDnW6hz`b=}--Hf(@nR~Wc81KeJO`-7nB%79?2;9TF2Qgsj+W
&JnN%|0z-GSWuJ-TPy3-K_ZG_c0dx|>?xpW+kvyB6DkbwE0s<5B5frJk9M~=c@{$#JwW*e%y6uhewQV;Y_v;^M6Qf03F<&F<
Yn<&;;kzb-74Eu#O@6wsDcDfFkz#atExvTTz0?D7KTXmy{cR2Dnjr)N0ih1Y98TyZNB$C;P$CIAKz=iSmF_0D-D8b;-W%{)7
Y+%_@GMf+F1!q}Cwai<hzP)9J8a-f@YHl+8NOd7B+*!~N#b&)az14+aTR6YJVbFzl)cG6qTz2SC`g)<m>YQK@vCz+WjvTq=U
(V;$Aa74?X}HawgnUg@`|GDBdrGgqq^V#cCJmo*I2}n7X^VnO9ArozlCD+zTUkZ%K`F^$;UCYq;QOO})=uS29zA_sG)O5|nt
O6F{i~4MW17@XWlBCdYWgP#H>f%JJ~s?<njhqKG)9XB6v)`d-kJ!`M+Hb29YGszgVQb7SVl@MkbhLeofJ1uv*^ZEUHRQxI+0
6kXoovTOuNjvHRCCdkt`TaLnzh$plTSC{gW9H{=dPc?91ZUBKEz$U+~R00+}#r)+#+TAjN4`YhzxHda7MeS=Y#S128HJN;V@
u^#Rj!F9(Ek9uXy?$ntq;)U6O}vIB<)$l59w09d<Jc-r-X;KQnnaP9S=VYSj<WgF^7BSKR5_@eNdYVlz_`h(xG^pY=&MvCV6
l*qLW%>MopmU{)fVq?%X+bF;N$NK>v<@ver(8q-yP!K?>RAbs3zphQVi<03wStAN5WbWeOu37JVit6MPq0Yp>zy~ngLoz}zS
S5PSTlUy1wH)?GB{46d(^`QlJ)rSIsEA2FA5D48rt43<2(Fa^bz{1<)E|EkA<jxjr42#-FZU-rA>hd!Q1^LGR8Zi^NA$8Cv2
RQ=*7@E{QCKIDAJa@N1i}m`1{Sq2amR9|))I7@OFlbNW&b9<mJViHYpPp}E=e0I`^-FZihG87=-m_bFR1$FP=!SvH=fE6$EX
7ze}{aId?W%VW3YEtmWFIOSgb!%W$Ig~^G;Apq%^B^6zTMtp;s?VMpwfDQA1dyM+x^kN2s%$wtx?bzn4ZLVvdzR&A<DitByF
ARQW~icGV8)==U@g6TZBY>8OcN{DwU^2qL3^ajW+oYk3<eyPTRZbc}ho`$W5#MxgFGYgl3!c~yPh=S%M_o^yq;P%&0dnJ<u<
uxOw0kJ?}k${E>Mx|8e{OSysemdtvJu&weIg%k6Oj$$gP=AUyW`#d7K3%S%7_v?U*rKhkAUe_~6>pf}CKK28Zy$(NQ=8ldul
rz5V*o2#sOvbpkI$v;QlnW%U<I!TKjd;2!j#3Dd{j%&a(W);#IIwh`8Rc?-t0i&@%gs<%$5~+4e*mzP`75_$(IZIOO)|dU#m
4uz4aXIi)8CeNzmY59`&SccRY>KaBVu-tx+Tj~-1`f9A$YdDD+Bg1KN9zI6+>+Q#pZ_A
"""


def delay_timestamps(packet: bytearray, ticks: int) -> None:
    """Add `ticks` to PTS and DTS; keep their four prefix and three marker bits."""
    for at in timestamp_positions(packet):
        value = (read_timestamp(packet, at) + ticks) % TIMESTAMP_MODULUS
        kept = int.from_bytes(packet[at : at + 5], "big") & 0xF1_0001_0001
        bits = (value & 0x1_C000_0000) << 3 | (value & 0x3FFF_8000) << 2 | (value & 0x7FFF) << 1
        packet[at : at + 5] = (kept | bits).to_bytes(5, "big")


def test_card_segment(number: int) -> bytes:
    """Return loop `number` of the test card, which continues loop `number - 1` without a seam."""
    clip = lzma.decompress(base64.b85decode("".join(TEST_CARD.split())))
    packets = [bytearray(clip[at : at + TS_PACKET]) for at in range(0, len(clip), TS_PACKET)]
    # Each loop advances a PID's continuity counter by its packets with a payload (2.4.3.3).
    counts = Counter(pid_of(packet) for packet in packets if packet[3] & 0x10)
    ticks = number * TEST_CARD_TICKS
    for packet in packets:
        counter = packet[3] + number * counts[pid_of(packet)]
        packet[3] = packet[3] & 0xF0 | counter & 0x0F
        if has_adaptation_flag(packet, PCR_FLAG):
            # The PCR has a base of 33 bits, and an extension that does not change (2.4.3.5).
            base, rest = divmod(int.from_bytes(packet[6:12], "big"), 1 << 15)
            base = (base + ticks) % TIMESTAMP_MODULUS
            packet[6:12] = (base << 15 | rest).to_bytes(6, "big")
        delay_timestamps(packet, ticks)
    return b"".join(packets)


# --------------------------------------------------------------------------------------------------
# ReaderBuffer: hands bytes and events from one thread to another
# --------------------------------------------------------------------------------------------------


class EventKind(enum.Enum):
    """The kinds of events that happen between bytes."""

    INIT = "an initialization section starts"
    START = "a segment starts"
    END = "the segment is complete"
    GAP = "the rest of the segment is missing"
    FILTERED = "a segment was left out on purpose"


@dataclass(frozen=True)
class SegmentEvent:
    """An event between two bytes of a stream."""

    kind: EventKind
    number: int  # media sequence number
    is_discontinuous: bool = False  # EXT-X-DISCONTINUITY precedes it
    duration: float | None = None  # seconds, from the playlist; None: it states none


class ReaderBuffer:
    """A bounded queue of bytes and segment events from one thread to another.

    The writing thread waits while the queue is full, which is the back-pressure on every download.
    Only the first end() counts.  streamlink requires write, wait_free, close, closed and event_used
    of a reader's buffer.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes; never changes
        # Set once media has arrived or never will; a muxed stream waits for it.
        self.event_used = threading.Event()
        # _lock guards everything below.
        self._lock = threading.Lock()
        # write() and wait_free() wait until there is room; take() and end() notify.
        self._not_full = threading.Condition(self._lock)
        # take() waits for an item; write(), put_event(), end() and wake() notify.
        self._not_empty = threading.Condition(self._lock)
        self._items: deque[bytes | SegmentEvent] = deque()  # not taken yet
        self._is_woken = False  # the waiting take(), or the next one, returns at once
        self.length = 0  # bytes not taken yet
        self.closed = False
        self.failure: str | None = None  # why the source broke off, once closed; None: it did not

    def __repr__(self) -> str:
        state = "open"
        if self.closed:
            state = self.failure or "complete"
        return f"<ReaderBuffer: {state}, {self.length} of {self.limit} bytes>"

    # The caller holds _lock

    def _has_room(self) -> bool:
        """Whether a writing thread need not wait; a closed buffer drops everything written."""
        return self.length < self.limit or self.closed

    def _has_news(self) -> bool:
        """Whether take() need not wait."""
        return bool(self._items) or self.closed or self._is_woken

    # The writing thread; streamlink's worker calls wait_free

    def write(self, data: bytes) -> None:
        """Append data; blocks without a limit while the buffer is full.  Drops data if closed."""
        if not data:
            return
        with self._lock:
            self._not_full.wait_for(self._has_room)
            if not self.closed:
                self._items.append(data)
                self.length += len(data)
                self._not_empty.notify()

    def put_event(self, event: SegmentEvent) -> None:
        """Append an event, even to a full buffer.  Drops it if closed.

        If a closed buffer took it, a segment whose bytes were dropped could seem complete.
        """
        with self._lock:
            if not self.closed:
                self._items.append(event)
                self._not_empty.notify()

    def wait_free(self, timeout: float | None = None) -> bool:
        """Block until there is room; streamlink loads the next playlist only then.

        Returns False after `timeout` seconds without room (None: no limit).
        """
        with self._lock:
            return self._not_full.wait_for(self._has_room, timeout)

    # Any thread

    def end(self, failure: str | None) -> None:
        """Close the buffer: the source broke off because of `failure`, or is complete (None).

        Items already in the buffer can still be taken.  Only the first call counts.
        """
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self.failure = failure
            self._not_full.notify_all()
            self._not_empty.notify_all()

    def close(self) -> None:
        """Close the buffer for streamlink, which gives no reason.

        If our own code knows the reason, it has already called end().
        """
        self.end(NO_MORE_SEGMENTS)

    def discard(self) -> None:
        """Close the buffer, and drop the items in it: no thread will take them."""
        self.end("closed")
        with self._lock:
            self._items.clear()
            self.length = 0

    # The taking thread

    def take(self, limit: int, timeout: float | None) -> list[bytes | SegmentEvent]:
        """Return the next items, about `limit` bytes at most; blocks until there are some.

        Returns an empty list after `timeout` seconds (None: no limit), after a wake(), or at the
        end.
        """
        items: list[bytes | SegmentEvent] = []
        size = 0
        with self._lock:
            self._not_empty.wait_for(self._has_news, timeout)
            self._is_woken = False
            while self._items and size < limit:
                item = self._items.popleft()
                items.append(item)
                if isinstance(item, bytes):
                    size += len(item)
            self.length -= size
            if self.length < self.limit:
                self._not_full.notify_all()
        return items

    # Any thread

    def wake(self) -> None:
        """Make the waiting take(), or the next one, return."""
        with self._lock:
            self._is_woken = True
            self._not_empty.notify()

    @property
    def is_exhausted(self) -> bool:
        """Whether the buffer is closed and all of its items were taken or dropped."""
        with self._lock:
            return self.closed and not self._items


Items = Generator[bytes | SegmentEvent, None, None]


def fill(buffer: Any, items: Items) -> None:
    """Write items into a buffer until it is closed, and end it after the last one.

    An error that the generator raises becomes the buffer's failure, and is not raised here.
    """
    try:
        with contextlib.closing(items):
            for item in items:
                if isinstance(item, SegmentEvent):
                    buffer.put_event(item)
                else:
                    buffer.write(item)
                if buffer.closed:
                    return
        buffer.end(None)
    except BaseException as error:
        buffer.end(explain(error))
        if not isinstance(error, PipeError):
            log.debug("a source broke off", exc_info=True)


# --------------------------------------------------------------------------------------------------
# Window: the newest blocks and segments of a channel, and the positions of its viewers in them
#
# Each viewer's thread takes blocks from here and sends them with a blocking call.  Rejected
# alternatives, tried or considered:
#   asyncio           streamlink uses threads, and one event loop for a thousand sockets takes as
#                     much CPU as the kernel's own wake-ups, all of it on a single core
#   a sending thread  one thread for all viewers (poll, then send) made more system calls per byte,
#                     and let a slow socket delay the others
#   sendfile          from memory files: 0.32 to 0.34 s of CPU per GB with 1,000 viewers, no less
#                     than blocking sends, and pages must not change while they are sent
# --------------------------------------------------------------------------------------------------

SEND_LIMIT = 1 * MIB  # bytes that a viewer takes at once, and thus holds besides the window
KEY_FRAME_BACK = 6.0  # seconds; libavformat reads 5 s of a stream before it shows a picture


@dataclass(eq=False)
class Viewer:
    """One response that receives a channel, with its position in the window; or a polling client.

    The window's lock guards the fields from `next` to `has_torn_segment`.  Only the viewer's own
    thread writes `sent` and `moved`.  A polling client may have several requests at once:
    channels.changed guards its `sent`; the requests may assign `moved` and `listed` without a lock,
    because it does not matter which of them is last.
    """

    address: str = ""
    agent: str = ""
    is_gone: Callable[[], bool] = lambda: False  # disconnected or silent; never blocks
    wanted: str = ""  # the quality requested; guarded by channels.changed, like the next field
    variant: str | None = None  # its channel's, if that was known when it was attached
    since: float = field(default_factory=time.monotonic)
    sent: int = 0  # bytes of media
    moved: float = field(default_factory=time.monotonic)  # when it last took a byte or polled
    next: int | None = 0  # number of the next block; None: it waits for a join point
    pending: list[Block] = field(default_factory=list)  # to be sent before that block
    is_waiting: bool = True  # for blocks, so it is not paused, however long ago it moved
    has_caught_up: bool = False  # it has taken the newest block at least once
    skips: int = 0  # how often it fell behind
    has_torn_segment: bool = False  # it got the start of a segment whose rest cannot follow
    polls: bool = False  # it is a polling client (HLS), which is in no window
    # A polling client that requested the page, or plays its media; guarded by channels.changed.
    has_page: bool = False
    listed: int | None = None  # number of the newest segment in the last playlist it got

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies a polling client: its requests have the same key."""
        return self.address, self.agent

    def __repr__(self) -> str:
        return f"<Viewer {self.address} next={self.next} sent={self.sent} skips={self.skips}>"


def _position(viewer: Viewer) -> int:
    """Return the number of a viewer's next block; the viewer must not wait for a join point."""
    assert viewer.next is not None
    return viewer.next


def viewer_label(address: str) -> str:
    """Return the name that the log uses for a viewer, or a refused one, at this address."""
    return f"viewer {address}"


# HLS: a window's newest complete segments, for polling clients (RFC 8216)

MAP_EXTENSION = "mp4"
PLAYLIST_TYPE = "application/vnd.apple.mpegurl"
LEAST_LISTED, MOST_LISTED = 3, 8  # segments; Chromium fails on a first playlist with two
LISTED_SECONDS = 24.0  # a playlist's least duration, if MOST_LISTED segments last that long
EPOCH = 1_735_689_600  # 2025-01-01, in Unix time
# The limits in seconds of a segment cut from a source without segments.  A segment far longer than
# those listed is left out, unless the one before it was left out for the same reason: a camera may
# send key frames more rarely at night.  A single one usually means that the clock was reset, or
# that media is missing.  It would raise the target duration for good, and clients would reload the
# playlist too rarely.
SHORTEST_CUT, LONGEST_CUT = 2.0, 12.0


def _seconds_since_epoch() -> int:
    """Seconds since EPOCH, or 0: a machine without a hardware clock starts with an earlier date."""
    return max(0, int(time.time() - EPOCH))


def _first_number() -> int:
    """Tenths of a second since EPOCH: above every number given before a restart of the server.

    Seconds might not be, because segments arrive faster than real time at a start.
    """
    return 10 * _seconds_since_epoch() + 1


@dataclass
class Numbering:
    """The numbers of a variant's next segment.  They only grow, even after a channel was closed.

    They start from the time, so a restarted server repeats none.  The time counts from EPOCH,
    because GStreamer and older televisions accept no number above 2^31, which this reaches in 2031.
    """

    number: int = field(default_factory=_first_number)
    discontinuities: int = field(default_factory=_seconds_since_epoch)


def timestamp_tag(seconds: float) -> bytes:
    """Return the ID3 tag with the timestamp of packed audio (3.4)."""
    ticks = round(seconds * 90_000) % TIMESTAMP_MODULUS
    content = b"com.apple.streaming.transportStreamTimestamp\0" + struct.pack(">Q", ticks)
    frame = b"PRIV" + struct.pack(">IH", len(content), 0) + content
    return b"ID3\4\0\0" + struct.pack(">I", len(frame)) + frame  # sizes below 128 need no encoding


@dataclass(frozen=True)
class HlsSegment:
    """A complete segment, as HLS clients see it.  It never changes, so readers need no lock."""

    number: int
    first: int  # number of its first block
    end: int  # number of the block after its last one
    size: int  # bytes
    duration: float  # seconds
    start_time: float  # seconds of all segments before it
    preamble: bytes  # what a decoder needs before it
    map_number: int  # number of the first segment with the same initialization section
    is_apart: bool  # it does not continue the segment before it
    discontinuities: int  # up to this segment, including its own


@dataclass(eq=False)
class Segment:
    """A run of blocks: a segment from the origin, or one that the window cuts at join points.

    The window's lock guards it.
    """

    first: int  # number of its first block
    duration: float | None = None  # seconds, as stated by the origin; None: not stated
    is_cut_here: bool = False  # the window cut it, because the source has no segments
    start: Join | None = None  # its first join point; None: unknown
    makeshift: Join | None = None  # its first picture, which depends on others


class Kept(NamedTuple):
    """A segment that left the playlist, but that clients may still request."""

    segment: HlsSegment
    until: float  # time.monotonic()


class NumberedPreamble(NamedTuple):
    """What a decoder needs before a segment, and the number of the first segment with it."""

    preamble: bytes
    number: int


@dataclass(frozen=True)
class Listed:
    """The content of a playlist."""

    segments: Sequence[HlsSegment]
    container: Container
    target_duration: int  # seconds
    is_complete: bool  # the source is complete, and the newest segment here is its last


class WindowEnd(enum.Enum):
    """How a window ended."""

    COMPLETE = "complete"  # the source truly ended; viewers take the rest
    BROKEN_OFF = "broken off"  # no more media arrives; viewers take the rest
    ABORTED = "aborted"  # viewers leave at once, even if they have not taken the rest


class Window:
    """A channel's newest blocks and segments: the feeder appends, viewers take, HLS lists.

    Blocks are numbered from 0 at the channel's start, so eviction does not change any viewer's
    position.  A viewer whose next block is older than the oldest one has fallen behind.

    The window keeps the newest `byte_limit` bytes.  Beyond them, it keeps the segments that late
    viewers need and, while a client polls, those that the client may request, as long as everything
    fits into `growth_factor` times `byte_limit`.
    """

    def __init__(
        self,
        byte_limit: int,
        *,
        paused_after: float = FOREMOST_PATIENCE,
        growth_factor: int = 1,
        live_edge: int = 3,
    ) -> None:
        # Set before the first viewer takes anything, and never changed after that.
        self.byte_limit = byte_limit
        self.paused_after = paused_after  # seconds without a byte until a viewer counts as paused
        self.growth_factor = growth_factor  # times `byte_limit`, to keep enough segments
        self.live_edge = live_edge  # segments that a new viewer gets at once, with the open one
        self.is_private = False  # it has one viewer, which may pause for as long as it likes
        self.can_skip = True  # a viewer that falls behind may continue at a later place

        # _lock guards everything below.
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)  # viewers wait for blocks or an end
        self._taken = threading.Condition(self._lock)  # the feeder waits for room
        self._list_changed = threading.Condition(self._lock)  # polling clients wait for a segment
        self._feeder_waits = False

        self._blocks: deque[Block] = deque()
        self._first = 0  # number of the oldest block
        self._size = 0  # bytes
        self._joins: deque[Join] = deque()
        self._next_joins: list[Join] = []  # join points in front of the next block
        self._segments: deque[Segment] = deque()
        self._open: Segment | None = None  # the newest segment, while it is not complete
        self._has_segments = False  # False: the source has none, the window cuts at join points
        self._first_needed: int | None = None  # oldest block to keep beyond `byte_limit`, if any
        self._viewers: dict[Viewer, None] = {}  # in the order of their arrival
        self._ending: WindowEnd | None = None  # None until it ends

        # HLS:
        self._numbering: Numbering | None = None  # None: segments are not listed, or no longer
        self._playlist: deque[HlsSegment] = deque()  # the listed segments; all their blocks exist
        self._kept: deque[Kept] = deque()  # segments that left the playlist; their blocks exist
        self._container = MPEG_TS
        self.target_duration = 1  # seconds; it only grows, so it may be read without the lock
        self._last_poll: float | None = None  # when a client last polled
        self._is_apart = True  # the next segment does not continue the one before it
        self._newest_map: NumberedPreamble | None = None
        self._clock = 0.0  # seconds of all numbered segments
        self._lacks_room = False  # for a segment, or for LEAST_LISTED of them
        self._is_last_odd = False  # the newest cut segment was far longer than those listed

    def __repr__(self) -> str:
        held = f"{self._first}+{len(self._blocks)} blocks, {self._size} bytes"
        segments = f"{len(self._segments)} segments, {len(self._viewers)} viewers"
        end = self._ending.value if self._ending else "open"
        return f"<Window {held}, {segments}, {end}>"

    # Feeder

    def make_private(self, byte_limit: int) -> None:
        """Hold `byte_limit` bytes at most, and wait for the one viewer instead of evicting.

        Called before the first block is appended.
        """
        self.byte_limit = min(byte_limit, self.byte_limit)
        self.growth_factor = 1
        self.is_private = True

    def offer_hls(self, container: Container, numbering: Numbering, target_duration: float) -> None:
        """Number and list complete segments from now on.

        No other window that is still fed may use `numbering`.  `target_duration`, in seconds, is
        the minimum that the playlist states.
        """
        with self._lock:
            if self._ending is WindowEnd.ABORTED:
                return
            self._container = container
            self._numbering = numbering
            self.target_duration = max(1, round(target_duration))

    def begin(self, duration: float | None = None, *, is_apart: bool = False) -> None:
        """Open a segment from the origin that starts with the next block.

        `duration`: seconds, or None if the origin states none.  `is_apart`: the segment does not
        continue the last one.
        """
        with self._lock:
            if self._open:
                self._break_off()
            self._use_makeshift()
            self._has_segments = True
            if is_apart:
                self._is_apart = True
            self._next_joins.clear()
            self._open = Segment(self._next, duration)
            self._segments.append(self._open)
            self._update_needed()

    def append(self, items: Iterable[Framed]) -> None:
        """Add blocks and the join points between them; evict the oldest blocks.

        Waits while the foremost viewer has not taken the block to evict.  _foremost_wait() says
        which viewer that is, and for how long.
        """
        with self._lock:
            for item in items:
                if isinstance(item, Join):
                    self._add_join(item)
                    continue
                self._make_room(len(item))
                if self._ending is WindowEnd.ABORTED:
                    return
                self._blocks.append(item)
                self._size += len(item)
                for join in self._next_joins:
                    self._place_join(join, self._next - 1)
                self._next_joins.clear()
            self._grown.notify_all()

    def finish(self, preamble: bytes) -> None:
        """Complete the open segment; `preamble` is what a decoder needs before it."""
        with self._lock:
            segment = self._open
            if segment is None:
                return
            seconds = segment.duration
            if seconds is None:
                seconds = float(self.target_duration)
            self._complete(segment, self._next, seconds, preamble)

    def break_off(self) -> None:
        """Abandon the open segment as incomplete; the next one does not continue the last."""
        with self._lock:
            self._break_off()

    def leave_segments(self) -> None:
        """Expect bytes without segments, after a seam: viewers start at key frames."""
        with self._lock:
            self._break_off()
            self._has_segments = False
            for segment in self._segments:
                segment.start = None
                segment.makeshift = None
            self._update_needed()

    def list_rest(self, dts: int | None) -> None:
        """List the rest of a source without segments that has ended.  `dts` is its last DTS."""
        with self._lock:
            segment = self._open
            if segment and segment.is_cut_here:
                seconds = self._seconds_to(dts)
                if seconds is not None and 0 < seconds < LONGEST_CUT:
                    self._complete_cut(segment, self._next, seconds)

    def end(self, is_complete: bool) -> None:
        """End the window: viewers take the rest, then take() raises WindowEnded.  Idempotent.

        Listed segments stay until close_hls().
        """
        with self._lock:
            if is_complete:
                self._end_as(WindowEnd.COMPLETE)
            else:
                self._end_as(WindowEnd.BROKEN_OFF)

    def close_hls(self) -> None:
        """Stop listing and numbering: await_listed() and listed() raise WindowEnded."""
        with self._lock:
            self._numbering = None
            self._free_if_unused()
            self._list_changed.notify_all()

    def abort(self) -> None:
        """Like end() and close_hls(), but viewers leave at once.  May be called from any thread."""
        with self._lock:
            self._numbering = None
            self._end_as(WindowEnd.ABORTED)
            self._taken.notify_all()

    def _end_as(self, ending: WindowEnd) -> None:
        """End the window in this way.  Only the first call counts, but an abort overrides it."""
        if self._ending is None or ending is WindowEnd.ABORTED:
            self._ending = ending
        self._free_if_unused()
        self._grown.notify_all()
        self._list_changed.notify_all()

    @property
    def _next(self) -> int:
        """The number of the next block to be appended."""
        return self._first + len(self._blocks)

    def _add_join(self, join: Join) -> None:
        """Take a join point in front of the next block, or at the start of the open segment.

        It takes effect once the block to start with is in the window.
        """
        if join.at_start and self._open and self._open.first < self._next:
            self._place_join(join, self._open.first)
        else:
            self._next_joins.append(join)

    def _place_join(self, join: Join, block: int) -> None:
        """Remember that a decoder can start with this block, unless it was evicted."""
        if block < self._first:
            return
        join.block = block
        segment = self._open
        if join.is_makeshift:
            if segment and not segment.makeshift:
                segment.makeshift = join
            return
        self._joins.append(join)
        if not self._has_segments:
            self._cut_at(join)
        elif segment and not segment.start:
            segment.start = join
            self._update_needed()

    def _use_makeshift(self) -> None:
        """Use the first picture of the newest segment as its start if it has no key frame."""
        if not self._segments:
            return
        segment = self._segments[-1]
        join = segment.makeshift
        if join and not segment.start and join.block >= self._first:
            segment.start = join
            self._joins.append(join)

    def _break_off(self) -> None:
        """Like break_off(); the caller holds _lock."""
        if self._open and not self.can_skip:
            self._remove_open(self._open)
        self._next_joins.clear()
        self._open = None
        self._is_apart = True
        self._update_needed()

    def _remove_open(self, segment: Segment) -> None:
        """Remove the blocks of the open segment, whose rest will not arrive.

        In fMP4 they end within a box.  A player would take the missing bytes of that box from the
        following segments, and would never find another box.  So viewers that have some of these
        blocks are disconnected, and the others continue with the next segment.
        """
        for viewer in tuple(self._viewers):
            if viewer.next is not None and viewer.next > segment.first:
                viewer.has_torn_segment = True
                del self._viewers[viewer]
        while self._blocks and self._next > segment.first:
            self._size -= len(self._blocks.pop())
        while self._joins and self._joins[-1].block >= segment.first:
            self._joins.pop()
        if self._segments and self._segments[-1] is segment:  # it is not after abort()
            self._segments.pop()
        self._grown.notify_all()

    # Segments that the window cuts at join points; their DTS give the durations

    def _cut_at(self, join: Join) -> None:
        """End the open segment before this join point, and open the next one there."""
        if join.dts is None or self._numbering is None:
            return
        segment = self._open
        seconds = self._seconds_to(join.dts)
        was_odd = self._is_last_odd
        is_odd = seconds is not None and self._is_odd(seconds)
        if is_odd and not was_odd:
            self._is_apart = True
        elif segment and seconds is not None and self._can_end_at(segment, join, seconds):
            if seconds < SHORTEST_CUT:
                return
            self._complete_cut(segment, join.block, seconds)
        else:
            self._is_apart = True
        self._is_last_odd = is_odd
        self._open = Segment(join.block, is_cut_here=True, start=join)
        self._segments.append(self._open)
        self._update_needed()

    def _can_end_at(self, segment: Segment, join: Join, seconds: float) -> bool:
        """Whether a segment that lasts this long starts and ends at join points of one kind."""
        if segment.start is None:
            return False
        if seconds >= LONGEST_CUT:
            passed = join.time - segment.start.time
            if seconds > KEY_FRAME_LIFE or passed < seconds / 2:
                return False
        return segment.start.is_key_frame is join.is_key_frame

    def _is_odd(self, seconds: float) -> bool:
        """Whether a segment of this length is far longer than those that are listed."""
        is_long = seconds >= LONGEST_CUT and seconds > 2 * self.target_duration
        return is_long and bool(self._playlist)

    def _complete_cut(self, segment: Segment, end: int, seconds: float) -> None:
        preamble = segment.start.preamble if segment.start else b""
        self._complete(segment, end, seconds, preamble)

    def _seconds_to(self, dts: int | None) -> float | None:
        """Return the seconds from the start of the open segment; None if a DTS is missing."""
        if dts is None or self._open is None or self._open.start is None:
            return None
        begun = self._open.start.dts
        if begun is None:
            return None
        ticks = (dts - begun) % TIMESTAMP_MODULUS
        return ticks / 90_000

    # The segments of the HLS playlist

    def _complete(self, segment: Segment, end: int, seconds: float, preamble: bytes) -> None:
        """End the open segment before block `end`, and list it if the window still has all of it.

        `seconds` is its duration.
        """
        self._open = None
        is_whole = segment.first >= self._first
        if self._numbering and is_whole and segment.first < end:
            numbered = self._number(segment.first, end, seconds, preamble, self._numbering)
            self._playlist.append(numbered)
            self._trim_list()
            self._is_apart = False
            self._list_changed.notify_all()
        else:
            self._is_apart = True
        if not is_whole:
            self._lacks_room = True
        elif len(self._playlist) >= LEAST_LISTED:
            self._lacks_room = False
        self._update_needed()

    def _number(
        self, first: int, end: int, seconds: float, preamble: bytes, numbering: Numbering
    ) -> HlsSegment:
        """Give the next number to the segment of the blocks from `first` up to `end`."""
        number = numbering.number
        if self._is_apart:
            numbering.discontinuities += 1
        if self._newest_map is None or self._newest_map.preamble != preamble:
            self._newest_map = NumberedPreamble(preamble, number)
        segment = HlsSegment(
            number=number,
            first=first,
            end=end,
            size=sum(len(block) for block in self._blocks_between(first, end)),
            duration=seconds,
            start_time=self._clock,
            preamble=preamble,
            map_number=self._newest_map.number,
            is_apart=self._is_apart,
            discontinuities=numbering.discontinuities,
        )
        numbering.number += 1
        self._clock += seconds
        self.target_duration = max(self.target_duration, int(seconds + 0.5))
        return segment

    def _trim_list(self) -> None:
        """Move old segments off the playlist; keep each for the playlist's duration (6.2.2)."""
        while len(self._playlist) > LEAST_LISTED and self._is_list_too_long():
            seconds = sum(segment.duration for segment in self._playlist)
            oldest = self._playlist.popleft()
            self._kept.append(Kept(oldest, time.monotonic() + seconds))

    def _is_list_too_long(self) -> bool:
        """Whether the playlist is long enough without its oldest segment, or too large with it.

        It is too large if the window has no room for as many segments again and the open one.
        """
        if len(self._playlist) > MOST_LISTED:
            return True
        seconds = sum(segment.duration for segment in self._playlist)
        if seconds - self._playlist[0].duration >= LISTED_SECONDS:
            return True
        listed_size = sum(segment.size for segment in self._playlist)
        open_size = self._playlist[-1].size  # an estimate: the size of the newest complete one
        return 2 * listed_size + open_size > self.growth_factor * self.byte_limit

    # Eviction

    def _make_room(self, size: int) -> None:
        """Evict the oldest blocks until `size` more bytes fit; wait for the foremost viewer.

        Needed blocks stay as long as everything fits into `growth_factor` times `byte_limit`.
        """
        while self._blocks and self._size + size > self.byte_limit:
            if self._ending is WindowEnd.ABORTED:
                return
            is_needed = self._first_needed is not None and self._first >= self._first_needed
            if is_needed and self._size + size <= self.growth_factor * self.byte_limit:
                return
            wait = self._foremost_wait()
            if wait <= 0:
                self._evict()
            else:
                self._grown.notify_all()  # so that viewers take the blocks to evict
                self._feeder_waits = True
                self._taken.wait(min(wait, FEEDER_TICK))
                self._feeder_waits = False

    def _update_needed(self) -> None:
        """Decide which blocks to keep beyond `byte_limit`.

        These are the segments that a new viewer gets at once, with one before and one after them.
        While a client polls, they are also the segments that it may request, and the open one.
        """
        needed: list[int] = []
        starts = self._starts()
        count = self.live_edge + 2
        if len(starts) >= count:
            needed.append(starts[-count].block)
        elif starts:
            needed.append(0)  # with fewer starts, keep everything that fits
        if self._numbering and self._is_polled:
            first_requested = self._first_requested()
            if first_requested is not None:
                needed.append(first_requested)
        self._first_needed = min(needed, default=None)

    def _first_requested(self) -> int | None:
        """Return the first block that a polling client may request, now or soon, or None."""
        now = time.monotonic()
        for kept in self._kept:
            if kept.until > now:
                return kept.segment.first
        if self._playlist:
            return self._playlist[0].first
        if self._open and self._open.first >= self._first:
            return self._open.first
        return None

    def _starts(self) -> list[Join]:
        """Return the first join point of each of the origin's segments, if still in the window."""
        starts = []
        for segment in self._segments:
            join = segment.start
            if join and not segment.is_cut_here and join.block >= self._first:
                starts.append(join)
        return starts

    @property
    def _is_polled(self) -> bool:
        """Whether a client polled within the longest time that a segment is listed and kept."""
        if self._last_poll is None:
            return False
        return time.monotonic() - self._last_poll <= 2.0 * MOST_LISTED * self.target_duration

    def _foremost_wait(self) -> float:
        """Return the seconds to wait until a viewer takes the oldest block; 0 or less: evict it.

        1. There are no viewers, or all wait for a join point: do not wait.
        2. All are paused, or behind everything that polling clients may request from the playlist:
           do not wait; they skip later.
        3. Some have caught up with the newest block once: wait for the foremost of these; those
           behind it must keep up.  A late viewer, which starts further ahead, is not one of these
           until it has caught up, so no other viewer loses bytes because of it.
        4. None has, as at a start or in a burst: wait for the one that arrived first.
        5. That viewer has already taken the oldest block: do not wait.
        """
        now = time.monotonic()
        foremost = self._foremost(now)
        if foremost is None or _position(foremost) > self._first:
            return 0
        if self.is_private:
            return FEEDER_TICK  # then the window asks again
        if foremost.is_waiting:
            return self.paused_after
        return foremost.moved + self.paused_after - now

    def _foremost(self, now: float) -> Viewer | None:
        """Return the viewer of _foremost_wait()'s case 3 or 4; None in cases 1 and 2."""
        needed_from = 0
        if self._playlist and self._is_polled:  # a slow viewer must not delay the polling clients
            needed_from = self._playlist[0].first
        taking = []
        for viewer in self._viewers:
            if viewer.next is None or viewer.next < needed_from:
                continue
            if not self._is_paused(viewer, now):
                taking.append(viewer)
        caught_up = [viewer for viewer in taking if viewer.has_caught_up]
        if caught_up:
            return max(caught_up, key=_position)
        return taking[0] if taking else None

    def _is_paused(self, viewer: Viewer, now: float) -> bool:
        """Whether the viewer has taken no byte for `paused_after` seconds, although it could."""
        if self.is_private or viewer.is_waiting:
            return False
        return now - viewer.moved >= self.paused_after

    def _evict(self) -> None:
        """Evict the oldest block, and every join point and listed segment that began with it."""
        self._size -= len(self._blocks.popleft())
        self._first += 1
        while self._joins and self._joins[0].block < self._first:
            self._joins.popleft()
        while self._kept and self._kept[0].segment.first < self._first:
            self._kept.popleft()
        while self._playlist and self._playlist[0].first < self._first:
            self._playlist.popleft()
            if len(self._playlist) < LEAST_LISTED and self._is_polled:
                self._lacks_room = True
        while self._segments and self._is_outdated(self._segments[0]):
            self._segments.popleft()
        if self._first_needed is not None and self._first_needed < self._first:
            self._update_needed()

    def _is_outdated(self, segment: Segment) -> bool:
        """Whether viewers can no longer start in a segment."""
        if segment is self._open or segment.first >= self._first:
            return False
        return segment.start is None or segment.start.block < self._first

    # Viewers

    def enter(self, viewer: Viewer) -> None:
        """Attach a viewer at a join point, or at block 0 before the first block is appended.

        Its thread must call take() at once: until then, a full window waits for it.
        """
        with self._lock:
            viewer.next = 0
            viewer.pending = []
            viewer.has_caught_up = False
            viewer.is_waiting = True
            viewer.moved = time.monotonic()
            self._viewers[viewer] = None
            has_begun = self._next > 0
            if has_begun:
                self._seek(viewer)

    def leave(self, viewer: Viewer) -> None:
        """Detach a viewer, from any thread: its take() raises ViewerGone.  Idempotent."""
        with self._lock:
            self._viewers.pop(viewer, None)
            viewer.pending = []
            self._free_if_unused()
            self._taken.notify_all()
            if viewer.is_waiting:
                self._grown.notify_all()

    def take(self, viewer: Viewer, timeout: float | None) -> list[Block]:
        """Return the next blocks, SEND_LIMIT bytes of them at most; waits until there are some.

        Returns an empty list after `timeout` seconds (None: no limit).  A viewer that fell behind
        continues where a new one would start.  Raises WindowEnded after the last block, and
        ViewerGone if the viewer was detached or cannot continue.
        """
        with self._lock:
            viewer.is_waiting = True
            self._grown.wait_for(lambda: self._has_news(viewer), timeout)
            viewer.is_waiting = False
            if viewer.has_torn_segment:
                raise ViewerGone("got half a segment", label="torn")
            if viewer not in self._viewers:
                raise ViewerGone
            if self._ending is not None and self._has_ended_for(viewer):
                raise WindowEnded(is_complete=self._ending is WindowEnd.COMPLETE)
            if viewer.next is None:
                self._seek(viewer)
            elif viewer.next < self._first:
                if not self.can_skip:
                    raise ViewerGone("fell behind", label="fell behind")
                viewer.skips += 1
                self._seek(viewer)
            return self._gather(viewer)

    def _has_news(self, viewer: Viewer) -> bool:
        """Whether take() need not wait: there is a block or an end, or the viewer was detached."""
        if self._ending is not None or viewer not in self._viewers:
            return True
        return self._has_more(viewer)

    def _has_ended_for(self, viewer: Viewer) -> bool:
        """Whether a window that has ended has nothing more for this viewer."""
        return self._ending is WindowEnd.ABORTED or not self._has_more(viewer)

    def _has_more(self, viewer: Viewer) -> bool:
        """Whether the window has bytes that the viewer has not taken."""
        if viewer.next is None:
            return self._choose_join() is not None
        return viewer.next < self._next or len(viewer.pending) > 0

    def _gather(self, viewer: Viewer) -> list[Block]:
        """Take the viewer's pending bytes and its next blocks."""
        viewer.moved = time.monotonic()
        taken = viewer.pending
        viewer.pending = []
        size = 0
        for block in taken:
            size += len(block)
        end = self._next
        while viewer.next is not None and viewer.next < end and len(taken) < SEND_BLOCKS:
            block = self._blocks[viewer.next - self._first]
            if taken and size + len(block) > SEND_LIMIT:
                break
            taken.append(block)
            size += len(block)
            viewer.next += 1
        if viewer.next == end:
            viewer.has_caught_up = True
        if self._feeder_waits:
            self._taken.notify_all()
        return taken

    def _seek(self, viewer: Viewer) -> None:
        """Move a viewer to the join point for new viewers, or let it wait for one."""
        join = self._choose_join()
        viewer.next = None
        viewer.pending = []
        if join:
            viewer.next = join.block
            if join.preamble:
                viewer.pending.append(join.preamble)

    def _choose_join(self) -> Join | None:
        """Return the join point for new viewers, or None.

        It is `live_edge` segments back.  Without segments, it is at a recent key frame, or if there
        is none, at any picture or frame.  Of several such points, it is the newest that is at least
        KEY_FRAME_BACK seconds old, or else the oldest.
        """
        starts = self._starts()
        if starts:
            back = min(self.live_edge, len(starts))
            return starts[-back]
        now = time.monotonic()
        joins = [
            join for join in self._joins if join.is_key_frame and now - join.time < KEY_FRAME_LIFE
        ]
        if not joins:
            joins = [join for join in self._joins if not join.is_key_frame]
        old_enough = [join for join in joins if join.time <= now - KEY_FRAME_BACK]
        if old_enough:
            return old_enough[-1]
        return joins[0] if joins else None

    def _free_if_unused(self) -> None:
        """Free the blocks once nothing will take them, without waiting for garbage collection."""
        is_used = len(self._viewers) > 0 or self._numbering is not None
        if self._ending is WindowEnd.ABORTED or (self._ending is not None and not is_used):
            self._first = self._next
            self._size = 0
            self._blocks.clear()
            self._joins.clear()
            self._segments.clear()
            self._playlist.clear()
            self._kept.clear()

    # Polling clients (HLS)

    def await_listed(self, had: int | None, timeout: float) -> bool:
        """Wait until a playlist has a segment after number `had`, for at most `timeout` seconds.

        `had` is None for a client that has no segment yet.  Returns whether there is a newer one,
        and True if the source is complete.  Raises WindowEnded after close_hls().
        """
        with self._lock:
            self._note_poll()
            self._list_changed.wait_for(lambda: self._has_answer(had), timeout)
            if self._numbering is None:
                raise WindowEnded(is_complete=False)
            return self._has_newer(had)

    def _has_answer(self, had: int | None) -> bool:
        """Whether await_listed() need not wait."""
        return self._numbering is None or self._has_newer(had)

    def _has_newer(self, had: int | None) -> bool:
        if self._ending is WindowEnd.COMPLETE:
            return True
        if len(self._playlist) < LEAST_LISTED:
            return False
        return had is None or self._playlist[-1].number > had

    def listed(self) -> Listed:
        """Return the content of the playlist; raises WindowEnded if no segment is listed."""
        with self._lock:
            self._note_poll()
            if self._numbering is None or not self._playlist:
                raise WindowEnded(is_complete=False)
            is_complete = self._ending is WindowEnd.COMPLETE
            segments = tuple(self._playlist)
            return Listed(segments, self._container, self.target_duration, is_complete)

    def find(self, number: int, extension: str) -> list[Block]:
        """Return the blocks of a segment or an initialization section; empty if there is none."""
        with self._lock:
            self._note_poll()
            if self._numbering is None:
                return []
            is_media = extension == self._container.extension
            is_map = self._container.has_map and extension == MAP_EXTENSION
            kept = [each.segment for each in self._kept]
            for segment in (*kept, *self._playlist):
                if is_media and segment.number == number:
                    return self._media_of(segment)
                if is_map and segment.map_number == number:
                    return [segment.preamble]
        return []

    def _note_poll(self) -> None:
        was_polled = self._is_polled
        self._last_poll = time.monotonic()
        if not was_polled:
            self._update_needed()

    def _media_of(self, segment: HlsSegment) -> list[Block]:
        """Return a segment's blocks, preceded by what a decoder needs."""
        blocks = self._blocks_between(segment.first, segment.end)
        if self._container.has_map:
            return blocks
        if self._container.is_packed_audio:
            if 0 < len(segment.preamble) < TAG_LIMIT:
                return [segment.preamble, *blocks]
            return [timestamp_tag(segment.start_time), *blocks]
        first_packet = bytes(blocks[0][:3])
        starts_with_tables = len(first_packet) == 3 and pid_of(first_packet) == 0
        if starts_with_tables:
            return blocks
        return [segment.preamble, *blocks]

    def _blocks_between(self, first: int, end: int) -> list[Block]:
        """Return the blocks from `first` to before `end`; islice() is faster than indexing."""
        return list(itertools.islice(self._blocks, first - self._first, end - self._first))

    @property
    def lacks_room(self) -> bool:
        """Whether the window was too small for a segment, or for LEAST_LISTED segments."""
        with self._lock:
            return self._lacks_room

    # Any thread

    def held(self) -> tuple[int, float]:
        """Return the bytes in the window, and the approximate age of the oldest one in seconds."""
        with self._lock:
            if not self._joins:
                return self._size, 0.0
            return self._size, time.monotonic() - self._joins[0].time


def media_playlist(window: Window, name: str, tail: str, had: int | None = None) -> tuple[int, str]:
    """Return the newest segment number in the media playlist, and the playlist's text.

    `tail` is the query of all addresses in it.  The addresses are relative, so they work behind
    any proxy.

    A client that has seen segment `had` gets at most LEAST_LISTED newer segments.  Given more, as
    after an outage, Chromium jumps to the last three, and then fails at the gap before them.

    Raises WindowEnded if no segment is listed.
    """
    listed = window.listed()
    segments = listed.segments
    has_end = listed.is_complete
    if had is not None and had >= segments[0].number - 1:
        newest = had + LEAST_LISTED
        if segments[-1].number > newest:
            has_end = False
            segments = [segment for segment in segments if segment.number <= newest]

    first = segments[0]
    container = listed.container
    version = 6 if container.has_map else 3
    discontinuities_before = first.discontinuities
    if first.is_apart:
        discontinuities_before -= 1
    lines = [
        "#EXTM3U",
        f"#EXT-X-VERSION:{version}",
        f"#EXT-X-TARGETDURATION:{listed.target_duration}",
        f"#EXT-X-MEDIA-SEQUENCE:{first.number}",
        f"#EXT-X-DISCONTINUITY-SEQUENCE:{discontinuities_before}",
    ]

    map_number: int | None = None
    for segment in segments:
        if segment.is_apart:
            lines.append("#EXT-X-DISCONTINUITY")
        if container.has_map and segment.map_number != map_number:
            map_number = segment.map_number
            lines.append(f'#EXT-X-MAP:URI="{name}/{map_number}.{MAP_EXTENSION}{tail}"')
        lines.append(f"#EXTINF:{segment.duration:.3f},")
        lines.append(f"{name}/{segment.number}.{container.extension}{tail}")
    if has_end:
        lines.append("#EXT-X-ENDLIST")
    text = "\n".join(lines) + "\n"
    return segments[-1].number, text


# --------------------------------------------------------------------------------------------------
# Download: one body, passed on as it arrives and resumed if it breaks off
# --------------------------------------------------------------------------------------------------

PART_LIMIT = 256 * KIB  # bytes of one read; larger reads save little and delay the first
CODED_PART_LIMIT = 4 * KIB  # the same if compressed: urllib3 up to 2.5 decodes all that it reads
BODY_LIMIT = 8 * MIB  # bytes of a body that are buffered; the rest stays at the origin
SLOW_TIME = 2.0  # seconds spent waiting for a body before its rate is judged
LEAST_WAIT = 0.001  # seconds; the minimum wait for a rate, because a body may be there at once
LEAST_TIMEOUT = 0.1  # seconds; the minimum time-out of a request: libraries refuse zero and less
RETRY_PAUSES = (0.1, 0.2, 0.4, 0.8)  # seconds; the last one repeats
SAMPLE_STEP = 64  # bytes from one sampled byte of a Fingerprint to the next


@dataclass
class Fingerprint:
    """A checksum of the first bytes of a body, to recognize them when they are sent again.

    It covers one byte in SAMPLE_STEP: different media differs in nearly all bytes, and a checksum
    of all of them would cost 0.4 s of CPU per GB, a fifth of the CPU for pulling it.
    """

    size: int = 0  # bytes
    value: int = 0

    def add(self, data: bytes) -> None:
        first_sample = -self.size % SAMPLE_STEP  # its position in `data`
        self.value = zlib.crc32(data[first_sample::SAMPLE_STEP], self.value)
        self.size += len(data)


class Repeat:
    """Compares bytes that are sent a second time, and finds where the new bytes begin."""

    def __init__(self, had: Fingerprint) -> None:
        self._had = replace(had)  # a copy: the original may grow meanwhile
        self._again = Fingerprint()

    @property
    def is_whole(self) -> bool:
        """Whether all the earlier bytes were sent again."""
        return self._again.size == self._had.size

    def pass_on(self, data: bytes) -> bytes | None:
        """Return the new bytes of `data`; None if the repeated bytes differ from the earlier ones.

        A difference is noticed only after all the earlier bytes were sent again.
        """
        left = self._had.size - self._again.size
        self._again.add(data[:left])
        if self.is_whole and self._again != self._had:
            return None
        return data[left:]


def pauses(seconds: Sequence[float]) -> Iterator[float]:
    """Yield each of these pauses, then repeat the last one forever."""
    yield from seconds
    while True:
        yield seconds[-1]


class DownloadError(PipeError):
    """A body, or the rest of it, cannot be fetched."""


class DecryptionError(PipeError):
    """A body was fetched, but it cannot be decrypted."""


Opened = tuple[requests.Response, bytes]  # a response, and the bytes already read of its body


class Tries(NamedTuple):
    """The history of a download's tries.  Times are those of time.monotonic(); 0: not yet."""

    began: float = 0.0  # when the first try began
    asked: float = 0.0  # when the newest try began
    answered: float = 0.0  # when the newest try that was answered with media began
    failure: str | None = None  # why the newest try failed; None: it did not, or not yet
    failing_since: float = 0.0  # when the first of the successive tries with this failure began
    failed: float = 0.0  # when the failure of that first try was noticed

    @property
    def has_begun(self) -> bool:
        """Whether there was a try."""
        return self.began > 0

    @property
    def was_answered(self) -> bool:
        """Whether one of the tries was answered with media."""
        return self.answered > 0

    def ask(self) -> Tries:
        """The history once another try has begun."""
        now = time.monotonic()
        if not self.has_begun:
            return self._replace(began=now, asked=now)
        return self._replace(asked=now)

    def answer(self) -> Tries:
        """The history once the newest try was answered with media."""
        return self._replace(answered=self.asked, failure=None)

    def fail(self, reason: str) -> Tries:
        """The history once the newest try has failed.

        It is unchanged if the try received media before it broke off, or failed like the last one.
        """
        if self.answered == self.asked or self.failure == reason:
            return self
        now = time.monotonic()
        return self._replace(failure=reason, failing_since=self.asked, failed=now)


class Pace(NamedTuple):
    """How fast the bytes of a try arrive."""

    size: int = 0  # bytes, including those that an earlier try had received
    waited: float = 0.0  # seconds that the download waited for them

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.size / max(self.waited, LEAST_WAIT)


class Download:
    """Fetches one body, retrying until it is complete, and never yields a byte twice.

    `request` sends a request with additional headers and a time-out in seconds.  No try begins once
    `closing` is set.  `patience` returns the seconds without a new byte after which the download is
    abandoned.  `trusts_length`: if the length is the same, the resource counts as unchanged, so the
    rest can be requested even without a validator.  Panels send none for films.
    """

    # For how many seconds an empty body is requested again; None: the body may be empty.
    empty_time: float | None = None
    cipher_block = 1  # bytes; an encrypted body is a multiple of this

    def __init__(
        self,
        request: Callable[[Mapping[str, str], float], requests.Response],
        closing: threading.Event,
        patience: Callable[[], float],
        byte_range: Any = None,  # streamlink's
        opened: Opened | None = None,
        trusts_length: bool = False,
    ) -> None:
        self._request = request
        self._closing = closing
        self._patience = patience
        # The range to fetch: its position in the resource and its size; None: to the end.
        self._first = 0
        self._range_size: int | None = None
        if byte_range:
            self._first = byte_range.offset or 0  # EXT-X-MAP may omit an offset of 0
            self._range_size = byte_range.range
        self._opened = opened  # the first response, if there is one already
        self._received = Fingerprint()
        self._moved = 0.0  # when the newest byte was passed on, or the first try began
        # The download's thread replaces these two values.  Other threads read each of them once per
        # decision, so that none sees half of a change.
        self.tries = Tries()
        self._pace = Pace()  # of the newest try
        self._slow_time = SLOW_TIME  # seconds of waiting after which a slow try is ended
        self._is_hurried = False  # the newest try has less time than the others, as the last one
        self._validator: str | None = None  # for If-Range; None: there is none, or it is not used
        self._trusts_length = trusts_length
        self._length: str | None = None  # of the whole resource, if it is trusted
        # Bytes of the whole resource; None until a partial response states them.
        self._resource_size: int | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.size} bytes received, failure: {self.tries.failure}>"

    @property
    def size(self) -> int:
        """Bytes received so far."""
        return self._received.size

    @property
    def rate(self) -> float:
        """Bytes per second that the origin sent in the newest try."""
        return self._pace.rate

    def is_hopeless(self) -> bool:
        """Whether another try would be useless."""
        return False

    def is_slow(self) -> bool:
        """Whether the body arrives so slowly that another connection may be faster."""
        return False

    def parts(self) -> Generator[bytes, None, None]:
        """Yield the bytes as they arrive; raises DownloadError if the rest cannot be fetched."""
        self._moved = time.monotonic()
        for pause in pauses(RETRY_PAUSES):
            self.tries = self.tries.ask()
            try:
                response, start = self._open()
                with contextlib.closing(response):
                    yield from self._new_parts(response, start)
                return
            except DownloadError:
                raise
            except Exception as error:  # of requests, urllib3, streamlink or the system
                log.debug("a download broke off", exc_info=True)
                reason = explain(error)
                refusal = range_refusal(error)
                if refusal is not None:
                    self._must_begin_again()
                    if self._has_all(refusal):
                        if not self._is_cut_off:
                            return
                        reason = CUT_SEGMENT
                self._note_failed_try(reason, pause)
            if self._closing.wait(pause):
                raise DownloadError("closed")

    def _note_failed_try(self, reason: str, pause: float) -> None:
        """Note a failed try; raises DownloadError if another one after this pause is useless.

        If a try had too little time, the failure before it still counts.
        """
        if reason == TIMED_OUT and self._is_hurried and self.tries.failure:
            reason = self.tries.failure
        self.tries = self.tries.fail(reason)
        is_late = time.monotonic() + pause - self._moved > self._patience()
        if is_late or self.is_hopeless():
            raise DownloadError(reason)

    @property
    def _is_cut_off(self) -> bool:
        """Whether the body ended within a cipher block; a byte range is judged by its length."""
        return self._range_size is None and self.size % self.cipher_block != 0

    def _has_all(self, refusal: requests.Response) -> bool:
        """Whether a refused range would have begun at the body's end, so that nothing is missing.

        The origin had announced too large a length.
        """
        if self.size == 0:
            return False
        end = self._first + self.size
        return refusal.headers.get("Content-Range") == f"bytes */{end}"

    def _must_begin_again(self) -> None:
        """Request the whole body from now on."""
        self._validator = None
        self._length = None
        self._resource_size = None

    @property
    def _next_position(self) -> int:
        """The position in the resource of the first byte to request.

        Without a validator or a length, the rest might belong to a different body.
        """
        if self._validator or self._length:
            return self._first + self.size
        return self._first

    def _open(self) -> Opened:
        """Request the body, or only the rest of it if that is possible."""
        opened = self._opened
        self._opened = None
        if opened:
            return opened

        headers = {}
        first = self._next_position
        if first > self._first and self._validator:
            headers["If-Range"] = self._validator  # RFC 9110, 13.1.5: if it changed, send it all
        if self._range_size is not None:
            last = self._first + self._range_size - 1
            headers["Range"] = f"bytes={first}-{last}"
        elif first > 0:
            headers["Range"] = f"bytes={first}-"

        # One request may take half of the patience, so that another one can follow.
        patience = self._patience()
        left = self._moved + patience - time.monotonic()
        self._is_hurried = left < patience / 2
        timeout = max(LEAST_TIMEOUT, min(patience / 2, left))
        response = self._request(headers, timeout)
        return response, b""

    def _read_head(self, response: requests.Response) -> int:
        """Note the length and the validator of a response.

        Returns its offset in bytes from our range: negative if it starts before that.  Raises
        PipeError if the range is neither the requested one nor the whole resource.
        """
        position: int | None = 0  # of the response in the resource; None: unusable
        is_coded = response.headers.get("Content-Encoding", "identity") != "identity"
        if response.status_code == HTTPStatus.PARTIAL_CONTENT:
            position = None
            sent = response.headers.get("Content-Range", "")
            match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", sent)
            # A part of a compressed body is useless: our positions count decompressed bytes.
            if match and not is_coded:
                position = int(match[1])
            if match and self._length and match[2] != self._length:
                position = None
            if match and match[2] != "*" and self._range_size is None:
                self._resource_size = int(match[2])
        if position is None or position not in (0, self._next_position):
            self._must_begin_again()
            raise PipeError("the origin sent a different range than requested")

        if self.size == 0 and not is_coded:
            etag = response.headers.get("ETag", "")
            is_weak = etag.startswith("W/")
            if etag and not is_weak:
                self._validator = etag
            else:
                self._validator = response.headers.get("Last-Modified")
            if self._trusts_length and position == 0:
                self._length = response.headers.get("Content-Length")
        return position - self._first

    def _new_parts(self, response: requests.Response, start: bytes) -> Iterator[bytes]:
        """Yield the new bytes of a response; `start` has its first bytes, already read."""
        offset = self._read_head(response)
        to_skip = max(0, -offset)  # bytes in front of our range
        parts = parts_of(response, PART_LIMIT, start)
        if offset > 0:  # the rest of a body; its start was checked in an earlier try
            repeat = Repeat(Fingerprint())
        else:
            repeat = Repeat(self._received)
            parts = media_parts(parts)

        self._pace = Pace()
        while self.size != self._range_size:
            part = self._wait_for(parts)
            if not part:
                break
            # Only media counts as an answer: media_parts() has raised an error for a page or text.
            if self.tries.answered != self.tries.asked:
                self.tries = self.tries.answer()
            if to_skip:
                skipped = min(to_skip, len(part))
                part = part[skipped:]
                to_skip -= skipped
            new = repeat.pass_on(part)
            if new is None:
                raise DownloadError("the body changed between two requests")
            if self._range_size is not None:
                new = new[: self._range_size - self.size]
            if new:
                self._received.add(new)
                yield new
                self._moved = time.monotonic()
        self._check_end(is_short=to_skip > 0 or not repeat.is_whole)

    def _check_end(self, is_short: bool) -> None:
        """Raise an error if a response has ended, but the body is not complete.

        `is_short`: it ended before the first new byte.  DownloadError means that retrying is
        useless.
        """
        if is_short:
            raise DownloadError("the body became shorter between two requests")
        size = self._range_size
        if size is None:
            size = self._resource_size
        if size is not None and self.size < size:
            raise ConnectionError("the range ended early")
        if self._is_cut_off:
            raise PipeError(CUT_SEGMENT)
        if self.size == 0 and self.empty_time is not None:
            reason = "the origin sent an empty segment"
            if time.monotonic() - self.tries.began > self.empty_time:
                raise DownloadError(reason)
            raise PipeError(reason)

    def _wait_for(self, parts: Iterator[bytes]) -> bytes:
        """Return the next bytes, empty at the end; raises PipeError if the try is too slow."""
        if self._pace.waited > self._slow_time and self.is_slow():
            # Double it each time: without Range support, every try starts from zero.
            self._slow_time *= 2
            raise PipeError("the body arrives too slowly")
        asked = time.monotonic()
        part = next(parts, b"")
        waited = self._pace.waited + time.monotonic() - asked
        self._pace = Pace(self._pace.size + len(part), waited)
        return part


def range_refusal(error: Exception) -> requests.Response | None:
    """The response with status 416, if the origin refused the requested range; None otherwise."""
    cause = getattr(error, "err", None)  # as streamlink's errors keep it
    answer: requests.Response | None = getattr(cause, "response", None)
    if answer is None or answer.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return None
    return answer


def parts_of(response: requests.Response, size: int, start: bytes = b"") -> Iterator[bytes]:
    """Yield `start`, which was read before, then the rest, at most `size` bytes at once."""
    if start:
        yield start
    is_coded = "Content-Encoding" in response.headers
    if is_coded:
        size = min(size, CODED_PART_LIMIT)
    # Decoding copies every byte, so it is switched on only if needed.  A loop would keep a
    # reference to the bytes that it yielded last; this iterator does not.
    yield from iter(functools.partial(response.raw.read1, size, decode_content=is_coded), b"")


# --------------------------------------------------------------------------------------------------
# Upstream: the part that uses streamlink
#
# A Session is streamlink prepared for one opening of a channel.  It resolves an address and opens
# one quality of it as an Upstream, which delivers bytes and segment events through a ReaderBuffer.
# HLS uses streamlink's own reader with our ReaderBuffer as its buffer; a pump thread moves any
# other source (a raw body, ffmpeg's output) to the ReaderBuffer.
# --------------------------------------------------------------------------------------------------

# The configuration cannot override these: a server must not open a browser, write files to disk, or
# use the environment's proxies and credentials (streamlink's CVE-2026-44353 and -92164).
SAFETY_OPTIONS: Mapping[str, Any] = {
    "webbrowser": False,
    "no-plugin-cache": True,
    "http-trust-env": False,
    "user-input-requester": None,
    "ffmpeg-verbose": False,
    "ffmpeg-verbose-path": None,
}
engine_version = importlib.metadata.version("streamlink")
LEAST_STREAMLINK = (8, 6, 2)  # older versions follow a redirect to a local file
ALIASES = ("best", "worst", "best-unfiltered", "worst-unfiltered")  # second names of streams
READ_SIZE = 64 * KIB  # bytes of one read of any body except a segment; at least, for a raw body

TURN_LIMIT = 1 * MIB  # bytes that a feeder takes from its buffer at once: more would delay viewers
PLAYLIST_LIMIT = 8 * MIB  # bytes of a playlist, key or page; a larger one is an attack or a mistake
ANSWER_TIME = 120.0  # seconds that a panel may take before it begins to send a large list
# Segments that the playlist of another opening may lag behind and still continue the stream: a
# backup or another cache of a CDN may be that late.  A numbering that restarts just below the
# wanted number looks the same: viewers then miss the segments up to that number.
STALE_NUMBERS = 2
TRACK_LEAD = 10  # segments; ffmpeg never reads one track that far ahead of another
MUXER_LAG = 0.5  # seconds that ffmpeg may need to write everything it has read


# The library functions that this section overrides or calls, with their parameters.
HOOKS: tuple[tuple[Any, Mapping[str, str]], ...] = (
    (HLSStreamWriter, {
        "put": "self segment", "run": "self", "close": "self",
        "should_filter_segment": "self segment", "create_decryptor": "self key num",
        "iter_segment_content": "self segment response",
        "_parse_packed_audio_timestamp": "self iterator",
    }),
    (HLSStreamWorker, {
        "reload": "self", "run": "self", "process_segments": "self playlist",
        "_fetch_playlist": "self",
    }),
    (HLSStreamReader, {"close": "self"}),
    (MuxedStream, {"_open_streams": "self"}),
    (HTTPAdapter, {"get_connection_with_tls_context": "self request verify proxies cert"}),
    (urllib3.connection.HTTPConnection, {"_new_conn": "self"}),
    (urllib3.util.connection, {"_set_socket_options": "sock options", "allowed_gai_family": ""}),
)  # fmt: skip


def check_engine() -> None:
    """Raise PipeError if the installed streamlink is unsafe or incompatible."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", engine_version)[:3])
    if numbers < LEAST_STREAMLINK or not has_hooks():
        raise PipeError(
            f"StreamPipe does not work with streamlink {engine_version}: "
            "run pip install -r requirements.txt"
        )


def has_hooks() -> bool:
    """Whether the installed libraries have all functions in HOOKS, with these parameters."""
    for owner, methods in HOOKS:
        for name, parameters in methods.items():
            method = getattr(owner, name, None)
            if method is None:
                return False
            found = inspect.signature(method).parameters
            if list(found) != parameters.split():
                return False
    return True


def warm_up() -> None:
    """Trigger streamlink's lazy loading, so that the first viewer does not wait for it."""
    engine = Streamlink()
    engine.plugins.match_url("hls://localhost/")
    engine.localization.equivalent(language="en")


def engine_options() -> EngineOptions:
    """Streamlink's session options, each with an example value; `...` for SAFETY_OPTIONS."""
    options = dict(Streamlink(plugins_builtin=False).options.defaults)
    options |= {
        "http-headers": {}, "http-cookies": {}, "http-query-params": {}, "http-cookies-files": [],
        "http-proxy": "", "http-ssl-cert": "", "http-ssl-verify": True, "http-timeout": 20.0,
        "http-disable-dh": False, "http-trust-env": False,
    }  # fmt: skip
    options["hls-playlist-reload-time"] = ""
    for name in SAFETY_OPTIONS:
        options[name] = ...
    return options


def has_ffmpeg(engine: Streamlink) -> bool:
    """Whether ffmpeg can be used.  Blocks for a few seconds at most, the first time.

    streamlink remembers the answer for good, even if ffmpeg only took too long to start.  So if
    there is an ffmpeg, and it cannot be used, the next opening asks again.
    """
    is_usable = bool(FFMPEGMuxer.is_usable(engine))
    if not is_usable and shutil.which(engine.get_option("ffmpeg-ffmpeg") or "ffmpeg"):
        with contextlib.suppress(AttributeError):  # another streamlink may remember nothing
            FFMPEGMuxer._resolve_command.cache_clear()
    return is_usable


@dataclass(frozen=True)
class Resumption:
    """The state from which another opening continues a channel's upstream."""

    number: int | None  # of the segment to begin with, if it is listed
    is_film: bool  # the source is finite, and viewers have all media before that segment
    tracks: Sequence[int]  # the segment with which each track that ffmpeg joins begins
    left_out: Collection[int]  # the positions of the tracks that the start left out
    lacked_ffmpeg: bool  # the start found no ffmpeg, so viewers have the picture alone
    length: int | None  # bytes of a raw body; None: it is not one


class Session:
    """Streamlink for one opening of a channel's upstream; openings share nothing.

    Raises UpstreamError if a file of cookies cannot be read.  One thread uses it, a channel's
    feeder or that of a Fetch; any thread may call http.cut().
    """

    def __init__(self, stream: StreamSettings, timeout: float) -> None:
        self.name = stream.name
        self.read_size = max(stream.options.buffer_size, READ_SIZE)
        self._ends = time.monotonic() + timeout  # by then, resolving and opening must be done
        self.engine = Streamlink()
        self.http = Http()
        self.engine.http = self.http
        self.closed = self.http.closed  # everything that belongs to this opening shares the event
        for settings in (_own_options(stream, timeout), stream.options.streamlink, SAFETY_OPTIONS):
            for option, value in settings.items():
                self._set_option(option, value)
        # Seconds for a request once the stream is open.
        self._timeout = stream.options.streamlink.get("http-timeout", stream.options.timeout)
        # The results of resolve():
        self.qualities: list[str] = []  # the names that are not aliases, in streamlink's order
        self.canonical: dict[str, str] = {}  # by name, alias or not: the name in `qualities`
        self._streams: Mapping[str, Any] = {}
        self._copies: Mapping[str, Sequence[Any]] = {}  # by name: copies of a master's variant
        self._raw: Opened | None = None  # a body that no plugin handles and that is not a playlist

    def _set_option(self, option: str, value: object) -> None:
        """Set one of streamlink's options; raises UpstreamError if its file cannot be read."""
        try:
            self.engine.set_option(option, value)
        except (OSError, UnicodeError) as error:
            if option != "http-cookies-files":
                raise
            # Another program may be writing the file.
            raise UpstreamError(UNREADABLE_COOKIES) from error

    def resolve(self, address: str) -> None:
        """Find the streams at an address; raises UpstreamError.

        Blocks for the rest of the session's time at most.
        """
        deadline = Deadline(self.http, self._ends - time.monotonic())
        try:
            with deadline:
                streams = self._resolve(update_scheme("https://", address, force=False))
        except Exception as error:  # a plugin may raise anything
            log.debug("cannot resolve", exc_info=True)
            raise deadline.failure_of(error) from error
        if not streams:
            raise UpstreamError(NO_STREAM)
        self.http.is_resolving = False
        self._streams = streams
        self.qualities = [name for name in streams if name not in ALIASES]
        if not self.qualities:
            self.qualities = list(streams)

        first_names: dict[int, str] = {}  # by the id() of a stream
        for name in self.qualities:
            first_names.setdefault(id(streams[name]), name)
        self.canonical = {
            name: first_names.get(id(stream), name) for name, stream in streams.items()
        }

    def open(self, name: str, copy: int = 0, resumption: Resumption | None = None) -> Upstream:
        """Open a copy of a quality; raises UpstreamError.

        `resumption` is None at the channel's start.
        """
        upstream: Upstream | None = None
        deadline = Deadline(self.http, self._ends - time.monotonic())
        try:
            with deadline:
                copies = self._copies_of(name)
                stream = self._follow(copies[copy % len(copies)])
                upstream = self._upstream_of(stream, resumption)
                upstream.open_bodies()
            # From now on, a request may take longer than this opening, which may have had only a
            # part of `timeout`.
            self.engine.set_option("http-timeout", self._timeout)
            upstream.lacks_ffmpeg = self._lacks_ffmpeg(stream)
            if upstream.lacks_ffmpeg:
                upstream.missing = "no sound: install ffmpeg"
            upstream.start()
        except Exception as error:
            log.debug("cannot open", exc_info=True)
            if upstream:
                upstream.close()
            raise deadline.failure_of(error) from error
        return upstream

    def count_copies(self, name: str) -> int:
        """The number of addresses that a quality has."""
        return len(self._copies_of(name))

    @property
    def remaining(self) -> float:
        """Seconds left for resolving and opening, at least LEAST_TIMEOUT."""
        return max(LEAST_TIMEOUT, self._ends - time.monotonic())

    def shorten(self, seconds: float) -> None:
        """Limit the time left for opening to `seconds`."""
        self._ends = min(self._ends, time.monotonic() + seconds)

    def _copies_of(self, name: str) -> Sequence[Any]:
        """The streams of a quality: one for each of its addresses."""
        return self._copies.get(self.canonical[name], [self._streams[name]])

    def _lacks_ffmpeg(self, stream: Any) -> bool:
        """Whether the sound has its own playlist, and there is no ffmpeg to add it."""
        if not isinstance(stream, HLSStream) or stream.multivariant is None:
            return False
        for variant in stream.multivariant.playlists:
            if variant.uri == stream.url:
                has_separate_sound = any(m.type == "AUDIO" and m.uri for m in variant.media)
                return has_separate_sound and not has_ffmpeg(self.engine)
        return False

    def _upstream_of(self, stream: Any, resumption: Resumption | None) -> Upstream:
        if resumption and resumption.lacked_ffmpeg and isinstance(stream, MuxedStream):
            stream = stream.substreams[0]
        if resumption and resumption.is_film:
            was_raw = resumption.length is not None
            if is_body(stream) != was_raw:
                raise UpstreamError(OTHER_FILE)
        if isinstance(stream, HLSStream):
            return SegmentedUpstream(self, stream, resumption)
        if is_body(stream):
            opened = self._raw
            if opened is None:
                opened = self.open_raw(stream.args)
            return RawUpstream(self, stream.args, opened, resumption)
        needs_muxing = isinstance(stream, MuxedStream)
        if isinstance(stream, DASHStream):
            needs_muxing = bool(stream.video_representation and stream.audio_representation)
        if needs_muxing:
            self._check_muxing()
        return ProcessUpstream(self, stream, resumption)

    def _check_muxing(self) -> None:
        """Raise UpstreamError if ffmpeg or a folder for the FIFOs that it reads is missing."""
        if not has_ffmpeg(self.engine):
            raise UpstreamError(NO_FFMPEG)
        try:
            tempfile.TemporaryFile().close()
        except OSError as error:
            raise UpstreamError(
                "audio and video are separate, and joining them needs a "
                "writable temporary folder: mount one at /tmp"
            ) from error

    def _resolve(self, address: str) -> Mapping[str, Any]:
        match = self.engine.plugins.match_url(address)
        if match is None:  # the first bytes show whether it is a playlist
            scheme = address.partition("://")[0]
            if scheme.lower() not in ("http", "https"):
                raise UpstreamError(f"{scheme}:// {UNSUPPORTED_SCHEME}")
            response, start = self.open_raw({"url": address})
            if not is_playlist(start):
                self._raw = response, start
                raw_stream = HTTPStream(self.engine, address)
                return {"live": raw_stream, "best": raw_stream, "worst": raw_stream}
            read_bounded(response, start)
            self.http.keep(address, response)
            address = f"hls://{address}"
            match = self.engine.plugins.match_url(address)
            assert match

        name, plugin_class = match
        plugin = plugin_class(self.engine, address, PluginOptions())
        try:
            if name == "hls":
                return self._resolve_hls(plugin)
            return dict(plugin.streams())
        finally:
            # Every plugin registers its cache with atexit, which would keep it forever.
            atexit.unregister(plugin.cache._save)

    def _resolve_hls(self, plugin: Any) -> Mapping[str, Any]:
        """Resolve like the plugin, but keep every variant available, whatever its attributes."""
        url = update_scheme("https://", plugin.match["url"], force=False)
        parameters = parse_params(plugin.match["params"])
        self._copies = self._variants(url, parameters)
        if not self._copies:
            live = VariantStream(self.engine, url, **parameters)
            return {"live": live, "worst": live, "best": live}
        return _with_aliases({name: copies[0] for name, copies in self._copies.items()})

    def _variants(self, url: str, parameters: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The variants of a master playlist: by name, the copies of each in order.

        Copies are variants with the same properties at different addresses.
        """
        found = VariantStream.parse_variant_playlist(self.engine, url, **parameters)
        if not found:
            return {}
        first_stream = next(iter(found.values()))
        master: Any = first_stream.multivariant
        variants = {variant.key: variant for variant in master.playlists if not variant.is_iframe}
        copies: dict[str, list[Any]] = {}
        name_by_traits: dict[object, str] = {}
        addresses = set()

        for key, stream in found.items():
            variant = variants[key]
            name = name_by_traits.get(variant.traits)
            if name is None or variant.uri in addresses:
                name = _quality_name(variant, copies)
            if variant.traits:
                name_by_traits.setdefault(variant.traits, name)
            addresses.add(variant.uri)
            copies.setdefault(name, []).append(stream)
        return copies

    def _follow(self, stream: Any) -> Any:
        """The stream to open for a variant: the best one, if it is itself a master playlist.

        The playlist is kept for the worker's first request.
        """
        if not isinstance(stream, VariantStream) or stream.multivariant is None:
            return stream
        self.http.is_resolving = True
        arguments = self.http.valid_request_args(**stream.args)
        url = arguments.pop("url")
        response = stream._fetch_playlist(self.engine, url, **arguments)
        if b"#EXT-X-STREAM-INF" in response.content:
            variants = self._variants(url, {})
            if variants:
                streams = {name: copies[0] for name, copies in variants.items()}
                stream = _with_aliases(streams)["best"]
        self.http.is_resolving = False
        return stream

    def open_raw(self, arguments: Mapping[str, Any]) -> Opened:
        """Request a body, and read enough of it to detect its kind; raises UpstreamError."""
        response = self.http.ask(arguments, {}, self.http.timeout)
        try:
            start = read_start(parts_of(response, START_LIMIT))
            return response, without_preface(start)
        except UpstreamError:
            response.close()
            raise


class Fetch:
    """A body that is not a stream: a channel list or a guide.

    One thread uses it; close() may be called from any thread.
    """

    def __init__(self, stream: StreamSettings, seconds: float) -> None:
        """Prepare to request the address of `stream` with its settings.

        `seconds` is the time for the request and its whole body.
        """
        self._address = stream.urls[0]
        self._seconds = seconds
        self._http = Session(stream, seconds).http
        self._response: requests.Response | None = None
        self._deadline = Deadline(self._http, seconds)

    def open(self, headers: Mapping[str, str]) -> requests.Response:
        """Send the request; returns the response without its body.  Raises UpstreamError."""
        self._deadline.start()
        try:
            arguments = {"url": self._address}
            self._response = self._http.ask(arguments, headers, min(self._seconds, ANSWER_TIME))
        except Exception as error:
            log.debug("cannot fetch", exc_info=True)
            raise self._deadline.failure_of(error) from error
        return self._response

    def parts(self, *, is_decoded: bool = True) -> Iterator[bytes]:
        """Yield the body as it arrives; raises UpstreamError if it breaks off."""
        assert self._response
        try:
            if is_decoded:
                yield from parts_of(self._response, READ_SIZE)
                return
            read = self._response.raw.read1
            while part := read(READ_SIZE, decode_content=False):
                yield part
        except (OSError, urllib3.exceptions.HTTPError) as error:
            log.debug("cannot fetch", exc_info=True)
            raise self._deadline.failure_of(error) from error

    def close(self) -> None:
        """End the request.  Idempotent."""
        self._deadline.cancel()
        self._http.cut()


def _own_options(stream: StreamSettings, timeout: float) -> dict[str, Any]:
    """A stream's settings as streamlink's options."""
    options = stream.options
    found = {
        "http-headers": {"User-Agent": options.user_agent, **stream.headers},
        "http-timeout": timeout,
        "stream-timeout": timeout,
        "stream-segment-timeout": options.timeout,
        "stream-segment-threads": options.threads,
        "ringbuffer-size": options.ringbuffer_size,
        # Only the channel judges its upstream: these switch streamlink's own checks off.
        "stream-segmented-queue-deadline": 0,
        "hls-playlist-reload-attempts": 0,
        "ffmpeg-fout": "mpegts",  # few set-top boxes play the default, Matroska
    }
    if stream.proxy:
        found["http-proxy"] = stream.proxy
    return found


def _cookies_in(header: str | bytes) -> dict[str, str]:
    """The values of a Cookie header by name."""
    if isinstance(header, bytes):
        header = header.decode("latin-1")
    cookies = {}
    for pair in header.split(";"):
        name, _, value = pair.strip().partition("=")
        if name:
            cookies[name] = value
    return cookies


class Http(HTTPSession):
    """Sends requests, all of which another thread can end at once.

    A body that is not streamed (a playlist, a key, a page) is limited in size, and so is the body
    of an error or a redirect.  A request's time-out applies to each wait, not to the whole request:
    while a session opens, a Deadline ends late requests; after that, the channel does.  A start
    loads no playlist twice.
    """

    def __init__(self) -> None:
        self.is_resolving = True  # playlists loaded now are kept for the worker's first request
        self._kept: dict[str, requests.Response] = {}  # playlists, by address
        # Per thread: `timeout`, which timed() sets, replaces a request's; `first_address` is the
        # address that was requested first, while redirects are followed.
        self._thread = threading.local()
        self.ends: float | None = None  # the Deadline's end by time.monotonic(), while one runs
        # _lock guards these two.
        self._lock = threading.Lock()
        self._pools: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self.closed = threading.Event()  # no more requests may be sent; set under _lock
        super().__init__()
        self.hooks["response"].append(cast(Any, self._bound))

    def resolve_redirects(self, resp: Any, req: Any, *more: Any, **named: Any) -> Any:
        """Follow redirects; rebuild_auth() needs the address that was requested first."""
        is_chain = not named.get("yield_requests")  # otherwise only the next redirect is wanted
        if is_chain:
            self._thread.first_address = req.url
        try:
            yield from super().resolve_redirects(resp, req, *more, **named)
        finally:
            if is_chain:
                self._thread.first_address = None

    def rebuild_auth(self, prepared_request: Any, response: requests.Response) -> None:
        """Send configured cookies again after a redirect on the same host.

        requests drops the header, and keeps only cookies that the origin has set.  An origin's
        cookie replaces the configured one of the same name.  Another host gets none, and neither
        does an unencrypted request after an encrypted one.
        """
        super().rebuild_auth(prepared_request, response)  # type: ignore[no-untyped-call]
        configured: Any = self.headers.get("Cookie")
        first_address = getattr(self._thread, "first_address", None)
        old = urlsplit(first_address or response.request.url or "")
        new = urlsplit(prepared_request.url)
        is_downgrade = old.scheme == "https" and new.scheme != "https"
        is_other_host = old.hostname != new.hostname  # cookies ignore ports: RFC 6265, 8.5
        if not configured or is_other_host or is_downgrade:
            return
        from_origin = prepared_request.headers.get("Cookie")
        if from_origin:
            cookies = _cookies_in(configured) | _cookies_in(from_origin)
            configured = "; ".join(f"{name}={value}" for name, value in cookies.items())
        prepared_request.headers["Cookie"] = configured

    @contextlib.contextmanager
    def timed(self, seconds: float) -> Iterator[None]:
        """Apply another time-out to the requests that this thread sends inside the block."""
        self._thread.timeout = seconds
        try:
            yield
        finally:
            self._thread.timeout = None

    def time_left(self, ends: float) -> float:
        """Seconds until `ends` (by time.monotonic()) or the Deadline's end, whichever is sooner.

        Raises TimeoutError if no time is left, and requests.ConnectionError after cut().
        """
        if self.closed.is_set():
            raise requests.ConnectionError("closed")
        if self.ends is not None:
            ends = min(ends, self.ends)
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("no connection in time")
        return left

    def ask(
        self, arguments: Mapping[str, Any], headers: Mapping[str, str], timeout: float
    ) -> requests.Response:
        """Request a body, which the caller must read; raises the errors of streamlink's request."""
        all_headers = dict(arguments.get("headers") or {})
        all_headers["Accept-Encoding"] = "identity"  # only an uncompressed body can be resumed
        all_headers.update(headers)
        complete = {"method": "GET", **arguments, "headers": all_headers, "timeout": timeout}
        return cast(requests.Response, self.request(**complete, stream=True))

    def request(self, method: str, url: str, **arguments: Any) -> Any:  # type: ignore[override]
        """Send a request as streamlink does, but limit the size of the body."""
        is_streamed = bool(arguments.get("stream"))
        # Among requests that are not streamed, only those for DASH segments have their own
        # time-out.  A segment may have any size.
        has_timeout = bool(arguments.get("timeout"))
        is_segment = arguments.get("exception") is EngineStreamError and has_timeout
        if is_segment and not is_streamed:
            arguments["hooks"] = {"response": self._bound_error}
            return super().request(method, url, **arguments)

        timeout = getattr(self._thread, "timeout", None)
        if timeout is not None:
            arguments["timeout"] = timeout
        is_of_a_plugin = method != "GET" or bool(arguments.get("schema"))
        if is_streamed or is_of_a_plugin:
            return super().request(method, url, **arguments)
        return self._load(url, arguments)

    def _load(self, url: str, arguments: Mapping[str, Any]) -> Any:
        """Load a playlist, key or page; reuse a playlist that resolving loaded, but only once."""
        kept = self._kept.get(url)
        if not self.is_resolving:
            self._kept.clear()
        if kept is not None:
            return kept

        response = super().request("GET", url, **arguments)
        # Streamlink passes one of these two for playlists and keys; plugins pass others for pages.
        kind = arguments.get("exception")
        if kind in (OSError, EngineStreamError):
            if not response.content:
                raise kind from UpstreamError(EMPTY_ANSWER)
            is_manifest = b"<MPD" in response.content[:START_LIMIT]  # of DASH
            if is_page(response.content) and not is_manifest:
                raise kind from UpstreamError(WEB_PAGE)
        if is_playlist(response.content):
            self.keep(url, response)
        elif kind is OSError and is_short_text(response.content):  # keys have the other kind
            raise kind from text_error(response.content)
        return response

    def _bound(self, response: requests.Response, stream: bool, **_: Any) -> None:
        """Read a body with a size limit, if it is not streamed, or is an error or a redirect."""
        if response.status_code >= 300 or not stream:
            read_bounded(response)

    def _bound_error(self, response: requests.Response, **_: Any) -> None:
        """Like _bound(), but only for an error or a redirect: any other body has no limit."""
        if response.status_code >= 300:
            read_bounded(response)

    def keep(self, url: str, response: requests.Response) -> None:
        """Keep a playlist that resolving loaded, for the worker's first request."""
        if self.is_resolving:
            self._kept[url] = response

    def mount(self, prefix: Any, adapter: Any) -> None:
        """Watch an adapter's pools; an adapter that reads local files is not mounted."""
        if isinstance(adapter, HTTPAdapter):
            find_pool = functools.partial(self._find_pool, adapter.get_connection_with_tls_context)
            vars(adapter)["get_connection_with_tls_context"] = find_pool
            super().mount(prefix, adapter)

    def _find_pool(self, find: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """The connection pool for a request, direct or through a proxy.

        Raises requests.ConnectionError after cut().
        """
        pool = find(*arguments, **more)
        with self._lock:
            if self.closed.is_set():
                raise requests.ConnectionError("closed")
            if pool not in self._pools:
                self._pools.add(pool)
                pool.pool.maxsize = 0  # no limit: there are only as many connections as threads
                pool.ConnectionCls = _watched(pool.ConnectionCls, self)
        return pool

    def add(self, sock: socket.socket) -> socket.socket:
        """Remember a socket, and return it; shut it down if another thread has called cut()."""
        with self._lock:
            self._sockets.add(sock)
            if self.closed.is_set():
                _shut(sock)
        return sock

    def let_bodies_pause(self, seconds: float) -> None:
        """Let each read of an open body take this long, but not those of later requests."""
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # it was closed, or became a TLS socket
                    sock.settimeout(seconds)

    def cut(self) -> None:
        """End every request, refuse further ones and keep no playlist.  Any thread may call it."""
        with self._lock:
            self.closed.set()
            for sock in self._sockets:
                _shut(sock)
            for pool in self._pools:
                pool.close()  # closes idle connections now, and the others once they are done
        self._kept = {}


class Deadline:
    """Ends all requests of an Http that are not finished in time.

    Use it as a context manager, or call start() and cancel(), from any thread.
    """

    def __init__(self, http_session: Http, seconds: float) -> None:
        self._http = http_session
        self._seconds = max(0.0, seconds)
        self._timer: threading.Timer | None = None  # None unless it is running
        self.is_late = False  # written once, by the timer's thread

    def start(self) -> None:
        """Start the timer; raises RuntimeError if the system has no threads left."""
        self._http.ends = time.monotonic() + self._seconds
        self._timer = threading.Timer(self._seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Stop the timer: requests may now take any time.  Idempotent."""
        self._http.ends = None
        timer = self._timer
        self._timer = None  # the timer refers to this object
        if timer:
            timer.cancel()

    def _end(self) -> None:
        self.is_late = True
        self._http.cut()

    def failure_of(self, error: Exception) -> UpstreamError:
        """The UpstreamError for a failure: TIMED_OUT if it was late, or else explain(error)."""
        if self.is_late:
            return UpstreamError(TIMED_OUT)
        return UpstreamError(explain(error))

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.cancel()
        if self.is_late and error is None:  # a plugin did not notice that its request was cut
            raise TimeoutError("the attempt took too long")


def _watched(kind: Any, http_session: Http) -> Any:
    """A subclass of a connection class that adds its sockets to an Http, before and after TLS."""

    class Connection(kind):  # type: ignore[misc]
        timeout: float  # seconds, for the next step
        response_class = Response

        def _new_conn(self) -> socket.socket:
            if kind._new_conn is urllib3.connection.HTTPConnection._new_conn:
                return http_session.add(connect_fastest(self, http_session))
            # A SOCKS proxy: each of its addresses may take half of the time.
            self.timeout = http_session.time_left(time.monotonic() + self.timeout) / 2
            return http_session.add(super()._new_conn())

        def connect(self) -> None:
            super().connect()
            sock = self.sock
            if isinstance(sock, SSLTransport):  # TLS to an origin within TLS to a proxy
                sock = sock.socket
            http_session.add(sock)

    return Connection


ATTEMPT_DELAY = 0.25  # seconds between two attempts to connect; RFC 8305, 5
ANSWERED_LIMIT = 1000  # hosts whose last good address is remembered

# For each host and port, the address that answered last.  Every session tries it first.
# _answered_lock guards this.
_answered: dict[tuple[str, int], Any] = {}
_answered_lock = threading.Lock()


def connect_fastest(connection: Any, http_session: Http) -> socket.socket:
    """Connect to a host at the address that answers first (RFC 8305), and return the socket.

    Blocks for the connection's time-out at most, after the name look-up, which has a limit of its
    own: the system may wait 5 s for a dead name server, which is longer than many segments last.
    The socket's time-out is the remaining time, for the next step, such as a TLS handshake.  Raises
    urllib3's errors.
    """
    name, port = connection._dns_host.strip("[]"), connection.port
    try:
        found = in_turn(look_up(name, port), name, port)
        ends = time.monotonic() + connection.timeout
        patience = functools.partial(http_session.time_left, ends)
        sock, address = first_to_answer(
            found, patience, connection.source_address, connection.socket_options
        )
    except UnicodeError:
        raise urllib3.exceptions.LocationParseError(f"'{name}', label empty or too long") from None
    except socket.gaierror as error:
        raise urllib3.exceptions.NameResolutionError(name, connection, error) from error
    except TimeoutError as error:
        raise urllib3.exceptions.ConnectTimeoutError(connection, "no address answers") from error
    except OSError as error:
        raise urllib3.exceptions.NewConnectionError(connection, str(error)) from error

    with _answered_lock:
        _answered.pop((name, port), None)  # so that the newest becomes the last
        _answered[name, port] = address
        if len(_answered) > ANSWERED_LIMIT:
            oldest = next(iter(_answered))
            del _answered[oldest]
    if address != found[0]:
        log.warning("%s: the first address tried does not answer, but another one does", name)
    # Do not call time_left() here: if it raised an error, the socket would stay open.
    sock.settimeout(max(LEAST_TIMEOUT, ends - time.monotonic()))
    return sock


def look_up(name: str, port: int) -> list[Any]:
    """A host's addresses, or those of one family if the look-up of both together fails.

    Blocks for as long as the system's resolver does.  Raises socket.gaierror, UnicodeError.
    """
    name.encode("idna")
    family = urllib3.util.connection.allowed_gai_family()
    try:
        return list(socket.getaddrinfo(name, port, family, socket.SOCK_STREAM))
    except socket.gaierror as error:
        if family != socket.AF_UNSPEC:
            raise
        for one in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(socket.gaierror):
                return list(socket.getaddrinfo(name, port, one, socket.SOCK_STREAM))
        raise error


def in_turn(found: Sequence[Any], name: str, port: int) -> list[Any]:
    """Addresses in the order of attempts: the last good one, then alternating families.

    `found` is not empty; its entries are those of socket.getaddrinfo(), and begin with the family.
    """
    first_family = found[0][0]
    first = [address for address in found if address[0] == first_family]
    others = [address for address in found if address[0] != first_family]
    order = []
    while first or others:
        if first:
            order.append(first.pop(0))
        if others:
            order.append(others.pop(0))

    with _answered_lock:
        good = _answered.get((name, port))
    if good in order:
        order.remove(good)
        order.insert(0, good)
    return order


def first_to_answer(
    addresses: Sequence[Any],
    patience: Callable[[], float],
    source: tuple[str, int] | None,
    options: Any,
) -> tuple[socket.socket, Any]:
    """Begin an attempt every ATTEMPT_DELAY, or as soon as one fails.

    Returns the first socket that is connected, and its address; closes all others.  `patience`
    returns the seconds left, and raises an error if there are none.  If every attempt failed,
    raises the first ConnectionRefusedError among their errors, or else the first OSError.
    """
    waiting = deque(addresses)
    errors: list[OSError] = []
    due = time.monotonic()  # when the next attempt begins
    with selectors.DefaultSelector() as pending, contextlib.ExitStack() as attempts:
        while waiting or pending.get_map():
            now = time.monotonic()
            if waiting and now >= due:
                address = waiting.popleft()
                due = now + ATTEMPT_DELAY
                try:
                    sock = begin_attempt(address, source, options)
                except OSError as error:
                    errors.append(error)
                    due = now
                    continue
                attempts.callback(sock.close)
                pending.register(sock, selectors.EVENT_WRITE, address)

            wait = min(patience(), ATTEMPT_DELAY)
            if waiting:
                wait = min(wait, max(0.0, due - now))
            for key, _ in pending.select(wait):
                sock = cast(socket.socket, key.fileobj)
                pending.unregister(sock)
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number == 0:
                    connected = socket.socket(fileno=sock.detach())  # `attempts` closes `sock`
                    return connected, key.data
                sock.close()
                errors.append(OSError(number, os.strerror(number)))
                due = now

    for failure in errors:
        if isinstance(failure, ConnectionRefusedError):
            raise failure
    raise errors[0]


def begin_attempt(address: Any, source: tuple[str, int] | None, options: Any) -> socket.socket:
    """Begin to connect, and return the socket without waiting for the result; raises OSError."""
    family, kind, protocol, _, place = address
    sock = socket.socket(family, kind, protocol)
    try:
        urllib3.util.connection._set_socket_options(sock, options)
        sock.setblocking(False)
        if source:
            sock.bind(source)
        number = sock.connect_ex(place)
        if number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock


ICY_STATUS = b"ICY 200"  # the beginning of a Shoutcast server's status line
ICY_LINE_LIMIT = 1 * KIB  # bytes of this line


class Response(http.client.HTTPResponse):
    """Accepts "ICY 200" as HTTP/1.0, too: early Shoutcast servers, run by many radios, send it."""

    def _read_status(self) -> Any:
        if not self.fp.peek(len(ICY_STATUS)).startswith(ICY_STATUS):
            return super()._read_status()  # type: ignore[misc]
        self.fp.readline(ICY_LINE_LIMIT)
        return "HTTP/1.0", 200, "OK"


# The value of SO_LINGER (on, for 0 seconds) that makes close() send a reset.
NO_LINGER = struct.pack("HH" if os.name == "nt" else "ii", 1, 0)


def _shut(sock: socket.socket) -> None:
    """Wake every thread that waits for a socket, and make its close() send a reset.

    An origin that waits for room to send would take a minute or two to notice an orderly end, and
    many origins allow only one connection at a time.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # SSLSocket's would also drop the TLS layer


START_LIMIT = 4 * KIB  # bytes of blanks and comments that may precede a playlist
MESSAGE_LIMIT = 4 * KIB  # bytes; a longer text is not a message
TEXT_SHOWN = 80  # bytes of a text in the debug log
_BLANKS = rb"(\xef\xbb\xbf)?(\s|#(?!EXTM3U)[^\r\n]*[\r\n])*"
_COMMENTS = re.compile(_BLANKS + rb"(#[^\r\n]*)?")
_PREFACE = re.compile(_BLANKS + rb"(?=#EXTM3U)")
_PAGE = re.compile(
    rb"(\xef\xbb\xbf)?\s*(<(!doctype|!--|\?xml|[a-z][\w:-]*[\s>/])|[{\[]\s*[\"{}\[\]\d])", re.I
)

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # characters that no text contains


def is_playlist(body: bytes) -> bool:
    return bool(_PREFACE.match(body, 0, START_LIMIT))


def without_preface(body: bytes) -> bytes:
    """A playlist without its leading BOM, blanks and comments, which streamlink would refuse."""
    preface = _PREFACE.match(body, 0, START_LIMIT)
    return body[preface.end() :] if preface else body


def is_whole_playlist(body: bytes) -> bool:
    """Whether a media playlist is complete, as far as its text shows.

    It must end with EXT-X-ENDLIST, or, if it is live, with the whole line of a segment's address.
    This matters if the connection closes before the announced length: some origins announce too
    much, and players use the bytes that they get.
    """
    if not is_playlist(body):
        return False
    last_line = body.rstrip(b"\0 \t\r\n").splitlines()[-1]
    if last_line.startswith(b"#"):
        return last_line == b"#EXT-X-ENDLIST"
    is_live = b"#EXT-X-TARGETDURATION" in body and b"#EXT-X-PLAYLIST-TYPE:VOD" not in body
    return is_live and body.endswith((b"\n", b"\r"))


def is_page(start: bytes) -> bool:
    """Whether this is text that begins like HTML, XML or JSON; media may begin with any byte.

    A key of 16 bytes is not a page.
    """
    is_text = not re.search(rb"[\x00-\x08\x0e-\x1f]", start[:512])
    return is_text and len(start) > 16 and bool(_PAGE.match(start, 0, START_LIMIT))


def is_text(start: bytes) -> bool:
    """Whether this is printable UTF-8, even if cut off within a character."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(text)


def is_short_text(body: bytes) -> bool:
    """Whether a complete body is an error message or a list of links, and not a playlist."""
    return 0 < len(body) < MESSAGE_LIMIT and is_text(body) and not is_playlist(body)


def text_error(body: bytes) -> UpstreamError:
    """The error for a text; logs its first words, at the debug level only."""
    words = body[:TEXT_SHOWN].decode("utf-8", "ignore").split()
    shown = [word for word in words if not re.search("[/=?&@]", word)]  # addresses are secret
    log.debug("the origin sent text: %s", " ".join(shown))
    return UpstreamError(SHORT_TEXT)


def media_parts(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a segment or a file as it arrives.

    Raises UpstreamError before the first byte if its start is not media.
    """
    rest = iter(parts)
    start = read_start(rest)
    if is_playlist(start):
        raise text_error(start)
    if start:
        yield start
    yield from rest


def read_start(parts: Iterable[bytes]) -> bytes:
    """Read and return enough of a body to tell media and playlists from pages and texts.

    Raises UpstreamError for a page and for a short text.  Media has a byte within its first packet
    that no text contains, so only text waits for more.
    """
    start = b""
    for part in parts:
        start += part
        if is_page(start):
            raise UpstreamError(WEB_PAGE)
        is_long = len(start) >= START_LIMIT
        may_be_text = is_text(start) or _COMMENTS.fullmatch(start)
        if is_long or is_playlist(start) or not may_be_text:
            return start
    if is_short_text(start):
        raise text_error(start)
    return start


def read_bounded(response: requests.Response, start: bytes = b"") -> None:
    """Read a body to its end and keep it in `response`; its first bytes are `start`, if given.

    Raises UpstreamError if it is larger than PLAYLIST_LIMIT, and any error of reading.  For an HTTP
    error or a redirect, whose status is enough, it keeps the bytes read so far instead.  It does
    the same for a playlist that is complete although the connection closed too early.
    """
    body = bytearray()
    try:
        for part in parts_of(response, READ_SIZE, start):
            body += part
            if len(body) > PLAYLIST_LIMIT:
                raise UpstreamError(TOO_LARGE_PLAYLIST)
    except Exception as error:
        response.close()
        is_broken_off = isinstance(error, urllib3.exceptions.ProtocolError)
        is_whole = is_broken_off and is_whole_playlist(bytes(body))
        if response.status_code < 300 and not is_whole:
            raise
    untyped: Any = response
    untyped._content = without_preface(bytes(body))
    untyped._content_consumed = True


# How an upstream ends.  The thread in the third column ends its ReaderBuffer: a track's writer that
# of its track, and for ffmpeg the pump that of the upstream.  Only the first end counts.  read()
# returns everything received until then, and then raises SourceEnded (complete) or UpstreamError
# (failure).
#
#   HLS            complete  writer   all up to EXT-X-ENDLIST was passed on, filtered or a gap; the
#                                     worker ignores the tag in a stale playlist
#                  failure   writer   no key; no initialization section; a failed segment that is
#                                     fatal (see SegmentDownload); segments stop without an end
#                            worker   no first playlist; an expired address; restarted numbering; a
#                                     playlist that ends before the wanted segment
#   raw body       complete  pump     its whole length was received
#                  failure   pump     it broke off; it had no length and ended
#   ffmpeg, files  complete  pump     the data ended, and every track is finite
#                  failure   pump     the data ended otherwise
#                            a track  as for HLS, or for a raw body
#   any            failure   all      a bug in a plugin or in this program
#
# Silence ends none of them: the channel notices silence and closes the upstream.


class Upstream:
    """An open source.  Only the channel's thread reads and closes it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.buffer = ReaderBuffer(session.engine.get_option("ringbuffer-size"))
        self.live_edge: int = session.engine.get_option("hls-live-edge")
        self._files: list[Any] = []  # streamlink's files to close, in the order of their opening
        self._pump: threading.Thread | None = None  # moves the source's bytes to the buffer
        # A decoder can start with the first byte.  The DTS follow a clock of their own, so they
        # cannot show which media viewers already have.
        self.is_clean = False
        self.missing: str | None = None  # a note on what the stream lacks; None: nothing
        self.left_out: Collection[int] = ()  # the positions of the tracks that were left out
        self.lacks_ffmpeg = False  # so its sound is missing
        self._unused: list[Any] = []  # the files of these tracks

    def __repr__(self) -> str:
        state = "closed" if self.session.closed.is_set() else "open"
        return f"<{type(self).__name__} {self.session.name}, {state}: {self.buffer}>"

    @property
    def is_finite(self) -> bool:
        """Whether this source is finite; known once its first bytes were received."""
        if not self.workers:
            return False
        return all(has_finite_source(worker) for worker in self.workers)

    @property
    def media_type(self) -> str:
        """The Content-Type of a raw source; empty for any other."""
        return ""

    @property
    def length(self) -> int | None:
        """The size of a raw body in bytes; 0 if unknown; None if it is live, or not a raw body."""
        return None

    @property
    def tracks(self) -> Sequence[int]:
        """The segment with which each track of the next opening begins; empty without tracks."""
        return ()

    @property
    def losses(self) -> Losses:
        """Segments that the tracks have lost so far; other sources report losses as events."""
        return Losses()

    @property
    def segment_time(self) -> float | None:
        """Measured seconds from one listed segment to the next; None if not known yet."""
        longest: float | None = None
        for worker in self.workers:
            seconds: float | None = getattr(worker, "segment_time", None)
            if seconds is not None and (longest is None or seconds > longest):
                longest = seconds
        return longest

    @property
    def target_duration(self) -> float:
        """Seconds; 0 if there are no segments."""
        durations = (getattr(worker, "playlist_targetduration", 0.0) for worker in self.workers)
        return float(max(durations, default=0.0))

    @property
    def trouble(self) -> str | None:
        """Why viewers have to wait; None if there is no trouble.

        Either the newest playlist could not be used, or the server of the next segment cannot be
        reached.
        """
        for file in self._files:
            if not isinstance(file, SegmentedStreamReader):
                continue
            for part in (file.worker, file.writer):  # those of DASH have no `trouble`
                trouble: str | None = getattr(part, "trouble", None)
                if trouble:
                    return trouble
        return None

    @property
    def workers(self) -> list[Any]:
        """The workers, each of which loads the playlist of a track."""
        return [file.worker for file in self._files if isinstance(file, SegmentedStreamReader)]

    def open_bodies(self) -> None:
        """Request the HTTP bodies among the tracks; the caller limits the time.

        May raise any exception; the caller must call close() in any case.
        """

    def start(self) -> None:
        """Open the source.  May raise any exception; the caller must call close() in any case."""
        self._pump = threading.Thread(
            target=fill,
            args=(self.buffer, self._items()),
            name=f"pump-{self.session.name}-0",
            daemon=True,
        )
        self._pump.start()

    def _items(self) -> Items:
        """Yield bytes and events for the pump; raises UpstreamError if the source breaks off."""
        raise NotImplementedError

    def read(self, timeout: float) -> list[bytes | SegmentEvent]:
        """The bytes and events received, in order; empty after `timeout` seconds or a wake-up.

        Raises SourceEnded if the source truly ended, and UpstreamError if it broke off.
        """
        items = self.buffer.take(TURN_LIMIT, timeout)
        if not items and self.buffer.is_exhausted:
            if self.buffer.failure:
                raise UpstreamError(self.buffer.failure)
            raise SourceEnded
        return items

    def close(self) -> None:
        """End everything and drop all bytes that were not read.  Call it once.

        Waits only for ffmpeg: on return, ffmpeg and its FIFOs are gone, because they would outlive
        this process.
        """
        self.buffer.discard()
        self.session.http.cut()
        for file in self._files:
            if isinstance(file, FFMPEGMuxer):
                end_muxer(file)
        name = f"close-{self.session.name}-0"
        try:
            threading.Thread(target=self._close, name=name, daemon=True).start()
        except RuntimeError:  # the system has no threads left, so this one waits
            self._close()

    def _close(self) -> None:
        """Close all files and wait for their threads; blocks for a few seconds at most."""
        files = [*self._files, *self._unused]
        for file in reversed(files):
            try:
                file._opened = True  # so that close() also ends a writer whose worker did not start
                file.close()
            except Exception:
                log.debug("cannot close", exc_info=True)
        for file in files:
            if isinstance(file, SegmentReader):
                file.drop_references()
        files.clear()
        self._files.clear()
        self._unused.clear()
        if self._pump and self._pump.ident:
            self._pump.join()

    def _remember(self, stream: Any) -> None:
        """Note each file that a stream opens, because a stream that fails half-way forgets them."""
        files = self._files
        maker = "__reader__" if hasattr(stream, "__reader__") else "open"
        make = getattr(stream, maker)

        def make_and_note(*arguments: Any, **more: Any) -> Any:
            file = make(*arguments, **more)
            files.append(file)
            if isinstance(file, DASHStreamReader):
                # A DASH track must wait like SegmentReader.read(): a time-out is not an end.
                vars(file)["read"] = file.buffer.read
            return file

        setattr(stream, maker, make_and_note)


def has_finite_source(worker: Any) -> bool:
    """Whether a worker's playlist has ended, or its DASH manifest is that of a recording."""
    if getattr(worker, "playlist_end", None) is not None:
        return True
    manifest = getattr(worker, "mpd", None)
    return getattr(manifest, "type", None) == "static"


FIFO_TIME = 2.0  # seconds that a thread may take to stop waiting for its FIFO
FIFO_TICK = 0.02  # seconds between two attempts to wake it


def end_muxer(muxer: Any) -> None:
    """Kill ffmpeg, and remove its FIFOs once no thread waits for them.

    Blocks for FIFO_TIME per FIFO at most, and until ffmpeg has ended.
    """
    process = muxer.process
    if process:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()  # streamlink would leave a zombie

    for stream in muxer.streams:
        if isinstance(stream, SegmentedStreamReader):
            stream.buffer.close()

    for pipe, thread in zip(muxer.pipes, muxer.pipe_threads, strict=True):
        deadline = time.monotonic() + FIFO_TIME
        while thread.is_alive() and time.monotonic() < deadline:
            # The thread may be waiting for ffmpeg to open the other end, so open that here.
            # (Windows has neither the flag nor this wait.)
            with contextlib.suppress(OSError, AttributeError):
                os.close(os.open(pipe.path, os.O_RDONLY | os.O_NONBLOCK))
            thread.join(FIFO_TICK)
        with contextlib.suppress(OSError):
            pipe.path.unlink()
    muxer.process = None  # so that streamlink's close() does not end it again


class SegmentedUpstream(Upstream):
    """An HLS stream: streamlink's worker and writer with our downloads and our ReaderBuffer."""

    def __init__(
        self, session: Session, stream: HLSStream, resumption: Resumption | None = None
    ) -> None:
        super().__init__(session)
        self._stream = stream
        first = None
        is_film = False
        if resumption:
            first = resumption.number
            is_film = resumption.is_film
        use_own_reader(stream, session, buffer=self.buffer, first=first, is_film=is_film, fail=None)
        self._remember(stream)

    def start(self) -> None:
        self._stream.open()


def use_own_reader(stream: Any, session: Session, track: str = "", **reading: Any) -> None:
    """Put our downloads into an HLS stream, perhaps a plugin's own, before it is opened.

    `reading` holds the other arguments of SegmentReader.
    """
    stream.name = session.name + track  # part of the names of its threads, and so of log lines
    reader = _own_reader(type(stream).__reader__)
    stream.__reader__ = functools.partial(reader, **reading)
    parser = _own_parser(type(stream).__parser__)
    variables = getattr(stream.multivariant, "variables", {})  # a plugin's own master has none
    stream.__parser__ = functools.partial(parser, imported=variables)


@functools.cache
def _own_reader(base: Any) -> Any:
    """A subclass of a stream's reader, with subclasses of its writer and worker.

    So a plugin's own readers and writers (Twitch's advertisement filter) stay in the class chain.
    """
    writer, worker = base.__writer__, base.__worker__
    members = {  # the threads have the names of these classes
        "__writer__": type(writer.__name__, (DownloadingWriter, writer), {}),
        "__worker__": type(worker.__name__, (WatchedWorker, worker), {}),
    }
    return type(base.__name__, (SegmentReader, base), members)


LONGEST_SEGMENT = 86_400.0  # seconds; for a film that is a single segment
DEFAULT_TARGET = 1.0  # seconds; the target duration of a playlist that states no durations


def _with_true_lengths(playlist: Any) -> Any:
    """Replace implausible durations in a playlist, and return it.

    StreamPipe waits for as long as these durations, but packagers write a day when a clock wraps.
    """
    segments = playlist.segments
    if not segments:
        target = playlist.targetduration
        if target is not None and target > LISTED_TIME:
            playlist.targetduration = LISTED_TIME
        return playlist
    most = LONGEST_SEGMENT if playlist.is_endlist else LISTED_TIME

    lengths = sorted(segment.duration for segment in segments)
    median = lengths[len(lengths) // 2]
    for segment in segments:
        if segment.duration > most:
            segment.duration = min(most, median)

    target = playlist.targetduration
    if target is None or not 0 < target <= most:
        target = max(segment.duration for segment in segments)
        if target == 0:
            target = DEFAULT_TARGET
        playlist.targetduration = target
    return playlist


# The tags that only a media playlist has (RFC 8216, 4.3.2 and 4.3.3).  EXTINF is not among them,
# because channel lists have it, too.
_MEDIA_TAGS = frozenset({
    "EXT-X-TARGETDURATION", "EXT-X-MEDIA-SEQUENCE", "EXT-X-DISCONTINUITY-SEQUENCE",
    "EXT-X-PLAYLIST-TYPE", "EXT-X-ENDLIST", "EXT-X-DISCONTINUITY", "EXT-X-BYTERANGE", "EXT-X-KEY",
    "EXT-X-MAP", "EXT-X-PROGRAM-DATE-TIME",
})  # fmt: skip
# If one of these tags were ignored, the bytes that follow it would be wrong, or noise.
_NEEDED_TAGS = frozenset({"EXT-X-KEY", "EXT-X-MAP", "EXT-X-BYTERANGE"})
_LINE_ENDS = re.compile(r"[\r\n]+")
# Characters that are read as blanks.  str.splitlines() would split at all of them but the zero
# byte, with which some packagers pad a file.
_BLANK_LIKE = re.compile("[\0\v\f\x1c-\x1e\x85\u2028\u2029]")
# A name, then a quoted text or everything up to the next name, because some packagers do not quote
# a list of codecs.
_ATTRIBUTE = re.compile(r'(?:^|,)\s*([A-Z0-9-]+)\s*=\s*("[^"]*"\s*|.*?)(?=,\s*[A-Z0-9-]+\s*=|$)')
# A reference to a variable that an EXT-X-DEFINE has defined (RFC 8216bis, 4.3).
_REFERENCE = re.compile(r"\{\$([\w-]+)\}", re.ASCII)
VARIABLE_LIMIT = 4 * KIB  # characters of a variable's value: values may contain variables
MOST_REFERENCES = 16  # replaced in one line
_BYTE_RANGE = re.compile(r"[1-9]\d{0,17}(@\d{1,18})?")
# The attributes of a variant that must be numbers.
_VARIANT_NUMBERS = {
    "BANDWIDTH": re.compile(r"\d{1,12}"),
    "RESOLUTION": re.compile(r"\d{1,5}x\d{1,5}"),
    "FRAME-RATE": re.compile(r"\d{1,4}(\.\d{1,9})?"),
}


class BadPlaylist(PipeError, ValueError):
    """A playlist that cannot be played; the text is the reason."""


_ParserBase: Any = object  # really the parser that _own_parser() combines PlaylistParser with


class PlaylistParser(_ParserBase):  # type: ignore[misc]
    """A mixin that makes streamlink's playlist parser, or a plugin's, tolerant of errors.

    It ignores a tag that it cannot read.  If playing without that tag would be wrong, it raises
    BadPlaylist.  It replaces variables by their values; `imported` has those of the master
    playlist.
    """

    _map: Any
    _streaminf: dict[str, str] | None

    def __init__(self, *arguments: Any, imported: Mapping[str, str] = {}) -> None:
        super().__init__(*arguments)
        self._imported = imported
        self.variables: dict[str, str] = {}
        self._size = 0  # characters of the lines whose variables were replaced
        self.is_gap = False  # of the next segment
        self.is_media = False  # a tag has shown that the playlist lists segments
        self.has_negative_length = False
        self._range_ends: dict[str, int] = {}  # by address

    def parse(self, data: Any) -> Any:
        text = data if isinstance(data, str) else data.content.decode("utf-8", "replace")
        text = _BLANK_LIKE.sub(" ", text)
        lines = [line.strip() for line in _LINE_ENDS.split(text)]
        filled_lines = [line for line in lines if line]
        playlist = super().parse("\n".join(filled_lines))
        playlist.variables = self.variables
        if self.has_negative_length and not self.is_media:
            raise BadPlaylist(CHANNEL_LIST)
        return _with_true_lengths(playlist)

    def parse_line(self, line: str) -> None:
        if self.variables:
            line = _REFERENCE.sub(self._value_of, line, count=MOST_REFERENCES)
            self._size += len(line)
            if self._size > PLAYLIST_LIMIT:
                raise BadPlaylist(TOO_LARGE_PLAYLIST)
        if not line.startswith("#"):
            # Each address in a media playlist is a segment (RFC 8216, 4.1).
            if self.is_media and not self._expect_playlist:
                self._expect_segment = True
            super().parse_line(line)
            return
        name, _, value = line[1:].partition(":")
        tag = name.rstrip()
        if tag in _MEDIA_TAGS:
            self.is_media = True
        try:
            self._parse_tag(tag, value.strip())
        except (ValueError, OverflowError) as error:
            if tag in _NEEDED_TAGS and not isinstance(error, BadPlaylist):
                raise BadPlaylist(explain(error)) from error
            if tag in _NEEDED_TAGS or "insecure resource" in str(error):
                raise
            log.debug("cannot read the tag %s", tag, exc_info=True)

    def _parse_tag(self, tag: str, value: str) -> None:
        if tag == "EXT-X-I-FRAME-STREAM-INF" and self._expect_playlist:
            return  # streamlink would give it the attributes of the variant whose address follows
        if tag == "EXT-X-DEFINE":
            self._define(self.parse_attributes(value))
        section = self._map
        value = self._readable(tag, value)
        super().parse_line(f"#{tag}:{value}" if value else f"#{tag}")
        if tag == "EXTINF":
            if value.startswith("-"):
                self.has_negative_length = True
        elif tag == "EXT-X-GAP":
            self.is_gap = True
        elif tag == "EXT-X-DISCONTINUITY":
            self._map = section  # streamlink drops it here; RFC 8216, 4.3.2.5, keeps it
        elif tag == "EXT-X-MEDIA-SEQUENCE":
            # Some packagers count up from a negative number: read it as unsigned.
            self.m3u8.media_sequence %= 1 << 64
        elif tag == "EXT-X-TARGETDURATION" and not math.isfinite(self.m3u8.targetduration):
            self.m3u8.targetduration = None
        elif tag in _NEEDED_TAGS:
            self._check_needed(tag, self.parse_attributes(value))

    def _define(self, attributes: Mapping[str, str]) -> None:
        """Define a variable (RFC 8216bis, 4.4.2.3).

        The tag has its value, or names a parameter of this playlist's address, or a variable of the
        master playlist.
        """
        value: str | None = None
        if "NAME" in attributes:
            name = attributes["NAME"]
            value = attributes.get("VALUE", "")
        elif "QUERYPARAM" in attributes:
            name = attributes["QUERYPARAM"]
            parameters = parse_qs(urlsplit(self.m3u8.uri or "").query, keep_blank_values=True)
            value = parameters.get(name, [None])[0]
        else:
            name = attributes.get("IMPORT", "")
            value = self._imported.get(name)
        if value is not None and len(value) <= VARIABLE_LIMIT:
            self.variables[name] = value

    def _value_of(self, reference: re.Match[str]) -> str:
        """The text for a reference to a variable: its value, or itself if there is no such one."""
        return self.variables.get(reference[1], reference[0])

    def _readable(self, tag: str, value: str) -> str:
        """A tag's value as streamlink can read it."""
        if tag == "EXT-X-MEDIA":
            return value + _missing_name(self.parse_attributes(value))
        if tag == "EXT-X-KEY":
            method = self.parse_attributes(value).get("METHOD", "")
            if method.upper() == "NONE":
                return "METHOD=NONE"  # the rest does not matter (RFC 8216, 4.3.2.4)
        if tag == "EXT-X-MEDIA-SEQUENCE":
            number = re.match(r"-?\d+", value)  # some packagers write 12.0
            if number:
                return number[0]
        return value

    def _check_needed(self, tag: str, attributes: Mapping[str, str]) -> None:
        """Raise BadPlaylist if streamlink could not read one of _NEEDED_TAGS."""
        if tag == "EXT-X-KEY":
            is_read = bool(attributes.get("METHOD"))
        elif tag == "EXT-X-MAP":
            is_read = bool(attributes.get("URI"))
        else:
            is_read = self._byterange is not None
        if not is_read:
            raise BadPlaylist(INVALID_TAG)

        if tag == "EXT-X-MAP" and self._map.byterange and self._map.byterange.offset is None:
            self._map.byterange = self._map.byterange._replace(offset=0)

    @classmethod
    def parse_attributes(cls, value: str) -> dict[str, str]:
        """The readable attributes; streamlink would return none if one is malformed."""
        return {name: text.strip().strip('"') for name, text in _ATTRIBUTE.findall(value)}

    @classmethod
    def parse_byterange(cls, value: str) -> Any:
        value = "".join(value.split())
        if value and not _BYTE_RANGE.fullmatch(value):
            raise BadPlaylist(INVALID_TAG)
        return super().parse_byterange(value)

    @classmethod
    def parse_hex(cls, value: str | None) -> Any:
        """A key's IV.  Raises BadPlaylist if it is malformed.

        A wrong IV would turn the start of each segment into noise.  Some packagers omit the prefix
        `0x`, but then write all 32 digits.
        """
        if value is None:
            return None
        if re.fullmatch("[0-9A-Fa-f]{32}", value):
            value = f"0x{value}"
        if not re.fullmatch("0[xX][0-9A-Fa-f]{1,32}", value):
            raise BadPlaylist(INVALID_TAG)
        return super().parse_hex(value)

    def uri(self, uri: str) -> str:
        """The absolute form of an address in the playlist.

        As in browsers, a backslash in its path means a slash: packagers on Windows write them.
        """
        path, mark, query = uri.partition("?")
        if not path.lower().startswith("data:"):
            path = path.replace("\\", "/")
        return cast(str, super().uri(f"{path}{mark}{query}"))

    def get_segment(self, uri: str, **data: Any) -> Any:
        segment = super().get_segment(uri, **data)
        segment.is_gap = self.is_gap
        self.is_gap = False
        part = segment.byterange
        if part:
            if part.offset is None:  # it follows the previous range (RFC 8216, 4.3.2.2)
                part = part._replace(offset=self._range_ends.get(uri, 0))
            segment.byterange = part
            self._range_ends[uri] = part.offset + part.range
        return segment

    def get_playlist(self, uri: str, **data: Any) -> Any:
        attributes = {}
        for name, value in (self._streaminf or {}).items():
            pattern = _VARIANT_NUMBERS.get(name)
            if pattern is None or pattern.fullmatch(value):
                attributes[name] = value
        self._streaminf = attributes
        playlist = super().get_playlist(uri, **data)
        playlist.attributes = attributes
        return playlist


@functools.cache
def _own_parser(base: Any) -> Any:
    """A subclass of a stream's parser that tolerates errors."""
    if issubclass(base, PlaylistParser):
        return base
    return type(base.__name__, (PlaylistParser, base), {})


class Variant(HLSPlaylist):
    """A variant of a master playlist.  Its key is unique, because several may have one name."""

    key = ""
    quality = ""  # streamlink's name for it
    attributes: Mapping[str, str] = {}

    @property
    def traits(self) -> tuple[str | None, ...] | None:
        """The properties that the copies of a variant share; None if it has no BANDWIDTH."""
        if "BANDWIDTH" not in self.attributes:
            return None
        return (
            self.quality,
            self.attributes["BANDWIDTH"],
            self.attributes.get("RESOLUTION"),
            self.attributes.get("CODECS"),
        )

    def get_name(self, **how: Any) -> str:
        self.quality = super().get_name(**how) or ""
        self.key = str(id(self))
        return self.key


class VariantParser(PlaylistParser, M3U8Parser[Any, Any, Any]):
    """Reads a master playlist into Variants."""

    __playlist__ = Variant


class VariantStream(HLSStream):
    """An HLS stream at an address that matches no plugin other than streamlink's `hls`."""

    __parser__ = VariantParser


def _quality_name(variant: Variant, taken: Collection[str]) -> str:
    """Streamlink's name for a variant, plus `_alt` if it is taken; without one, `variant-N`."""
    match = re.match("[A-z0-9_+]+", variant.quality)  # as in streamlink's Plugin.streams()
    if match is None:
        number = 1
        while f"variant-{number}" in taken:
            number += 1
        return f"variant-{number}"

    name = match[0].lower()
    if name not in taken:
        return name
    alternatives = [other for other in taken if other.startswith(f"{name}_alt")]
    if not alternatives:
        return f"{name}_alt"
    return f"{name}_alt{len(alternatives) + 1}"


def _with_aliases(streams: Mapping[str, Any]) -> Mapping[str, Any]:
    """Streams by name from the worst to the best, followed by the aliases `worst` and `best`.

    If no name has a known weight, the first stream is `best`: players choose that one, too.
    """

    def weight(name: str) -> float:
        return stream_weight(name)[0]

    names = sorted(streams, key=weight)
    weighed = [name for name in names if weight(name)]
    if weighed:
        worst, best = weighed[0], weighed[-1]
    else:
        worst, best = names[-1], names[0]
    found = {name: streams[name] for name in names}
    return found | {"worst": streams[worst], "best": streams[best]}


def _missing_name(attributes: Mapping[str, str]) -> str:
    """A NAME attribute for a rendition that has none: streamlink would drop the rendition."""
    if attributes.get("NAME"):
        return ""
    name = attributes.get("LANGUAGE") or attributes.get("TYPE") or ""
    return f',NAME="{name}"'


class Losses(NamedTuple):
    """The numbers of segments that tracks have lost."""

    gaps: int = 0  # left out or abandoned, each reported by an event
    skipped: int = 0  # not reported by any event


class SegmentReader(HLSStreamReader):
    """Reads one HLS stream.  If that is one of several tracks, streamlink's muxer calls read()."""

    def __init__(
        self,
        stream: Any,
        name: str | None,
        buffer: ReaderBuffer,
        first: int | None,
        is_film: bool,
        fail: weakref.WeakMethod[Callable[[str], None]] | None,
    ) -> None:
        self.opened = time.monotonic()
        self.first = first  # number of the segment to begin with, if the playlist lists it
        self.is_film = is_film  # viewers have all that is before `first`
        self.is_track = fail is not None
        self._fail_upstream = fail  # a track's: a weak reference to ProcessUpstream._fail
        self.start = b""  # the first bytes of media; empty until the writer's thread has some
        # Of a track.  The thread that reads it replaces these values; other threads read them.
        self._number: int | None = None  # of the segment being read; between two, of the next one
        self.losses = Losses()
        super().__init__(stream, name=name)
        self.timeout = 2.0  # seconds that close() waits for each of two threads
        self.buffer: Any = buffer  # replaces streamlink's

    def read(self, size: int) -> bytes:
        """Return the next bytes, about `size` at most; empty only after the end of the track.

        Blocks without a time limit, because the channel judges silence.  Reports a failure of the
        track before it returns empty bytes.
        """
        while not self.buffer.is_exhausted:
            pieces = []
            for item in self.buffer.take(size, None):
                if isinstance(item, SegmentEvent):
                    self._note(item)
                else:
                    pieces.append(item)
            if pieces:
                return b"".join(pieces)
        if self.buffer.failure:
            assert self._fail_upstream is not None, "only tracks are read"
            fail = self._fail_upstream()
            if fail is not None:  # otherwise the upstream was closed, and nothing refers to it
                fail(self.buffer.failure)
        return b""

    def _note(self, event: SegmentEvent) -> None:
        """Update the track's position and its losses."""
        expected = self._number
        if expected is None:
            expected = self.first
        gaps, skipped = self.losses
        if expected is not None and event.number > expected:
            skipped += event.number - expected
        if event.kind is EventKind.GAP:
            gaps += 1
        self.losses = Losses(gaps, skipped)
        if event.kind in (EventKind.INIT, EventKind.START):
            self._number = event.number
        else:  # the segment is over
            self._number = event.number + 1

    @property
    def number(self) -> int | None:
        """The number of the segment with which another opening begins; None if not known yet.

        For a complete track, that is its last segment, because ffmpeg needs media of every track.
        """
        if self._number is None:
            return None
        is_complete = self.buffer.closed and self.buffer.failure is None
        if is_complete:
            return self._number - 1
        return self._number

    @property
    def has_clock(self) -> bool:
        """Whether the track's media, or the tag in front of it, has timestamps."""
        has_tag = self.stream.packed_audio_timestamp is not None
        container = sniff(self.start, is_all=True)
        is_bare = container is not None and container.is_packed_audio
        return has_tag or not is_bare

    def fail(self, reason: str) -> None:
        """Break off for this reason; the worker calls it if it cannot queue any more segments."""
        self.buffer.end(reason)
        self.close()

    def abandon(self) -> None:
        """Tell the threads to end, and drop everything that they still write; returns at once."""
        self.buffer.discard()
        self.worker.closed = True
        self.worker._wait.set()

    def drop_references(self) -> None:
        """Drop the references of streamlink's threads to this reader and its bytes.

        Does nothing if one of the threads is still running.
        """
        if self.worker.is_alive() or self.writer.is_alive():
            return
        cast(Any, self.writer).downloads.clear()
        del self.worker.reader, self.worker.writer, self.writer.reader, self.buffer


LEAST_INTERVAL = 0.5  # seconds; the minimum between two loads of a playlist
LEAST_PLAYLIST_TIME = 4.0  # seconds after which an unanswered reload is requested again
MOST_LOADS = 64  # loads of a playlist while a segment plays
SHORT_PLAYLIST = 3  # segments; a playlist with fewer is loaded twice as often
# Successive playlists that end below the highest number seen, after which the origin must have
# restarted its numbering.  Fewer prove nothing: caches serve playlists a number or two old.
LOWER_PLAYLISTS = 3


class WatchedWorker(HLSStreamWorker):
    """Loads the playlist, and reports failures to the reader.

    It decides where to start and how often to load, and detects an origin that restarted its
    numbering.
    """

    reader: Any
    trouble: str | None = None  # why the newest playlist could not be loaded or used
    _is_loaded = False  # the first playlist has been loaded
    _is_empty = True  # the newest playlist lists no segments
    _newest = -1  # the highest number that a playlist has listed
    _lower_playlists = 0  # successive playlists that end below that number
    _patience = 0.0  # seconds for the next reload, unless the least time is longer
    _interval_divisor = 1  # of the interval between two loads; doubled whenever segments were lost
    segment_time: float | None = None  # measured seconds from one segment to the next
    # A time, and the newest number that the playlist listed then: where measuring began.
    _measured_from: tuple[float, int] | None = None

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            log.exception("the playlist thread died")
            self.reader.fail(explain(error))

    def reload(self) -> None:
        try:
            self._is_empty = True
            known = self.playlist_targetduration, self._reload_time
            super().reload()  # type: ignore[no-untyped-call]
            if self._is_empty and self._newest >= 0:  # an empty playlist states no durations
                self.playlist_targetduration, self._reload_time = known
            self._is_loaded = True
            self.trouble = EMPTY_PLAYLIST if self._is_empty else None
        except Exception as error:
            self.trouble = explain(error)
            if self.trouble in EXPIRED or not self._is_loaded:  # otherwise streamlink retries
                self.reader.fail(self.trouble)
            self.reader.buffer.wake()  # so the channel sees the trouble before a retry succeeds
            raise

    def _fetch_playlist(self) -> requests.Response:
        response = self._request_playlist()
        if is_short_text(response.content):
            raise EngineStreamError(SHORT_TEXT) from text_error(response.content)
        return response

    def _request_playlist(self) -> requests.Response:
        """Request the playlist; a reload that is not answered soon is requested once more.

        An origin that leaves one request unanswered often answers the next one at once.  Both
        requests share `timeout`, so this is no trouble yet.  A slow origin must get the time that
        it needs, so each time-out doubles the time for the first request.  Some origins answer only
        when they have a new segment, so a target duration is not enough.
        """
        http = cast(Http, self.session.http)
        target = float(self.playlist_targetduration or DEFAULT_TARGET)
        least = max(LEAST_PLAYLIST_TIME, 1.5 * target)
        patience = max(self._patience, least)
        if not self._is_loaded or patience >= http.timeout:
            return super()._fetch_playlist()
        began = time.monotonic()
        try:
            with http.timed(patience):
                response = super()._fetch_playlist()
        except Exception as error:
            if self.closed or explain(error) != TIMED_OUT:
                raise
        else:
            if time.monotonic() - began < least:
                self._patience = 0.0
            return response
        self._patience = 2 * patience
        left = began + http.timeout - time.monotonic()
        with http.timed(max(LEAST_TIMEOUT, left)):
            return super()._fetch_playlist()

    def process_segments(self, playlist: Any) -> None:
        """Use a playlist that lists segments, and decide when to load the next one."""
        self._is_empty = False
        first, last = playlist.segments[0].num, playlist.segments[-1].num
        is_start = self.sequence < 0
        if is_start and self.reader.first is not None:
            if self._lacks_the_rest(last, playlist.is_endlist):
                self.reader.fail(ENDED_BEFORE)
                return
            self._continue_another_opening(first, last)
        elif last < self._newest:
            playlist.is_endlist = False  # it is not the end of this stream
            self._lower_playlists += 1
            if self._lower_playlists == LOWER_PLAYLISTS or self.trouble:
                self.reader.fail("the origin restarted its numbering")
                return
        else:
            self._lower_playlists = 0

        self._newest = max(self._newest, last)
        is_skipping = 0 <= self.sequence < first
        if is_skipping and not self.trouble:  # losses in an outage are no reason to load more often
            self._interval_divisor = min(2 * self._interval_divisor, MOST_LOADS)
        self._measure(last, is_skipping)
        has_news = last >= self.sequence
        super().process_segments(playlist)
        self._reload_time = self._interval(playlist, has_news)

    def _lacks_the_rest(self, last: int, is_endlist: bool) -> bool:
        """Whether the playlist ends before the wanted segment, and will not continue.

        A film's viewers already have everything that it lists.  A complete playlist of a live
        stream is a recording that a provider shows while the channel is down.
        """
        wanted: int = self.reader.first
        if self.reader.is_film:
            return wanted > last + 1
        return is_endlist and wanted > last + 1 + STALE_NUMBERS

    def _continue_another_opening(self, first: int, last: int) -> None:
        """Start at the number that another opening reached, if it fits this playlist.

        `first` and `last` are the numbers that the playlist lists.  If it lags behind a little, the
        worker waits for the segment.
        """
        self.duration_offset_start = 0.0
        if first <= self.reader.first <= last + 1 + STALE_NUMBERS:
            self.sequence = self.reader.first

    def _measure(self, newest: int, is_skipping: bool) -> None:
        """Measure how long segments last, because the durations in the playlist may be wrong.

        If the numbers jump, start again: the origin may have renumbered its segments.
        """
        now = time.monotonic()
        if self._measured_from is None or is_skipping:
            self._measured_from = now, newest
            return
        began, oldest = self._measured_from
        if newest > oldest:
            self.segment_time = (now - began) / (newest - oldest)

    def _interval(self, playlist: Any, has_news: bool) -> float:
        """Seconds from this load of the playlist to the next.

        It is the newest segment's duration.  RFC 8216, 6.3.4, says the target duration, but many
        packagers declare a far longer one, in which a short playlist would drop segments.
        """
        if self.reload_time:  # set by the configuration or by a plugin
            return max(self._reload_time, LEAST_INTERVAL)
        seconds = float(min(playlist.segments[-1].duration, playlist.targetduration))
        if not has_news or len(playlist.segments) < SHORT_PLAYLIST:
            seconds /= 2
        return max(seconds / self._interval_divisor, LEAST_INTERVAL)


MISSING = frozenset(answered(status) for status in (404, 410))
REFUSALS = EXPIRED | NOT_MEDIA  # some panels send their error message with status 200
REFUSAL_TIME = 1.0  # seconds of refusals after which the address of a finite stream has expired
FRESH_TIME = 60.0  # seconds after an opening in which its addresses count as valid
START_MISSING = 3  # missing segments after which a start fails


class SegmentDownload(Download):
    """A writer's download of a segment or of an initialization section.

    One thread fills its buffer while another takes the bytes.  It has the methods of a requests
    response that streamlink calls.

    When a try fails (is_hopeless, Download) or is too slow (is_slow), the download is abandoned or
    retried:

      the playlist no longer lists the segment              abandoned
      refused at a start, and next to be handed on          abandoned, unless it may only be late
      refused for REFUSAL_TIME, and is_fatal() is true      abandoned
      answered without a byte for REFUSAL_TIME              abandoned
      no byte arrived within its patience                   abandoned
      otherwise                                             retried

    When an initialization section is abandoned, or its bytes are unusable, its upstream ends.  For
    a segment, is_fatal() decides:

      the origin is gone, and nothing else was answered     ends
      start: it is the third one missing, or the newest     ends
      finite: a connection failed                           ends, once for this segment
      finite: 404 or 410, not a track, no other answered    ends, once for this segment
      finite: the same, but a track, and others fail alike  ends, unless _needs_gap
      finite: nothing else was answered, others fail alike  ends
      finite: refused, and nothing else was answered        ends, once for this segment
      finite: nothing else was answered, others wait        ends, once for this segment
      otherwise                                             continues after a gap

    "Once" means: not if this opening began with the segment, and never for the segment of a track.
    """

    empty_time = REFUSAL_TIME

    def __init__(self, writer: DownloadingWriter, segment: Any, part: Any) -> None:
        self._writer = writer
        self._segment = segment
        self._is_map = part is not segment  # it is the segment's initialization section
        self.buffer = ReaderBuffer(BODY_LIMIT)
        self._content: bytes | None = None  # an initialization section, once it has been read
        request = functools.partial(writer.request, segment, part)
        super().__init__(request, writer.closing, writer.patience, part.byterange)
        if writer.must_decrypt(part.key):
            self.cipher_block = CIPHER_BLOCK

    @property
    def _others(self) -> list[SegmentDownload]:
        """The other downloads of its writer."""
        downloads = tuple(self._writer.downloads)  # a copy, because other threads change the list
        return [other for other in downloads if other is not self]

    @property
    def _is_newest(self) -> bool:
        """Whether the playlist lists no segment after this one."""
        listed = self._writer.reader.worker.playlist_segments
        return bool(self._segment.num >= listed[-1].num)

    def is_hopeless(self) -> bool:
        writer = self._writer
        if not writer.is_listed(self._segment):
            return True
        tries = self.tries
        if tries.failure not in REFUSALS:
            return False
        if not writer.is_start:
            is_lasting = tries.asked - tries.failing_since > REFUSAL_TIME
            return is_lasting and self.is_fatal(tries.failure)
        return writer.oldest is self and not self._may_be_late(tries.failure)

    def _may_be_late(self, failure: str | None) -> bool:
        """Whether the origin may have it soon: caches list the newest segment before they have it.

        At a start, this is false for the segment that would be the last of START_MISSING.
        """
        if failure != answered(404):
            return False
        is_last_chance = self._writer.missing >= START_MISSING - 1
        return self._is_map or (self._is_newest and not is_last_chance)

    def is_fatal(self, failure: str | None) -> bool:
        """Whether the upstream must end, because more than this one segment is affected.

        Call it when this segment cannot be fetched or is unusable.  `failure` is the failure of its
        newest try; None if that try was answered.
        """
        writer, tries = self._writer, self.tries
        nothing_else_answers = self._nothing_else_answers(tries, failure)
        if failure in NO_SERVER and nothing_else_answers:
            return True

        if writer.is_start:  # the next one may be there
            return writer.missing >= START_MISSING or self._is_newest
        if not writer.is_listed(self._segment):  # a live stream, even if it has ended since
            return False
        is_finite = writer.reader.worker.playlist_end is not None
        return is_finite and self._is_fatal_to_a_film(failure, nothing_else_answers)

    def _is_fatal_to_a_film(self, failure: str | None, nothing_else_answers: bool) -> bool:
        """Whether a finite source's upstream must end: the table's rows for "finite"."""
        writer = self._writer
        # A server that stops may still answer on open connections while it refuses new ones.
        if failure in NO_SERVER and self._can_resolve_again:
            return True
        if failure is None or not nothing_else_answers:
            return False

        others = [other.tries for other in self._others]
        fail_alike = any(other.failure == failure for other in others)
        if failure in MISSING:
            if writer.reader.is_track:
                return fail_alike and not self._needs_gap
            # Several segments in a row may be missing, so other failures prove nothing.
            return self._may_have_expired
        if fail_alike:
            return True

        # If only this segment is refused, although its address was just resolved for it, the
        # segment is missing.  The same holds for a track's segment, because a track cannot resume
        # at its position.  Any other failure may affect more than this segment if the download of
        # another one had not begun before the newest try of this one.
        if failure in REFUSALS:
            return self._may_have_expired
        asked = self.tries.asked
        has_waiting = any(not other.has_begun or other.began >= asked for other in others)
        return self._can_resolve_again and has_waiting

    @property
    def _can_resolve_again(self) -> bool:
        """Whether resolving the segment's address again may help."""
        reader = self._writer.reader
        is_first = self._segment.num == reader.first
        return not is_first and not reader.is_track

    @property
    def _needs_gap(self) -> bool:
        """Whether a track skips this missing segment, because a reopening would not help.

        Soon after an opening, addresses have probably not expired.  If the last segment is being
        fetched, all remaining ones may be missing.  Another opening would then fail: ffmpeg needs
        media of every track.
        """
        reader = self._writer.reader
        is_fresh = time.monotonic() - reader.opened < FRESH_TIME
        is_last_fetched = any(download._is_newest for download in (self, *self._others))
        return is_fresh or is_last_fetched

    @property
    def _may_have_expired(self) -> bool:
        """Whether a refusal may mean that its address has expired since the opening.

        Until an opening has passed on media, its addresses are new.  If the first of several
        missing segments caused a reopening, another reopening for the second one would begin with
        the first one again.
        """
        return self._can_resolve_again and bool(self._writer.reader.start)

    def _nothing_else_answers(self, tries: Tries, failure: str | None) -> bool:
        """Whether no other request was answered while this one failed.

        An older request proves nothing: a server that stops completes its running transfers first.
        On a busy machine, much time may pass between the beginning of a try and its connection, so
        a request counts only if it began after this one was seen to fail.

        At a start, and after a reopening for this segment, all requests begin at once, in any
        order, and the others may already be over.  So if the origin answers this request with a
        refusal, every other answered request of this opening counts; if there is no server, only
        requests that began after this one count.
        """
        others = [other.tries for other in self._others]
        if failure in REFUSALS and not self._may_have_expired:
            return not any(other.was_answered for other in others)

        since = tries.failing_since
        if self._can_resolve_again and not self._writer.is_start:
            since = tries.failed
        for other in others:
            if other.was_answered and since < other.answered < tries.asked:
                return False
        return True

    def is_slow(self) -> bool:
        """Whether it arrives more slowly than it plays, while a later request is twice as fast.

        The other download's size serves as an estimate of this one's, which may be unknown.
        """
        size = self._segment.duration * self.rate  # bytes that arrive in its playing time
        began = self.tries.began
        for other in self._others:
            is_later = other.tries.asked > began
            if is_later and other.size > size and other.rate > 2 * self.rate:
                return True
        return False

    def iter_content(self, chunk_size: int = 1) -> Iterator[bytes]:
        """Yield the bytes as they arrive; raises DownloadError if the rest cannot be fetched."""
        while not self.buffer.is_exhausted:
            yield from cast(list[bytes], self.buffer.take(PART_LIMIT, None))
        if self.buffer.failure:
            raise DownloadError(self.buffer.failure)

    def read_all(self) -> bytes:
        """Return the whole initialization section; blocks until it is fetched.

        Raises UpstreamError if it cannot be fetched.  May be called again.
        """
        if self._content is not None:
            return self._content
        content = b""
        try:
            for part in self.iter_content():
                content += part
                if len(content) > BODY_LIMIT:
                    raise DownloadError(f"it is larger than {BODY_LIMIT // MIB} MiB")
        except DownloadError as error:
            reason = f"the initialization section cannot be fetched: {error}"
            raise UpstreamError(reason) from error
        self._content = content
        return content


CIPHER_BLOCK = 16  # bytes of a block of AES
AES_128_KEY = 16  # bytes


def _deciphered(cipher: Any, encrypted: Iterable[bytes]) -> Iterator[bytes]:
    """Decrypt the bytes as they arrive, but hold back the last block, which has the padding.

    Some packagers, such as SRS, pad a segment only if its length is not a multiple of 16.  So a
    last block without padding is media, and so is one that looks like padding by chance, if a
    packet, a frame or a box ends with it.

    Raises DecryptionError if the bytes end within a block.
    """
    held = b""
    units = UnitCounter()
    for piece in encrypted:
        held += piece
        blocks = max(0, len(held) - 1) // CIPHER_BLOCK  # whole blocks followed by more bytes
        if blocks:
            size = blocks * CIPHER_BLOCK
            plain = cipher.decrypt(held[:size])
            units.feed(plain)
            yield plain
            held = held[size:]
    if len(held) != CIPHER_BLOCK:
        raise DecryptionError(CUT_SEGMENT)
    last = cipher.decrypt(held)
    units.feed(last)
    if not units.is_between_units:
        with contextlib.suppress(ValueError):  # it has no padding
            last = unpad(last, CIPHER_BLOCK, style="pkcs7")
    yield last


def _data_of(uri: str) -> bytes:
    """Return the bytes in a data: URI (RFC 2397); raises UpstreamError if it is malformed."""
    head, _, text = uri.partition(",")
    data = unquote_to_bytes(text)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(data + b"==")  # some origins omit the padding
    except binascii.Error as error:
        raise UpstreamError(NOT_A_KEY) from error


class QueuedSegment(NamedTuple):
    """A segment that the writer hands on in its turn: its download, or the event replacing it."""

    segment: Any  # streamlink's
    download: SegmentDownload | None = None
    init: SegmentDownload | None = None  # the initialization section to hand on before it
    event: EventKind | None = None  # if there is one, the segment is not downloaded


TROUBLE_TIME = 1.0  # seconds for which a segment's tries must fail before they show as trouble
UNREACHED = NO_SERVER | {TIMED_OUT}  # failures that show as trouble


class DownloadingWriter(HLSStreamWriter):
    """Runs up to `threads` downloads at once and hands on the oldest one's bytes as they arrive.

    A download begins only if at most `threads` others have begun and are not handed on yet, which
    bounds memory.  Further segments wait; the worker never does, because it must load playlists.
    A segment that left the playlist while it waited is requested once, because origins keep
    segments for longer than they list them.  If it needs a new initialization section, that section
    is probably gone, so the segment becomes a gap.

    Its thread moves the bytes from each download's buffer to the reader's.  A single buffer for all
    downloads would save this thread, but no CPU: the thread takes 4 % of the CPU for each GB, and
    reading without it took as much in all.
    """

    reader: Any

    def __init__(self, reader: Any, **arguments: Any) -> None:
        super().__init__(reader, **arguments)
        self.retries = 0  # streamlink's, for keys: close() could not interrupt its pauses
        self.is_start = reader.first is None  # a start, until its first media arrives
        self.missing = 0  # how many segments were abandoned
        self._map: SegmentDownload | None = None  # the newest initialization section
        self._map_place: object = None  # its address and byte range
        # Segments to hand on, in order; None: the end.
        self._queued: queue.SimpleQueue[QueuedSegment | None] = queue.SimpleQueue()
        self.closing = self._wait
        # _lock is held to change these, and to set `closing`.
        self._lock = threading.Lock()
        self._waiting: deque[Any] = deque()  # segments whose download has not begun; None: the end
        self.downloads: list[SegmentDownload] = []  # begun and not handed on yet, in order

    # The worker's thread

    def put(self, segment: Any) -> None:
        with self._lock:
            self._waiting.append(segment)
            self._begin_waiting()

    # Any thread; the caller holds _lock

    def _begin_waiting(self) -> None:
        """Begin the downloads of waiting segments while there is room."""
        while self._waiting and len(self.downloads) <= self.threads and not self.closing.is_set():
            segment = self._waiting.popleft()
            if segment is None:
                self._queued.put(None)
                continue
            event = self._replacing_event(segment)
            if event is not None:
                self._queued.put(QueuedSegment(segment, event=event))
                continue
            init = self._begin_map(segment) if segment.map else None
            download = self._begin(segment, segment)
            self._queued.put(QueuedSegment(segment, download, init))

    def _replacing_event(self, segment: Any) -> EventKind | None:
        """The event that replaces a segment if it must not be requested; None if it must."""
        if getattr(segment, "is_gap", False):  # a plugin's own segments may lack it
            return EventKind.GAP
        if self.should_filter_segment(segment):
            return EventKind.FILTERED
        if self.is_listed(segment) or not self._needs_map(segment):
            return None
        log.warning("abandoned segment %d: the playlist no longer lists it", segment.num)
        return EventKind.GAP

    def _needs_map(self, segment: Any) -> bool:
        """Whether the segment needs an initialization section other than the newest one."""
        if not segment.map:
            return False
        return self._map is None or self._map_place != (segment.map.uri, segment.map.byterange)

    def _begin_map(self, segment: Any) -> SegmentDownload | None:
        """Return the download of the initialization section to hand on before a segment, if any.

        A changed section is downloaded.  At a discontinuity, an unchanged one is handed on again.
        """
        if self._needs_map(segment):
            self._map = self._begin(segment, segment.map)
            self._map_place = segment.map.uri, segment.map.byterange
            return self._map
        if self._map is None or not segment.discontinuity:
            return None
        self.downloads.append(self._map)
        return self._map

    def _begin(self, segment: Any, part: Any) -> SegmentDownload:
        """Submit the download of a segment, or of its map, to the executor."""
        download = SegmentDownload(self, segment, part)
        self.downloads.append(download)
        self.executor.submit(fill, download.buffer, download.parts())
        return download

    # The downloads' threads

    def request(
        self, segment: Any, part: Any, headers: Mapping[str, str], timeout: float
    ) -> requests.Response:
        """Request a segment, or its map if that is `part`.

        A segment is requested at its address in the newest playlist, because the tokens in
        addresses are valid only for seconds.
        """
        address = part.uri
        if part is segment:
            for listed in self.reader.worker.playlist_segments:
                if (listed.num, listed.byterange) == (segment.num, segment.byterange):
                    address = listed.uri
                    break
        arguments = {**self.reader.request_params, "url": address}
        return cast(Http, self.session.http).ask(arguments, headers, min(timeout, self.timeout))

    # Any thread

    def patience(self) -> float:
        """Seconds without a new byte after which a download, or a key, is abandoned."""
        worker = self.reader.worker
        is_finite = worker.playlist_end is not None
        if is_finite:
            return float(self.timeout)
        target = worker.playlist_targetduration or 1.0  # 0: none was loaded yet
        return 2 * float(target)

    @property
    def oldest(self) -> SegmentDownload | None:
        """The download being handed on, or the next one; None if none has begun."""
        first = self.downloads[:1]  # one step, because other threads change the list
        return first[0] if first else None

    @property
    def trouble(self) -> str | None:
        """Why the server of the oldest download is unreachable; None if it is reachable.

        Failures count only after TROUBLE_TIME.
        """
        download = self.oldest
        if download is None:
            return None
        tries = download.tries
        is_lasting = time.monotonic() - tries.failing_since > TROUBLE_TIME
        if is_lasting and tries.failure in UNREACHED:
            return tries.failure
        return None

    def is_listed(self, segment: Any) -> bool:
        """Whether the newest playlist lists the segment, or may list it later."""
        listed = self.reader.worker.playlist_segments
        return not listed or segment.num >= listed[0].num

    # Its own thread

    def run(self) -> None:
        fill(self.reader.buffer, self._items())
        self.reader.buffer.event_used.set()
        self.close()

    def _items(self) -> Items:
        """Yield all events and bytes in order; raises UpstreamError if the stream breaks off."""
        while (queued := self._queued.get()) is not None:
            if queued.event is not None:
                yield SegmentEvent(queued.event, queued.segment.num)
            if queued.download is not None:
                yield from self._items_of(queued.segment, queued.init, queued.download)
                self._forget(queued.download)
        worker = self.reader.worker
        if worker.playlist_end is None or worker.sequence <= worker.playlist_end:
            raise UpstreamError(NO_MORE_SEGMENTS)

    def _items_of(
        self, segment: Any, init: SegmentDownload | None, download: SegmentDownload
    ) -> Items:
        try:
            if init:
                yield SegmentEvent(EventKind.INIT, segment.num, segment.discontinuity)
                yield from self._init(segment, init)
                self._forget(init)
            duration = segment.duration if segment.duration > 0 else None
            yield SegmentEvent(EventKind.START, segment.num, segment.discontinuity, duration)
            for piece in self._media(segment, download):
                self.is_start = False
                if not self.reader.start:
                    self.reader.start = piece
                yield piece
                self.reader.buffer.event_used.set()
            yield SegmentEvent(EventKind.END, segment.num)
        except UpstreamError:
            raise
        except Exception as error:
            download.buffer.discard()  # no thread will take the rest

            reason = explain(error)
            failure = download.tries.failure
            if isinstance(error, DecryptionError):  # its newest try was answered
                failure = None
            self.missing += 1
            if download.is_fatal(failure):
                raise UpstreamError(reason) from error

            is_closed = cast(Http, self.session.http).closed.is_set() or self.closing.is_set()
            if not is_closed:  # otherwise we caused the failure ourselves
                log.warning("abandoned segment %d: %s", segment.num, reason)
            yield SegmentEvent(EventKind.GAP, segment.num)

    def _init(self, segment: Any, init: SegmentDownload) -> Iterator[bytes]:
        """Yield an initialization section, decrypted.

        Raises UpstreamError on any failure, because nothing plays without it.
        """
        try:
            yield from self._decrypted(segment.map.key, segment.num, [init.read_all()])
        except DecryptionError as error:
            raise UpstreamError(explain(error)) from error

    def _forget(self, download: SegmentDownload) -> None:
        """Remove a download that has been handed on, which makes room for another."""
        with self._lock:
            self.downloads.remove(download)
            self._begin_waiting()

    def _media(self, segment: Any, download: SegmentDownload) -> Iterator[bytes]:
        """Yield a segment's media: decrypted, without an image or tags in front of it."""
        encrypted = self.iter_segment_content(segment, cast(Any, download))
        pieces = behind_image(self._decrypted(segment.key, segment.num, encrypted))
        if self.reader.is_track and self.stream.parse_packed_audio:
            start, pieces = itertools.tee(pieces)  # `pieces` restarts if the tags are unreadable
            with contextlib.suppress(ID3v2Error):  # tags before version 4, which stay in the media
                pieces = self._parse_packed_audio_timestamp(start)
        return pieces

    def must_decrypt(self, key: Any) -> bool:
        """Whether a segment or a map that has this key (streamlink's) must be decrypted."""
        return bool(key) and key.method != "NONE" and not self.passthrough_encrypted

    def _decrypted(self, key: Any, number: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Decrypt AES-128-CBC as the bytes arrive; raises DecryptionError if the key is wrong.

        Holds back the first bytes until they prove that the key is right, so that no viewer
        receives noise.
        """
        if not self.must_decrypt(key):
            yield from pieces
            return
        decrypted = _deciphered(self._decryptor(key, number), pieces)
        start = b""
        media = None  # the media in `start`; None until that is known
        for piece in decrypted:
            start += piece
            media = media_in(start)
            if media is not None:
                break
        if media is None:
            media = media_in(start, is_all=True) or b""
        if start and not media:
            self.key_uri = None  # a restarted encoder uses a new key at the same address
            raise DecryptionError(WRONG_KEY)
        if media:
            yield media
        yield from decrypted

    def _decryptor(self, key: Any, number: int) -> Any:
        """Return a cipher for a segment, fetching its key; blocks meanwhile.

        A stream cannot continue without its key, so failed requests are retried for as long as
        those of a segment.  Raises UpstreamError after that, or at once if no retry can help.
        """
        is_open = key.key_format in (None, "", "identity") or bool(self.key_uri_override)
        if key.method != "AES-128" or not is_open:
            raise UpstreamError(f"{DRM_PROTECTED} ({key.method}) and cannot be played")
        deadline = time.monotonic() + self.patience()
        for pause in pauses(RETRY_PAUSES):
            try:
                seconds = max(LEAST_TIMEOUT, self.patience() / 2)
                with cast(Http, self.session.http).timed(seconds):
                    return self._cipher(key, number)
            except Exception as error:
                self.key_uri = None  # otherwise a wrong answer would be kept as the key
                reason = explain(error)
                is_final = reason in HOPELESS_KEY or (self.is_start and reason in EXPIRED)
                is_late = time.monotonic() + pause > deadline
                if is_final or is_late or not self.wait(pause):
                    raise UpstreamError(f"the key cannot be fetched: {reason}") from error
        raise AssertionError("the pauses never end")

    def _cipher(self, key: Any, number: int) -> Any:
        """Return streamlink's cipher for a key, which may end in a line break or be a data: URI.

        Raises UpstreamError if it is not an AES-128 key.
        """
        is_data = bool(key.uri) and key.uri.lower().startswith("data:")
        if is_data and not self.key_uri_override:
            self.key_data = _data_of(key.uri)
            self.key_uri = key.uri  # so that streamlink uses key_data
        cipher = None
        with contextlib.suppress(ValueError):  # AES has no key of that length
            cipher = self.create_decryptor(key, number)
        if cipher and len(self.key_data) == AES_128_KEY:
            return cipher
        line_end = self.key_data[AES_128_KEY:]
        if line_end not in (b"\n", b"\r", b"\r\n"):
            raise UpstreamError(NOT_A_KEY)  # includes 24 and 32 bytes, which other kinds of AES use
        self.key_data = self.key_data[:AES_128_KEY]
        return self.create_decryptor(key, number)

    # Any thread

    def close(self) -> None:
        """Wake all threads that wait here, drop all bytes not taken, and close as streamlink does.

        The first call blocks until the executor's threads have ended.
        """
        with self._lock:
            self.closing.set()
            for download in self.downloads:
                download.buffer.discard()
        self._map = None
        self._queued.put(None)
        super().close()


def is_body(stream: Any) -> bool:
    """Whether a stream is one HTTP body: neither a playlist nor a manifest leads to its media."""
    return isinstance(stream, HTTPStream) and not isinstance(stream, HLSStream)


def length_of(response: requests.Response) -> int | None:
    """The size of a body in bytes; 0 if it is finite, but its size is unknown; None if live."""
    length: str | None = response.headers.get("Content-Length")
    if length is None:
        return None
    if not length.isdecimal():
        return 0
    return int(length)


def body_parts(session: Session, arguments: Mapping[str, Any], opened: Opened) -> Iterator[bytes]:
    """Yield a body as it arrives; a finite one is resumed if it breaks off.

    `arguments` are those of its request.  Raises DownloadError if a finite body cannot be resumed,
    UpstreamError when a live body ends, and any error of reading a live body.
    """
    # The request's time-out was that of the opening, which may have had only a part of `timeout`.
    timeout: float = session.engine.get_option("stream-segment-timeout")
    response, start = opened
    if length_of(response) is None:
        session.http.let_bodies_pause(timeout + 2 * JUDGE_GRACE)  # the channel judges silence
        yield from parts_of(response, session.read_size, start)
        raise UpstreamError(CONNECTION_CLOSED)

    def patience() -> float:
        # A stalled body is noticed after `timeout`; the rest is for one retry.
        return timeout + JUDGE_GRACE / 2

    ask = functools.partial(session.http.ask, arguments)
    download = Download(ask, session.closed, patience, opened=opened, trusts_length=True)
    yield from download.parts()


class RawUpstream(Upstream):
    """A plain HTTP body.

    With a Content-Length it is one segment of a finite stream, and is resumed if it breaks off;
    without one it is live.
    """

    def __init__(
        self,
        session: Session,
        arguments: Mapping[str, Any],
        opened: Opened,
        resumption: Resumption | None,
    ) -> None:
        super().__init__(session)
        self._response, _ = opened
        self._files.append(self._response)
        self._parts = body_parts(session, arguments, opened)
        least = 0  # bytes; a recording that is still being made may be longer than before
        if resumption and resumption.is_film and resumption.length:
            least = resumption.length
        if (self.length or 0) < least:
            raise UpstreamError(OTHER_FILE)

    @property
    def is_finite(self) -> bool:
        return self.length is not None

    @property
    def length(self) -> int | None:
        return length_of(self._response)

    @property
    def media_type(self) -> str:
        return self._response.headers.get("Content-Type", "")

    def _items(self) -> Items:
        if not self.is_finite:
            yield from self._parts
            return
        yield SegmentEvent(EventKind.START, 0)
        yield from self._parts
        yield SegmentEvent(EventKind.END, 0)


class BodyReader(io.IOBase):
    """Reads one HTTP body as a track.  A thread of streamlink's muxer calls read()."""

    def __init__(
        self,
        session: Session,
        arguments: Mapping[str, Any],
        opened: Opened,
        fail: weakref.WeakMethod[Callable[[str], None]],
    ) -> None:
        self._response, _ = opened
        self._parts = body_parts(session, arguments, opened)
        self._fail_upstream = fail  # a weak reference to ProcessUpstream._fail

    @property
    def is_finite(self) -> bool:
        return length_of(self._response) is not None

    def open(self) -> BodyReader:
        """Take the place of a stream's open(); the body was requested before."""
        return self

    def read(self, size: int) -> bytes:
        """Return the next bytes, of any number; empty only after the end of the track.

        Blocks until some arrive.  Reports a failure before it returns empty bytes.
        """
        try:
            return next(self._parts, b"")
        except Exception as error:  # of the download, requests, urllib3 or the system
            fail = self._fail_upstream()
            if fail is not None:  # otherwise the upstream was closed, and nothing refers to it
                fail(explain(error))
            return b""

    def close(self) -> None:
        self._response.close()
        super().close()


def leave_out(stream: Any, places: Collection[int]) -> None:
    """Remove tracks from a muxed stream by their positions, before or after it is opened."""
    tracks = [*stream.substreams, *stream.subtitles.values()]
    kept = [place for place in range(len(tracks)) if place not in places]
    kept_tracks = [tracks[place] for place in kept]
    stream.substreams = [track for track in stream.substreams if track in kept_tracks]
    subtitles = {}
    for language, track in stream.subtitles.items():
        if track in kept_tracks:
            subtitles[language] = track
    stream.subtitles = subtitles

    # ffmpeg numbers its inputs in order, so the tracks after one that is left out move up.
    new_numbers = {str(old): str(new) for new, old in enumerate(kept)}
    maps = []
    for entry in stream.options.get("maps", []):
        number, colon, rest = str(entry).partition(":")
        if number in new_numbers:
            maps.append(new_numbers[number] + colon + rest)
    stream.options["maps"] = maps

    offsets = stream.options.get("itsoffset")
    if offsets:
        stream.options["itsoffset"] = [offsets[place] for place in kept]

    metadata = {}
    for key, value in stream.options.get("metadata", {}).items():
        if not key.startswith("s:s:"):  # of a subtitle
            metadata[key] = value
    for place, language in enumerate(subtitles):
        metadata[f"s:s:{place}"] = [f"language={language}"]
    stream.options["metadata"] = metadata


class ProcessUpstream(Upstream):
    """Tracks that ffmpeg muxes, or anything else that streamlink opens as a file."""

    def __init__(
        self,
        session: Session,
        stream: Any,
        resumption: Resumption | None,
    ) -> None:
        super().__init__(session)
        self._stream = stream
        self._is_start = resumption is None
        self._is_film = False
        self._first: Sequence[int] = ()  # the number of the segment with which each track begins
        if resumption:
            self._is_film = resumption.is_film
            self._first = resumption.tracks
            self.left_out = resumption.left_out
        self._file: Any = None
        self._bodies: list[BodyReader] = []
        self._failure: str | None = None  # of a track
        self._first_failure = threading.Lock()  # the first track that fails takes and keeps it

    @property
    def is_finite(self) -> bool:
        if not all(body.is_finite for body in self._bodies):
            return False
        if self._bodies and not self.workers:
            return True
        return super().is_finite

    def open_bodies(self) -> None:
        """Request the tracks that are HTTP bodies, except subtitles, which are not media.

        Also raises UpstreamError if viewers have a part of the film, because ffmpeg's output cannot
        continue within a body.
        """
        if not isinstance(self._stream, MuxedStream):
            return
        for track in self._stream.substreams:
            if not is_body(track):
                continue
            if self._is_film:
                raise UpstreamError(NOT_RESUMABLE)
            opened = self.session.open_raw(track.args)
            body = BodyReader(self.session, track.args, opened, weakref.WeakMethod(self._fail))
            self._files.append(body)
            self._bodies.append(body)
            track.open = body.open

    def start(self) -> None:
        stream = self._stream
        if isinstance(stream, MuxedStream):
            leave_out(stream, self.left_out)
            self._prepare_tracks(stream)
            files = self._open_tracks(stream)
            self._file = self._make_muxer(stream, files)
            self._files.append(self._file)
            self._file.open()
        else:
            self._remember(stream)
            self._file = stream.open()
            self._files.append(self._file)
        super().start()

    @property
    def _tracks(self) -> list[SegmentReader]:
        return [file for file in self._files if isinstance(file, SegmentReader)]

    @property
    def tracks(self) -> Sequence[int]:
        """The number with which each track begins in another opening; empty if one is unknown.

        ffmpeg reads some tracks further ahead than others, so all tracks begin with the segment of
        the one that is furthest behind.  A track more than TRACK_LEAD ahead of it keeps its own
        number: its packager numbers the renditions independently.
        """
        numbers = []
        for track in self._tracks:
            number = track.number
            if number is None:
                return ()
            numbers.append(number)

        least = min(numbers, default=0)
        starts = []
        for number in numbers:
            is_independent = number - least > TRACK_LEAD
            if is_independent:
                starts.append(number)
            else:
                starts.append(least)
        return starts

    @property
    def losses(self) -> Losses:
        gaps, skipped = 0, 0
        for track in self._tracks:
            losses = track.losses
            gaps += losses.gaps
            skipped += losses.skipped
        return Losses(gaps, skipped)

    def _prepare_tracks(self, stream: Any) -> None:
        tracks = (*stream.substreams, *stream.subtitles.values())
        for index, track in enumerate(tracks):
            if is_body(track) and track in stream.substreams:
                continue  # open_bodies() has noted its file
            if isinstance(track, HLSStream):
                first = None
                if index < len(self._first):
                    first = self._first[index]
                buffer = ReaderBuffer(self.buffer.limit)
                fail = weakref.WeakMethod(self._fail)
                use_own_reader(
                    track,
                    self.session,
                    f"--{index}",
                    buffer=buffer,
                    first=first,
                    is_film=self._is_film,
                    fail=fail,
                )
            self._remember(track)

    def _open_tracks(self, stream: Any) -> Sequence[Any]:
        """Open all tracks, and return the files of those to play.

        Blocks until each track has media or has failed; at a start, for at most half of the time
        that is left.  A track without media by then is left out if the picture has media.  Raises
        UpstreamError if a track that cannot be left out failed.
        """
        if self._is_start:
            engine = self.session.engine
            most = min(engine.get_option("stream-timeout"), self.session.remaining / 2)
            engine.set_option("stream-timeout", most)

        files: Sequence[Any] = stream._open_streams()
        picture, *others = files
        for track in files:
            is_failed = isinstance(track, SegmentReader) and bool(track.buffer.failure)
            is_needed = track is picture or not self._is_start
            if is_failed and is_needed and not track.start:
                raise UpstreamError(track.buffer.failure)

        has_picture = isinstance(picture, SegmentReader) and bool(picture.start)
        if not (self._is_start and has_picture):
            return files

        unused = [file for file in others if isinstance(file, SegmentReader) and not file.start]
        if unused:
            self._do_without(stream, files, unused)
        return [file for file in files if file not in unused]

    def _do_without(
        self, stream: Any, files: Sequence[Any], unused: Sequence[SegmentReader]
    ) -> None:
        """Leave out the unused tracks, which have no media, and note what is missing."""
        sounds = files[1 : len(stream.substreams)]
        missing = [file in unused for file in sounds]
        if not any(missing):
            self.missing = "no subtitles"
        elif all(missing):
            self.missing = "no sound"
        else:
            self.missing = "some audio tracks are missing"

        for file in unused:
            worker = cast(WatchedWorker, file.worker)
            reason = file.buffer.failure or worker.trouble or TIMED_OUT
            log.warning("%s: left out a track: %s", self.session.name, reason)
            file.abandon()
            self._files.remove(file)
        self._unused += unused
        self.left_out = [place for place, file in enumerate(files) if file in unused]
        leave_out(stream, self.left_out)

    def _make_muxer(self, stream: Any, files: Sequence[Any]) -> Any:
        """Prepare ffmpeg, with the options that keep the tracks in sync.

        Without these options, ffmpeg moves the start of each track to 0, regardless of where in its
        playlist the track began.  -copyts prevents that, but loses sound when clocks restart, so it
        is used only if ffmpeg has no -isync (before 5.1).
        """
        version = [int(number) for number in re.findall(r"\d+", FFMPEGMuxer.FFMPEG_VERSION or "")]
        lacks_isync = bool(version) and version < [5, 1]
        stream.options["copyts"] = lacks_isync
        muxer: Any = FFMPEGMuxer(self.session.engine, *files, **stream.options)
        self.is_clean = "-copyts" not in muxer._cmd  # the configuration may set it, too
        for file, pipe in zip(files[1:], muxer.pipes[1:], strict=True):
            if self.is_clean and isinstance(file, SegmentReader) and file.has_clock:
                place = muxer._cmd.index(str(pipe.path)) - 1  # of its -i
                muxer._cmd.insert(place, "-isync")
                muxer._cmd.insert(place + 1, "0")
        return muxer

    def _fail(self, reason: str) -> None:
        """A track failed: let ffmpeg write what it has read, then stop it.

        Blocks for MUXER_LAG at most.  Only the first track's failure counts.
        """
        is_closed = self.session.closed.wait(MUXER_LAG)
        if is_closed or not self._first_failure.acquire(blocking=False):
            return
        self._failure = reason
        process = self._file.process
        if process:  # close() may end it meanwhile
            process.terminate()  # only once: at a second signal, ffmpeg would drop what it has read
        for track in self._tracks:
            track.buffer.discard()

    def _items(self) -> Items:
        process: Any = None
        read = self._file.read
        if isinstance(self._file, FFMPEGMuxer):
            process = self._file.process
            read = process.stdout.read1
        yield from iter(functools.partial(read, READ_SIZE), b"")
        if self._failure:
            raise UpstreamError(self._failure)
        if process and process.wait():
            raise UpstreamError(FFMPEG_FAILED)
        if not self.is_finite:
            raise UpstreamError(CONNECTION_CLOSED)


# --------------------------------------------------------------------------------------------------
# Splicer: joins several openings of an upstream into one stream
#
# The values of SpliceState and Arrival explain their members.  The table in Splicer's docstring
# gives the step for each pair of an arrival and a state; STEPS is that table as code.
# --------------------------------------------------------------------------------------------------


class InsertFilter:
    """Leaves out inserts: segments in a container other than the channel's.  Each becomes a gap.

    Holds back the first bytes of a segment until its container is known.  Bytes outside segments
    pass.  A channel's thread owns it.
    """

    def __init__(self, container: Container) -> None:
        self._container = container
        self._init: list[bytes | SegmentEvent] = []  # an initialization section, with its event
        self._held: list[bytes | SegmentEvent] = []  # a segment whose container is not known yet
        self._start = b""  # the bytes of that segment
        self._is_leaving_out = False  # the open segment is left out
        self.insert_container: Container | None = None  # of the newest segment, if it is an insert

    def pass_on(self, items: Iterable[bytes | SegmentEvent]) -> list[bytes | SegmentEvent]:
        """Take items, and return all that can be passed on now, without inserts."""
        passed: list[bytes | SegmentEvent] = []
        for item in items:
            if isinstance(item, bytes):
                passed += self._take_bytes(item)
            elif item.kind is EventKind.INIT:
                self._init = [item]
            elif item.kind is EventKind.START:
                self._start_segment(item)
            else:
                passed += self._end_segment(item)
        return passed

    def _start_segment(self, event: SegmentEvent) -> None:
        self._held = [*self._own_init(), event]
        self._start = b""
        self._init = []

    def _end_segment(self, event: SegmentEvent) -> list[bytes | SegmentEvent]:
        """Return the rest of the open segment, and its end: a gap if the segment was left out."""
        passed = self._pass_held(is_all=True)
        if self._is_leaving_out:
            self._is_leaving_out = False
            event = replace(event, kind=EventKind.GAP)
        return [*passed, event]

    def _own_init(self) -> list[bytes | SegmentEvent]:
        """The held initialization section; empty if it belongs to an insert.

        A playlist may still name an insert's section after the insert.
        """
        data = b"".join(item for item in self._init if isinstance(item, bytes))
        container = sniff(data, is_all=True)
        if not self._fits(container):
            return []
        return self._init

    def _take_bytes(self, data: bytes) -> list[bytes | SegmentEvent]:
        if self._is_leaving_out:
            return []
        if self._init:
            self._init.append(data)
            return []
        if not self._held:
            return [data]
        self._held.append(data)
        self._start += data
        return self._pass_held(is_all=False)

    def _pass_held(self, is_all: bool) -> list[bytes | SegmentEvent]:
        """Return the held segment once its container is known; empty if it is left out.

        `is_all`: no more bytes of the segment will arrive.
        """
        if not self._held:
            return []
        container = sniff(self._start, is_all)
        if container is None:
            return []
        held, self._held = self._held, []
        if self._fits(container):
            self.insert_container = None
            return held
        self.insert_container = container
        self._is_leaving_out = True
        return []

    def _fits(self, container: Container | None) -> bool:
        """Whether it is the channel's container, or one of the two is unknown media."""
        if OTHER_MEDIA in (container, self._container):
            return True
        return container is self._container


class SpliceState(enum.Enum):
    PASSING = "bytes go to the framer, which may be shut"
    BETWEEN = "a new opening; viewers have whole segments"
    WITHIN = "a new opening; viewers have the beginning of the wanted segment"
    LOST = "a new opening, which cannot continue what viewers have"
    COMPARING = "the open segment arrives again: it may be the same up to the viewers' place in it"
    SKIPPING = "the open segment is other media: its bytes are dropped"


REOPENED = frozenset({SpliceState.BETWEEN, SpliceState.WITHIN, SpliceState.LOST})


class Arrival(enum.Enum):
    OPENING = "an opening; viewers have whole segments"
    OPENING_WITHIN = "an opening; viewers have the beginning of a segment, or no segments"
    OPENING_SHUT = "an opening; the framer is shut, so the last bytes did not reach viewers"
    WANTED = "the wanted segment starts: the one that follows the last, or the open one again"
    CHANGED = "the wanted segment starts, and its initialization section is new"
    OTHER = "another segment starts"
    BYTES = "bytes"
    SAME = "bytes; all that viewers have of the open segment was the same"
    DIFFERENT = "bytes; what viewers have of the open segment was different"
    END = "the segment is complete"
    GAP = "the rest of the wanted segment is missing, or all of it was left out"
    OTHER_GAP = "another segment is missing, or was left out"


class SpliceStep(NamedTuple):
    to: SpliceState
    is_seam: bool = False  # the next bytes do not continue those that viewers have


_PASSING = SpliceStep(SpliceState.PASSING)
_BETWEEN = SpliceStep(SpliceState.BETWEEN)
_WITHIN = SpliceStep(SpliceState.WITHIN)
_LOST = SpliceStep(SpliceState.LOST)
_COMPARE = SpliceStep(SpliceState.COMPARING)
_SKIP = SpliceStep(SpliceState.SKIPPING)
_SEAM_PASS = SpliceStep(SpliceState.PASSING, is_seam=True)
_SEAM_SKIP = SpliceStep(SpliceState.SKIPPING, is_seam=True)

# The steps for each arrival, in the order of SpliceState.  None: the pair cannot happen.
_ROWS: Mapping[Arrival, Sequence[SpliceStep | None]] = {
    #                       PASSING   BETWEEN     WITHIN      LOST        COMPARING   SKIPPING
    Arrival.OPENING:        (_BETWEEN, _BETWEEN,   _WITHIN,    _LOST,      _WITHIN,    _LOST),
    Arrival.OPENING_WITHIN: (_WITHIN,  _BETWEEN,   _WITHIN,    _LOST,      _WITHIN,    _LOST),
    Arrival.OPENING_SHUT:   (_LOST,    _BETWEEN,   _WITHIN,    _LOST,      _WITHIN,    _LOST),
    Arrival.WANTED:         (_PASSING, _PASSING,   _COMPARE,   _SEAM_PASS, _PASSING,   _PASSING),
    Arrival.CHANGED:        (_PASSING, _PASSING,   _SEAM_SKIP, _SEAM_PASS, _PASSING,   _PASSING),
    Arrival.OTHER:          (_PASSING, _SEAM_PASS, _SEAM_PASS, _SEAM_PASS, _PASSING,   _PASSING),
    Arrival.BYTES:          (_PASSING, _SEAM_PASS, _SEAM_PASS, _SEAM_PASS, _COMPARE,   _SKIP),
    Arrival.SAME:           (None,     None,       None,       None,       _PASSING,   None),
    Arrival.DIFFERENT:      (None,     None,       None,       None,       _SEAM_SKIP, None),
    Arrival.END:            (_PASSING, _LOST,      _LOST,      _LOST,      _SEAM_SKIP, _SKIP),
    Arrival.GAP:            (_PASSING, _BETWEEN,   _LOST,      _LOST,      _SEAM_SKIP, _SKIP),
    Arrival.OTHER_GAP:      (_PASSING, _LOST,      _LOST,      _LOST,      _SEAM_SKIP, _SKIP),
}  # fmt: skip


def _steps_of(
    rows: Mapping[Arrival, Sequence[SpliceStep | None]],
) -> dict[tuple[Arrival, SpliceState], SpliceStep]:
    """Index the steps of these rows by arrival and state."""
    steps = {}
    for arrival, row in rows.items():
        for state, step in zip(SpliceState, row, strict=True):
            if step is not None:
                steps[arrival, state] = step
    return steps


STEPS = _steps_of(_ROWS)


class Splicer:
    """Passes one channel's bytes from its upstreams to its window, without repeats at the seams.

    A channel's thread owns it.  Columns are the current states, rows the arrivals, and each cell is
    the next state; `*` marks a seam, `-` a pair that cannot happen:

        arrival         PASSING    BETWEEN    WITHIN     LOST       COMPARING  SKIPPING
        OPENING         BETWEEN    BETWEEN    WITHIN     LOST       WITHIN     LOST
        OPENING_WITHIN  WITHIN     BETWEEN    WITHIN     LOST       WITHIN     LOST
        OPENING_SHUT    LOST       BETWEEN    WITHIN     LOST       WITHIN     LOST
        WANTED          PASSING    PASSING    COMPARING  PASSING*   PASSING    PASSING
        CHANGED         PASSING    PASSING    SKIPPING*  PASSING*   PASSING    PASSING
        OTHER           PASSING    PASSING*   PASSING*   PASSING*   PASSING    PASSING
        BYTES           PASSING    PASSING*   PASSING*   PASSING*   COMPARING  SKIPPING
        SAME            -          -          -          -          PASSING    -
        DIFFERENT       -          -          -          -          SKIPPING*  -
        END             PASSING    LOST       LOST       LOST       SKIPPING*  SKIPPING
        GAP             PASSING    BETWEEN    LOST       LOST       SKIPPING*  SKIPPING
        OTHER_GAP       PASSING    LOST       LOST       LOST       SKIPPING*  SKIPPING

    A seam shuts the framer of MPEG-TS, which then drops packets until a decoder can start; other
    containers pass.  If bytes arrive in a new opening before any segment, its source is a relay.
    """

    def __init__(self, window: Window, container: Container) -> None:
        self._window = window
        self._container = container
        self.number: int | None = None  # of the wanted or open segment; None without segments
        self._is_clean = False  # a decoder can start with the first byte of the newest opening
        self._framer = container.framer()
        self._filter = InsertFilter(container)
        self._state = SpliceState.PASSING
        self._passed = Fingerprint()  # of the bytes of the open segment that viewers have
        self._repeat = Repeat(self._passed)
        self._init_section: bytes | None = None  # the newest that viewers have
        self._new_init_section: bytearray | None = None  # the one that is arriving

    def __repr__(self) -> str:
        return f"<Splicer {self._state.name} at {self.number}+{self._passed.size}>"

    @property
    def unplayed(self) -> Sequence[str]:
        return self._framer.unplayed

    @property
    def insert_container(self) -> Container | None:
        """The container of the newest segment, if it was left out because of that container."""
        return self._filter.insert_container

    @property
    def is_skipping(self) -> bool:
        """Whether the end of the newest segment was not passed on, because it was other media."""
        return self._state is SpliceState.SKIPPING

    def resume(self, is_clean: bool = False) -> None:
        """Prepare for the items of a new opening.

        `is_clean`: a decoder can start with its first byte.  It has a clock of its own, so its DTS
        cannot show which media viewers already have.
        """
        self._is_clean = is_clean
        self._filter = InsertFilter(self._container)
        self._new_init_section = None
        if self._framer.is_shut:
            self._step(Arrival.OPENING_SHUT)
        elif self._passed.size:
            self._step(Arrival.OPENING_WITHIN)
        else:
            self._step(Arrival.OPENING)
        if self._state is SpliceState.LOST:
            self._passed = Fingerprint()

    def without_inserts(self, items: Iterable[bytes | SegmentEvent]) -> list[bytes | SegmentEvent]:
        """Return the items that can be passed on; the filter leaves out or holds back the rest."""
        return self._filter.pass_on(items)

    def pass_event(self, event: SegmentEvent) -> int:
        """Process an event; returns how many segments before it were lost without an event."""
        if event.kind is EventKind.INIT:
            self._new_init_section = bytearray()
            return 0
        skipped = 0
        if self.number is not None:
            skipped = max(0, event.number - self.number)
        if event.kind is EventKind.START:
            self._start_segment(event)
        else:
            self._end_segment(event)
        return skipped

    def pass_bytes(self, data: bytes) -> bool:
        """Pass on the bytes that viewers do not have yet; returns whether there were any.

        Blocks while Window.append() waits for a viewer.
        """
        if self._new_init_section is not None:
            self._new_init_section += data
            return False
        if self._state is SpliceState.COMPARING:
            data = self._compare(data)
        else:
            if self._state in REOPENED:  # bytes arrived before a segment, so this opening has none
                self.number = None
            self._step(Arrival.BYTES)
        if self._state is not SpliceState.PASSING:
            return False
        self._passed.add(data)
        self._window.append(self._framer.feed(data))
        return bool(data) and not self._framer.is_shut

    def _compare(self, data: bytes) -> bytes:
        """Compare bytes of the open segment with those that viewers have; returns the new ones."""
        assert self.number is not None
        new = self._repeat.pass_on(data)  # empty until everything that viewers have has matched
        if new is None:
            self._step(Arrival.DIFFERENT)
            self.number += 1  # viewers resume with the next segment
            return b""
        if self._repeat.is_whole:
            self._step(Arrival.SAME)
        else:
            self._step(Arrival.BYTES)
        return new

    def flush(self) -> None:
        """Pass on the bytes that the framer holds back.  Call it when no more will arrive."""
        self._window.append(self._framer.flush())
        self._window.list_rest(self._framer.last_dts)

    def _step(self, arrival: Arrival) -> None:
        """Change the state as STEPS says, and start a seam if the step asks for one."""
        step = STEPS[arrival, self._state]
        if step.is_seam:
            self._start_seam()
        self._state = step.to

    def _start_segment(self, event: SegmentEvent) -> None:
        is_reopened = self._state in REOPENED
        init_section = self._take_init_section(is_reopened)
        is_next = event.number == self.number
        self.number = event.number
        if not is_next:
            self._step(Arrival.OTHER)
        elif init_section:
            self._step(Arrival.CHANGED)
        else:
            self._step(Arrival.WANTED)

        if self._state is SpliceState.COMPARING:
            self._repeat = Repeat(self._passed)
            return
        is_apart = event.is_discontinuous or not is_next
        self._framer.expect_jump(is_certain=is_apart)  # if uncertain, the framer's counters decide
        if init_section:
            self._pass_init_section(init_section)
        self._passed = Fingerprint()
        if self._state is SpliceState.SKIPPING:
            self._start_seam()  # again, after the initialization section
            self.number += 1  # viewers resume with the next segment
        else:
            self._open_segment(event.duration, is_reopened or is_apart)

    def _take_init_section(self, is_reopened: bool) -> bytes | None:
        """Take the initialization section that has arrived; None if viewers need none.

        A new opening sends its section again, even if viewers already have it.
        """
        arrived, self._new_init_section = self._new_init_section, None
        if not arrived:
            return None
        init_section = bytes(arrived)
        if is_reopened and init_section == self._init_section:
            return None
        return init_section

    def _open_segment(self, duration: float | None, is_apart: bool) -> None:
        self._window.append(self._framer.flush())
        self._window.begin(duration, is_apart=is_apart)
        self._window.append(self._framer.start_segment())

    def _pass_init_section(self, init_section: bytes) -> None:
        self._init_section = init_section
        self._window.append(self._framer.flush())
        self._window.append(self._framer.feed_init_section(init_section))

    def _end_segment(self, event: SegmentEvent) -> None:
        """Process the event that a segment is complete, has a gap, or was left out."""
        was_passing = self._state is SpliceState.PASSING
        is_whole = event.kind is EventKind.END
        is_wanted = event.number == self.number
        viewers_have_none = self._passed.size == 0
        # If a seam follows, the seam tells the framer whether a jump is certain.
        is_before_seam = self._state in REOPENED and not (is_wanted and viewers_have_none)

        if is_whole:
            self._step(Arrival.END)
        elif is_wanted:
            self._step(Arrival.GAP)
        else:
            self._step(Arrival.OTHER_GAP)

        if not is_whole:
            self._framer.drop()
            if not is_before_seam:
                self._framer.expect_jump(is_certain=True)
        elif was_passing:
            self._window.append(self._framer.flush())

        if is_whole and was_passing and not self._framer.is_shut:
            self._window.finish(self._framer.preamble)
        else:
            self._window.break_off()
        self.number = event.number + 1
        self._passed = Fingerprint()

    def _start_seam(self) -> None:
        """Resume where decoders can start: the next bytes do not continue those that viewers have.

        The open segment stays incomplete.
        """
        is_relay = self.number is None
        is_clean = is_relay and self._is_clean
        self._framer.drop()
        self._window.break_off()
        # A relay may continue without a jump, so a jump is not certain unless the relay is clean.
        self._framer.expect_jump(is_certain=is_clean or not is_relay)
        if is_relay:
            self._framer.leave_segments()
            self._window.leave_segments()
        if not is_clean:
            self._framer.shut(is_backlog=is_relay)
        if self._init_section and self._framer.is_shut and not is_relay:
            # It may have the only PAT and PMT, which a framer that was shut has forgotten.
            self._window.append(self._framer.feed_init_section(self._init_section))


# --------------------------------------------------------------------------------------------------
# Statistics: the totals of each stream across all of its channels, and its newest failures
# --------------------------------------------------------------------------------------------------

BAD_TIME = 60.0  # seconds after a failure in which starts try that address last
CHART_STEP = 5  # seconds that one bar in a page's chart covers
CHART_BARS = 60  # bars in a chart
AVERAGED_TIME = 15.0  # seconds; a bitrate is averaged over at least that much media
BURST_GAP = 1.0  # seconds without a byte after which the next bytes are another burst
LONGEST_PIECE = 2.0  # seconds after which bytes without a pause are divided into two bursts
# The upper bounds of the histogram's buckets in seconds, as Prometheus writes them.
FIRST_BYTE_BOUNDS = ("0.01", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "+Inf")


class LineLimit:
    """Allows one log line in REPEAT_TIME for each subject, such as a client's address.

    The owner guards it.  It remembers at most `most` subjects: a new one displaces the oldest.
    """

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._logged: dict[str, float] = {}  # by subject: when it last had a line; oldest first

    def allow(self, subject: str = "") -> bool:
        """Whether this subject may have a line now, which then counts as its newest."""
        now = time.monotonic()
        logged = self._logged.get(subject)
        if logged is not None and now - logged <= REPEAT_TIME:
            return False
        while self._logged:
            oldest = next(iter(self._logged))
            is_recent = now - self._logged[oldest] <= REPEAT_TIME
            if is_recent and len(self._logged) < self._most:
                break
            del self._logged[oldest]
        self._logged[subject] = now
        return True


class Bitrate:
    """The bits per second that a channel receives, averaged over whole pieces.

    Segments arrive in bursts, so an average over a fixed time would depend on how many bursts fall
    into it.  A piece is a segment, which lasts as long as its playlist says.  If no playlist gives
    a duration, a piece is a burst, which lasts until the next burst begins.

    The channel's thread owns it; any thread may call value().
    """

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, float]] = deque()  # bytes and seconds, the oldest first
        self._size = 0  # bytes of the open piece
        self._duration: float | None = None  # seconds of the open segment; None: no open segment
        self._burst_began: float | None = None
        self._is_first_burst = True  # it may contain a start's backlog, which shows no rate
        self._arrived = 0.0  # when the newest byte arrived; only used within a burst
        # The rate, and when it expires; replaced as a whole.  None: no piece is complete yet.
        self._current: tuple[float, float] | None = None

    def value(self) -> int:
        """The rate in bits per second; 0 if it is not known yet or the next piece is overdue."""
        current = self._current
        if current is None:
            return 0
        rate, until = current
        if time.monotonic() >= until:
            return 0
        return round(rate)

    def start_segment(self, duration: float | None) -> None:
        """Begin a segment.  `duration`: seconds, from its playlist; None if that states none."""
        self._duration = duration
        if duration is None:
            return
        self._size = 0
        self._burst_began = None

    def end_segment(self, *, is_whole: bool) -> None:
        """End the segment, if one was begun; it is a piece if it is whole."""
        if self._duration is None:
            return
        if is_whole:
            self._add_piece(self._size, self._duration)
        self._size = 0
        self._duration = None

    def add(self, size: int) -> None:
        """Count bytes that have just arrived."""
        now = time.monotonic()
        if self._duration is None:
            self._divide_into_bursts(now)
        self._size += size
        self._arrived = now

    def _divide_into_bursts(self, now: float) -> None:
        began = self._burst_began
        if began is None:
            self._burst_began = now
        elif now - self._arrived > BURST_GAP or now - began > LONGEST_PIECE:
            if not self._is_first_burst:
                self._add_piece(self._size, now - began)
            self._size = 0
            self._burst_began = now
            self._is_first_burst = False

    def _add_piece(self, size: int, seconds: float) -> None:
        self._pieces.append((size, seconds))
        total = sum(seconds for _, seconds in self._pieces)
        while total - self._pieces[0][1] >= AVERAGED_TIME:
            _, oldest_seconds = self._pieces.popleft()
            total -= oldest_seconds
        longest = max(seconds for _, seconds in self._pieces)
        until = time.monotonic() + max(AVERAGED_TIME, 2 * longest)
        rate = 8 * sum(size for size, _ in self._pieces) / total
        self._current = rate, until


@dataclass(frozen=True)
class Trouble:
    """Why a stream has no media, and when that was noted."""

    reason: str
    noted: float  # time.monotonic()
    unix_time: float


class StreamRecord:
    """A stream's totals and the results of its newest start, guarded by the lock passed in.

    Methods take that lock themselves; it is reentrant, so callers may hold it already.  Pages and
    answers also read `container` and `unplayed` without it: each is replaced as a whole, so a
    reader gets an old value or a new one.
    """

    def __init__(self, lock: threading.Condition) -> None:
        self._lock = lock
        self.counts: Counter[str] = Counter()  # by name: arrivals, received, sent, gaps ...
        self.failures: Counter[str] = Counter()  # of upstreams, by reason
        self.drops: Counter[str] = Counter()  # of viewers, by reason
        self.peak = 0  # the most viewers at once
        self.last_trouble: Trouble | None = None  # replaced as a whole
        self.container = MPEG_TS  # of the newest media
        self.unplayed: Sequence[str] = ()  # codecs in it that no browser plays
        self.has_failed = False  # an upstream failed, and no bytes have arrived since
        self.variants: Mapping[str, str] = {}  # of the newest start: name to variant
        self.resolved: float | None = None  # when that start found them
        # By wanted quality: when a start failed, and the error with which to answer its viewers.
        self.start_errors: dict[str, tuple[float, StreamError]] = {}
        self.numberings: dict[str, Numbering] = {}  # of HLS, by variant
        self.failure_times: dict[str, float] = {}  # when each address last failed
        # The address that had media last, and the copy of its variant.
        self._good_copy: tuple[str, int] | None = None
        # The number and the bytes of each bar.
        self._bars: deque[tuple[int, int]] = deque(maxlen=CHART_BARS + 1)
        self._warnings = LineLimit()  # used by choose_level()

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[name] += amount

    def numbering(self, variant: str) -> Numbering:
        with self._lock:
            return self.numberings.setdefault(variant, Numbering())

    def note_unplayed(self, codecs: Sequence[str]) -> None:
        """Remember the codecs of the newest media that no browser plays."""
        with self._lock:
            self.unplayed = codecs

    def add_drop(self, reason: str) -> None:
        with self._lock:
            self.drops[reason] += 1

    def add_failure(self, reason: str, address: str | None = None) -> None:
        """Count an upstream's failure.  `address`: the address that failed, if one did."""
        now = time.monotonic()
        with self._lock:
            for known, failed in tuple(self.failure_times.items()):
                if failed <= now - BAD_TIME:
                    del self.failure_times[known]
            if address is not None:
                self.failure_times[address] = now
            self.failures[reason.partition(";")[0]] += 1  # the label omits the qualities on offer
            self.has_failed = True
            self.note_trouble(reason)  # under the same lock, so a failed stream always has a reason

    def note_trouble(self, reason: str) -> None:
        """Remember why a stream has no media, whether or not its upstream has ended."""
        with self._lock:
            self.last_trouble = Trouble(reason, time.monotonic(), time.time())

    def forget_failures(self) -> None:
        """Forget failures that no longer count, because the upstream's settings changed."""
        with self._lock:
            self.start_errors.clear()
            self.failure_times.clear()
            self._good_copy = None
            self.resolved = None
            self.has_failed = False

    def start_order(self, addresses: Sequence[str]) -> list[int]:
        """The positions of the addresses in the order to try them.

        That is the configured order, except that addresses that failed within BAD_TIME are last.
        """
        since = time.monotonic() - BAD_TIME
        with self._lock:
            failed = {address for address, at in self.failure_times.items() if at > since}
        good: list[int] = []
        bad: list[int] = []
        for position, address in enumerate(addresses):
            if address in failed:
                bad.append(position)
            else:
                good.append(position)
        return good + bad

    def note_good_copy(self, address: str, copy: int) -> None:
        """Remember that this copy (a position) of an address's variant has media."""
        with self._lock:
            self._good_copy = address, copy

    def good_copy(self, address: str) -> int:
        """The position of the copy to try first: the last one that had media, or else the first."""
        with self._lock:
            known = self._good_copy
        if known is None:
            return 0
        good_address, copy = known
        if good_address != address:
            return 0
        return copy

    def add_received(self, size: int) -> None:
        bar = int(time.monotonic() / CHART_STEP)
        with self._lock:
            self.counts["received"] += size
            self.has_failed = False
            if self._bars and self._bars[-1][0] == bar:
                _, counted = self._bars.pop()
                size += counted
            self._bars.append((bar, size))

    def bitrates(self) -> list[float]:
        """Bits per second in each of the last CHART_BARS complete bars, the oldest first."""
        now = int(time.monotonic() / CHART_STEP)
        with self._lock:
            bars = dict(self._bars)
        return [bars.get(bar, 0) * 8 / CHART_STEP for bar in range(now - CHART_BARS, now)]

    def reasons(self) -> tuple[Counter[str], Counter[str]]:
        """Copies of `failures` and `drops`."""
        with self._lock:
            return self.failures.copy(), self.drops.copy()

    def qualities(self) -> list[str]:
        """The variants that the newest start found, without duplicates."""
        with self._lock:
            return _unique(self.variants.values())

    def choose_level(self) -> int:
        """Choose the level of a log line that a retrying player may cause again and again.

        Returns WARNING, and then DEBUG for REPEAT_TIME.
        """
        with self._lock:
            if self._warnings.allow():
                return logging.WARNING
            return logging.DEBUG


# --------------------------------------------------------------------------------------------------
# Channel: one upstream, the thread that feeds it, and its viewers
#
#   STARTING  its upstream is being opened; viewers wait.  Until its variants are known, viewers of
#             every quality wait for it; then those that want another variant begin again
#   LIVE      shared by all viewers that request this variant
#   PRIVATE   its source is finite, or late viewers cannot join it: it belongs to its first viewer,
#             and the others start channels of their own
#   CLOSED    it was stopped: its viewers are disconnected, and its thread is about to end
#   ENDED     its thread has reported its end: viewers take the rest.  It is forgotten once it has
#             no viewers
#
#   STARTING -> LIVE | PRIVATE     the first media has arrived: Channels.go_live()
#   STARTING | LIVE | PRIVATE -> CLOSED                         Channels._close()
#   STARTING | LIVE | PRIVATE | CLOSED -> ENDED                 Channels.end()
#
# The table above the class Channels lists all ways in which a channel ends.
#
# A LIVE or PRIVATE channel keeps its state while its origin fails and the failed upstream is
# reopened: `trouble` says why it has no media, and its viewers keep their connections.
# --------------------------------------------------------------------------------------------------

WINDOW_GROWTH = 8  # times `ringbuffer_size` that a window may hold to keep enough segments
LEAST_TICK = 0.05  # seconds; the minimum between two checks of a feeder, as `linger` may be 0
ONLY_VARIANT = "live"  # the name that streamlink gives to the stream of a source without variants
PRIVATE_WINDOW = 1 * MIB  # bytes; a finite upstream's downloads already read ahead of its viewer
ZAPPING_PAUSE = 0.5  # seconds between a start's tries while the origin counts a closed connection
REOPEN_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 10.0)  # seconds between tries; the last one repeats
HEALTHY_TIME = 60.0  # seconds of media after which the pauses start over
HEALTHY_RATIO = 10  # they also start over after this many times the last pause

Place = tuple[int, int]  # the positions of an address and of a copy of its variant


class State(enum.Enum):
    STARTING = "starting"
    LIVE = "live"
    PRIVATE = "private"
    CLOSED = "closed"
    ENDED = "ended"


class Channel:
    """The run-time object of a stream and variant, and the thread that feeds it."""

    def __init__(
        self,
        channels: Channels,
        stream: StreamSettings,
        wanted: str,
        is_reserved: bool,
        order: Sequence[int],
    ) -> None:
        """Prepare a start.

        `order` has the positions of the stream's addresses in the order in which to try them.
        """
        self.channels = channels
        self.wanted = wanted  # the requested quality
        self.since = time.monotonic()
        self.record = channels.record(stream.name)
        limit = stream.options.ringbuffer_size
        self.window = Window(limit, growth_factor=WINDOW_GROWTH)
        self.container = MPEG_TS  # set once, before the window gets its first block

        # Written under channels.changed.  The channel's own thread also reads single fields without
        # the lock: it sees the old value or the new one, and checks again in its next turn.
        self.stream = stream  # a reload replaces it
        self.address = stream.urls[order[0]]  # of its upstream, or of the last try
        self.account: str | None = None  # name of the playlist in whose account it holds a slot
        self.state = State.STARTING
        self.is_reserved = is_reserved  # only the viewer that caused its start may attach
        # Set by stop() alone, not at the end of the source; wakes its thread, which must end.
        self.stopped = threading.Event()
        self.variant: str | None = None  # None until its start finds it
        self.variants: Mapping[str, str] | None = None  # name to variant; None until it finds them
        self.viewers: dict[Viewer, None] = {}  # in order of arrival
        self.pollers: dict[tuple[str, ...], Viewer] = {}  # those viewers that poll, by key
        self.has_hls = False  # clients can poll it
        self.idle_since = self.since  # when its last viewer left; only used while it has none
        self.error: StreamError | None = None  # why it failed; None: it did not
        self.had_media = False  # it has been LIVE or PRIVATE

        # Written only by its own thread.
        self.note: str | None = None  # the tracks that viewers miss, in words
        self.restarts = 0  # reopened upstreams
        self.trouble: str | None = None  # why it has no media; set at the first failed request
        self._session: Session | None = None
        self._upstream: Upstream | None = None
        self._splicer: Splicer | None = None  # None until the first media arrives
        self._has_end = False  # its source is finite; known when the first media has arrived
        self._tracks: Sequence[int] = ()  # numbers of the segments at which its tracks continue
        self._left_out: Collection[int] = ()  # positions of the tracks that the start left out
        self._lacked_ffmpeg = False  # the start found no ffmpeg, so viewers have the picture alone
        self._length: int | None = None  # bytes of a film that is a raw body
        self._order = order
        self._address = order[0]  # position of the address in use
        self._copy = 0  # position of the copy of its variant in use
        self._first_copy = 0  # position of the copy that is tried before the others
        self._copies = 1  # number of copies that the address offered last
        self._last_byte = self.since  # last arrival of media, or the start; status() reads it
        self._troubled_since: float | None = None  # when `trouble` was first set in this outage
        # The failures that were logged since the last recovery.
        self._logged_failures: set[tuple[Place, str]] = set()
        self._gaps = 0  # segments lost since the last recovery
        self._losses = Losses()  # those of the upstream's tracks that were counted so far
        self._segment_time: float | None = None  # seconds, as last measured
        self._bitrate = Bitrate()  # of the newest opening
        self._skipped = 0  # segments lost in a running upstream and not logged yet
        self._start_level: int | None = None  # of the start's log lines; None: no line yet

    def __repr__(self) -> str:
        name = f"{self.stream.name}/{self.variant or self.wanted}"
        return f"<Channel {name} {self.state.value}, {len(self.viewers)} viewers>"

    # Any thread

    def start(self) -> None:
        """Start the thread; raises RuntimeError if the system has no threads left."""
        name = f"feed-{self.stream.name}-0"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def stop(self) -> None:
        """Disconnect the viewers and stop the thread, even while it waits; returns at once.

        Only Channels._close() calls it.  Idempotent.  If the thread creates its session at the same
        moment, stop() may miss it, but the thread checks `stopped` once it has assigned `_session`.
        """
        self.window.abort()  # before another window uses its segment numbers
        self.stopped.set()
        session = self._session
        if session:
            session.http.cut()
        self.wake()

    def wake(self) -> None:
        """Make the thread check its channel now if it waits for data of its upstream."""
        upstream = self._upstream
        if upstream:
            upstream.buffer.wake()

    @property
    def is_offered(self) -> bool:
        """Whether every viewer that requests its variant may attach."""
        if self.state is State.STARTING:
            return not self.is_reserved
        return self.state is State.LIVE

    @property
    def is_running(self) -> bool:
        return self.state in (State.LIVE, State.PRIVATE)

    @property
    def is_over(self) -> bool:
        """Whether it will receive no more media."""
        return self.state in (State.CLOSED, State.ENDED)

    def suits(self, viewer: Viewer) -> bool:
        """Whether this start has, or may have, the variant that a waiting viewer wants.

        Until the variants are known, it suits every viewer.  It also suits those that were attached
        because of its variant: their quality may mean another one at this start's address.  The
        caller holds channels.changed.
        """
        if self.variants is None or viewer.wanted == self.wanted:
            return True
        if viewer.variant is not None and viewer.variant == self.variant:
            return True
        return self.variant == variant_of(viewer.wanted, self.variants)

    @property
    def linger(self) -> float:
        """Seconds to stay open without viewers."""
        return 0.0 if self.state is State.PRIVATE else self.stream.options.linger

    @property
    def poll_patience(self) -> float:
        """Seconds without a request after which a polling client counts as gone.

        The playlist of a source that has ended is kept for the same time.
        """
        if not self.has_hls:
            return self.linger
        return max(3.0 * self.window.target_duration, self.linger)

    @property
    def bitrate(self) -> int:
        """Bits per second received now; 0 while the upstream is down."""
        return self._bitrate.value()

    def status(self) -> dict[str, Any]:
        """The channel as /status prints it.  The caller holds channels.changed."""
        now = time.monotonic()
        held, seconds = self.window.held()

        state = self.state.value
        patience = self.stream.options.timeout
        if self.is_running and self.trouble:
            state = "waiting"
            patience = self.stream.options.reconnect
        elif self.state is State.ENDED:
            state = State.CLOSED.value  # a client need not know the difference

        waiting_seconds: float | None = None
        gives_up_seconds: float | None = None
        if state in ("waiting", "starting"):
            waited = now - self._last_byte
            waiting_seconds = round(waited, 1)
            gives_up_seconds = round(max(0.0, patience - waited), 1)

        viewers = []
        for viewer in self.viewers:
            viewers.append({
                "address": viewer.address,
                "user_agent": viewer.agent,
                "kind": "hls" if viewer.polls else "stream",
                "since_seconds": round(now - viewer.since, 1),
                "bytes": viewer.sent,
                "skips": viewer.skips,
            })  # fmt: skip

        return {
            "variant": self.variant or "",
            "state": state,
            "note": self.note,
            "uptime_seconds": round(now - self.since, 1),
            "waiting_seconds": waiting_seconds,
            "gives_up_seconds": gives_up_seconds,
            "window_bytes": held,
            "window_seconds": round(seconds, 1),
            "restarts": self.restarts,
            "viewers": viewers,
        }

    # Its thread: tries, and the pauses between them

    def _run(self) -> None:
        is_complete = False
        ended_by: StreamError | None = None
        try:
            self._open_first()
            self._keep_going()
        except SourceEnded:
            is_complete = True
        except Stop:
            pass
        except StreamError as error:
            ended_by = error.copy()  # without the traceback, which keeps the whole channel alive
        except Exception:
            log.exception("%s: the feeder failed", self.stream.name)
            ended_by = UpstreamError("StreamPipe failed: see its log")
        finally:  # after any failure: waiting viewers must be notified
            try:
                self._close_upstream()
            finally:
                self.channels.end(self, is_complete, ended_by)
                self._see_pollers_off(is_complete)
        if ended_by is not None and not self.channels.stopping.is_set():
            self._log_failure(ended_by)

    def _log_failure(self, error: StreamError) -> None:
        """Log why the channel has ended, unless the log has this reason already."""
        if any(reason == error.reason for _, reason in self._logged_failures):
            return
        what = "ended" if self._splicer else "not started"
        level = self._choose_level()
        log.log(level, "%s: %s: %s", self.stream.name, what, error.reason)

    def _see_pollers_off(self, is_complete: bool) -> None:
        """Close the playlist and detach all pollers.

        If the source truly ended, first wait until they have left, for `poll_patience` at most, so
        that they can fetch the rest.
        """
        if self.has_hls and is_complete:
            deadline = time.monotonic() + self.poll_patience
            remaining = self.poll_patience
            while self.pollers and not self.stopped.is_set() and remaining > 0:
                self.stopped.wait(min(FEEDER_TICK, remaining))
                self.channels.remove_pollers(self)
                remaining = deadline - time.monotonic()
        self.window.close_hls()
        self.channels.remove_pollers(self, all_of_them=True)

    def _open_first(self) -> None:
        """Try each address once, all within `timeout`, until one has media.

        If none has, the last address that refused because of too many connections is tried again
        while it may still count one that StreamPipe has closed, or while a client that waits still
        holds its slot.  Returns if an address failed after it had media; raises StreamError if none
        had any.
        """
        order = deque(self._order)
        timeout = self.stream.options.timeout / len(order)
        failure: StreamError = UpstreamError(NO_MEDIA)  # of the last address
        busy: int | None = None  # position of the address to try again
        while order:
            self._begin_address(order.popleft())
            try:
                failure = UpstreamError(self._open_copies(timeout))
            except LimitReached as refusal:
                failure = refusal.copy()
                self._note_trouble(refusal.reason)
            if self._splicer:
                return
            is_zapping = self.channels.is_refused_to_itself(self, failure)
            if is_zapping or failure.reason in BUSY:
                busy = self._address
            if order or busy is None:
                continue
            address = self.stream.urls[busy]
            self.channels.close_idle_beside(self, address)
            may_be_free_soon = is_zapping and time.monotonic() - self.since < ZAPPING_TIME
            if may_be_free_soon or self.channels.was_just_closed(self, address):
                order.append(busy)
                self._wait(ZAPPING_PAUSE)
        raise failure

    def _open_copies(self, timeout: float) -> str:
        """Try the copies of an address's variant in order, all within `timeout`.

        Returns why the last copy failed, or why a copy failed after it had media.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._open_and_feed(deadline - time.monotonic(), deadline)
            except UpstreamError as error:
                reason = error.reason
                self._note_failure(reason)
            if self._splicer or self._is_last_copy:
                return reason
            self._copy = self._next_copy

    def _keep_going(self) -> NoReturn:
        """Reopen the failed upstream again and again; never returns.

        Raises UpstreamError after `reconnect` seconds without media, or `timeout` seconds later if
        the outage was noticed so late and there is a backup; SourceEnded at the end of the source;
        and Stop if the channel must end.
        """
        if self.state is State.PRIVATE and not self._has_end:
            raise UpstreamError(
                "the stream broke off, and cannot be resumed because its length is unknown"
            )
        tried = {self._place}  # since media last arrived
        extended = self._extended_deadline()
        self._first_copy = self._copy
        waits = _reopen_pauses()
        while True:
            deadline = self._last_byte + self.stream.options.reconnect
            self._move_on()
            pause = 0.0
            if self._place in tried:
                pause = next(waits)
            elif extended > deadline:  # the addresses that are left share the time
                now = time.monotonic()
                deadline = now + (extended - now) / self._count_untried(tried)
            tried.add(self._place)
            self._wait(pause, deadline)

            began = time.monotonic()
            try:
                timeout = min(self.stream.options.timeout, deadline - began)
                self._open_and_feed(timeout, deadline)
            except UpstreamError as error:
                self._note_failure(error.reason)
            except LimitReached as refusal:
                self._note_trouble(refusal.reason)

            if self._last_byte > began:
                tried = {self._place}
                extended = self._extended_deadline()
                self._first_copy = self._copy
            # An address may be valid for less than a minute, which is no reason for long pauses.
            healthy_time = HEALTHY_TIME
            if pause:
                healthy_time = min(HEALTHY_TIME, HEALTHY_RATIO * pause)
            if self._last_byte - began > healthy_time:
                waits = _reopen_pauses()

    def _extended_deadline(self) -> float:
        """When the backups must have media, if an outage was noticed after `reconnect` seconds.

        Two target durations may be longer than that.  Otherwise 0.
        """
        now = time.monotonic()
        reconnect = self.stream.options.reconnect
        if 0 < reconnect <= now - self._last_byte:
            return now + self.stream.options.timeout
        return 0.0

    def _count_untried(self, tried: Collection[Place]) -> int:
        """The number of untried addresses, including the one in use."""
        tried_addresses = {address for address, _ in tried}
        tried_addresses.discard(self._address)
        return len(self.stream.urls) - len(tried_addresses)

    @property
    def _place(self) -> Place:
        """The address in use, and the copy of its variant."""
        return self._address, self._copy

    @property
    def _has_backup(self) -> bool:
        return len(self.stream.urls) > 1 or self._copies > 1

    def _move_on(self) -> None:
        """Choose the next copy of the variant, or the next address if all copies were tried."""
        if self._is_last_copy:
            self._begin_address((self._address + 1) % len(self.stream.urls))
        else:
            self._copy = self._next_copy

    def _begin_address(self, position: int) -> None:
        """Choose an address, and the copy of its variant that last had media."""
        self._address = position
        self._copies = 1
        self._copy = self.record.good_copy(self.stream.urls[position])
        self._first_copy = self._copy

    @property
    def _next_copy(self) -> int:
        return (self._copy + 1) % self._copies

    @property
    def _is_last_copy(self) -> bool:
        """Whether all copies that the address in use offers have been tried."""
        return self._next_copy == self._first_copy % self._copies

    def _wait(self, seconds: float, deadline: float | None = None) -> None:
        """Pause for `seconds` before a try.

        Raises UpstreamError if the deadline passes first, and Stop if the channel was stopped or
        has no viewers.
        """
        until = time.monotonic() + seconds
        is_last_pause = deadline is not None and deadline <= until
        if deadline is not None:
            until = min(until, deadline)
        while True:
            self.channels.close_if_unwatched(self)
            if self.stopped.is_set():
                raise Stop
            remaining = until - time.monotonic()
            if remaining <= 0:
                break
            self.stopped.wait(min(remaining, FEEDER_TICK))
        if is_last_pause:
            raise UpstreamError(NOT_BACK)

    def _note_failure(self, reason: str) -> None:
        self._close_upstream()
        if self.stopped.is_set():  # stop() cut the upstream: the address may be good
            raise Stop
        # The address may be good as long as a copy is untried.
        address = None
        if self._is_last_copy:
            address = self.stream.urls[self._address]
        self.record.add_failure(reason, address)
        self._note_trouble(reason)

    def _note_trouble(self, reason: str) -> None:
        """Note why there is no media; log each reason once per outage, not at every try."""
        if self.trouble is None:
            self._troubled_since = time.monotonic()
        self.trouble = reason
        self.record.note_trouble(reason)
        if (self._place, reason) not in self._logged_failures:
            self._logged_failures.add((self._place, reason))
            level = self._choose_level()
            log.log(level, "%s: %s: %s", self.stream.name, self._origin, reason)

    def _note_recovery(self) -> None:
        """Log that media arrives again, and end the outage."""
        line = f"recovered after {time.monotonic() - self._last_byte:.1f} s"
        if any(place != self._place for place, _ in self._logged_failures):
            line = f"{self._origin}: {line}"
        if self._gaps:
            line += f"; {_many(self._gaps, 'segment')} lost"
        log.info("%s: %s", self.stream.name, line)
        self.trouble = None
        self._troubled_since = None
        self._gaps = 0
        self._logged_failures.clear()

    def _choose_level(self) -> int:
        """Choose the level of a log line.

        A player may repeat a failing start many times, so only one start in REPEAT_TIME logs
        warnings.  All lines of a start have the same level.
        """
        if self._splicer:
            return logging.WARNING
        if self._start_level is None:
            self._start_level = self.record.choose_level()
        return self._start_level

    @property
    def _origin(self) -> str:
        """The address in use as the log may show it: `address 2 of 2 (b.example)`."""
        label = f"address {self._address + 1} of {len(self.stream.urls)}"
        host = host_of(self.stream.urls[self._address])
        if host:
            label += f" ({host})"
        if self._copies > 1:
            label += f", copy {self._copy + 1} of {self._copies}"
        return label

    def _close_upstream(self) -> None:
        self._bitrate = Bitrate()
        upstream, self._upstream = self._upstream, None
        session, self._session = self._session, None
        self._losses = Losses()
        if upstream:
            if upstream.tracks:
                self._tracks = upstream.tracks
            self._note_segment_time(upstream)
            upstream.close()
        elif session:
            session.http.cut()

    def _note_segment_time(self, upstream: Upstream) -> None:
        """Remember the time between two segments, if this opening has measured it."""
        seconds = upstream.segment_time
        if seconds:
            self._segment_time = seconds

    # Its thread: one opening

    def _open_and_feed(self, timeout: float, deadline: float) -> NoReturn:
        """Open an upstream at the address in use, and feed the window until the upstream ends.

        Media must arrive before `deadline`; resolving and opening may take `timeout` seconds in
        all.  Raises UpstreamError if the opening fails, SourceEnded at the end of the source,
        LimitReached if the account of the address has no free slot, Stop if the channel must end,
        and StreamError if the origin lacks the wanted quality or the start takes too long.
        """
        address = self.stream.urls[self._address]
        self.channels.take_slot(self, address)
        timeout = max(timeout, LEAST_TIMEOUT)
        session = Session(self.stream.at(address), timeout)
        self._session = session
        if self.stopped.is_set():
            raise Stop
        session.resolve(address)
        name = self._find_variant(session)
        self._count_copies(session.count_copies(name))
        if self._splicer is None:  # the copies that are left share the time of their address
            tried = (self._copy - self._first_copy) % self._copies
            seconds = (deadline - time.monotonic()) / (self._copies - tried)
            deadline = time.monotonic() + seconds
            session.shorten(seconds)
        upstream = self._open(session, name)
        self._upstream = upstream
        self._feed(upstream, deadline)

    def _count_copies(self, count: int) -> None:
        """Note how many copies the address offers; there may be fewer than before."""
        self._copies = count
        self._copy %= count
        self._first_copy %= count

    def _find_variant(self, session: Session) -> str:
        """The name of the variant to open.

        Raises StreamError if the origin offers none of the wanted qualities, and Stop if another
        channel has the variant.
        """
        name = self._choose(session.canonical)
        if self._splicer is None:
            variant = None
            if name is not None:
                variant = session.canonical[name]
            self.channels.note_variants(self, session.canonical, variant)
        if name is None:
            raise self._quality_error(session.qualities)
        return name

    def _open(self, session: Session, name: str) -> Upstream:
        if self._splicer:
            resumption = Resumption(
                number=self._splicer.number,
                is_film=self._has_end,
                tracks=self._tracks,
                left_out=self._left_out,
                lacked_ffmpeg=self._lacked_ffmpeg,
                length=self._length,
            )
            return session.open(name, self._copy, resumption)
        upstream = session.open(name, self._copy)
        self.note = upstream.missing
        self._left_out = upstream.left_out
        self._lacked_ffmpeg = upstream.lacks_ffmpeg
        self._length = upstream.length
        if self.note:
            log.warning("%s: %s", self.stream.name, self.note)
        return upstream

    def _choose(self, offered: Collection[str]) -> str | None:
        """The running variant if it is offered, or else the first wanted name that is, or None."""
        if self._splicer and self.variant in offered:
            return self.variant
        for name in names_in(self.wanted):
            if name in offered:
                return name
        return None

    def _quality_error(self, qualities: Sequence[str]) -> StreamError:
        """The error for an opening that offers none of the wanted qualities."""
        # If the origin once had the quality, or it is the configured one, its absence may be
        # temporary: a transcoder may be starting.
        if self._splicer or self.wanted == self.stream.quality:
            offered = ", ".join(qualities)
            return UpstreamError(f"{NO_SUCH_QUALITY}; available: {offered}")
        return no_quality_error(qualities)

    def _feed(self, upstream: Upstream, deadline: float) -> NoReturn:
        """Move items from the upstream to the window; never returns.

        Raises SourceEnded at the end of the source, Stop if the channel was stopped or abandoned,
        and StreamError if the upstream fails.
        """
        start: list[bytes | SegmentEvent] = []  # items read before the container is known
        has_begun = False  # the container is known
        alive = time.monotonic()
        while True:
            self.channels.close_if_abandoned(self)
            if self.stopped.is_set():
                raise Stop
            items, is_all = self._read(upstream)
            if not has_begun and (items or is_all):
                start += items
                has_begun = self._begin(upstream, start, is_all)
                if has_begun:
                    items = start
                    start = []
            if has_begun:
                self._count_losses_of_tracks(upstream)
                self._move(upstream, items)

            trouble = upstream.trouble
            if trouble and self.trouble is None and not self.stopped.is_set():
                self._note_trouble(trouble)  # a request that stop() cut is no trouble
            if is_all:
                self._finish(upstream)
            if any(self._is_sign_of_life(item) for item in items):
                alive = time.monotonic()
            if has_begun:
                self._judge(upstream, alive, None)
            else:
                self._judge(upstream, alive, deadline)

    def _is_sign_of_life(self, item: bytes | SegmentEvent) -> bool:
        """Whether an item shows that its upstream works.

        Bytes do, and a segment that was left out on purpose.  For `reconnect` seconds, so does a
        gap in a film, each of which may take `timeout`: several segments in a row may be missing.
        """
        if isinstance(item, bytes) or item.kind is EventKind.FILTERED:
            return True
        is_recent = time.monotonic() - self._last_byte < self.stream.options.reconnect
        return self._has_end and item.kind is EventKind.GAP and is_recent

    def _read(self, upstream: Upstream) -> tuple[list[bytes | SegmentEvent], bool]:
        """The next items, and whether the source has ended; raises UpstreamError if it broke off.

        A live source without a playlist never ends.  If a reopening gets a finite answer (an empty
        one, or a clip of a few seconds), a relay sent it because its own source is down.
        """
        tick = FEEDER_TICK
        if not self.viewers:  # a viewer that leaves wakes the buffer; the end of `linger` does not
            tick = min(FEEDER_TICK, max(self.linger, LEAST_TICK))
        items: list[bytes | SegmentEvent] = []
        is_all = False
        try:
            items = upstream.read(tick)
        except SourceEnded:
            is_all = True
        is_relay = self._splicer is not None and not (self._has_end or upstream.workers)
        if is_relay and is_all:
            raise UpstreamError(CONNECTION_CLOSED)
        if is_relay:
            items = [item for item in items if isinstance(item, bytes)]
        return items, is_all

    def _judge(self, upstream: Upstream, alive: float, deadline: float | None) -> None:
        """Raise StreamError if an upstream has failed without reporting it.

        It has failed if
        - a start or a reopening has no media by `deadline`;
        - nothing new arrived for `timeout` or two target durations, whichever is longer;
        - it had nothing but trouble for two target durations, and there is a backup;
        - all segments had another container for `reconnect` seconds.

        `alive` is when the upstream last showed a sign of life.
        """
        now = time.monotonic()
        is_late = deadline is not None and now > deadline
        trouble = upstream.trouble
        if is_late and self._splicer is None and not self._has_backup:
            error = no_media_error(self.stream, trouble)
            self.record.add_failure(error.reason)
            raise error
        if trouble and self._has_backup and self._troubled_since is not None:
            refused_time = now - max(self._troubled_since, alive)
            if refused_time > 2 * upstream.target_duration:
                raise UpstreamError(trouble)
        patience = max(self.stream.options.timeout, 2 * upstream.target_duration) + JUDGE_GRACE
        if is_late or now - alive > patience:
            raise UpstreamError(trouble or NO_DATA)
        insert = None
        if self._splicer is not None:
            insert = self._splicer.insert_container
        if insert and now - self._last_byte > self.stream.options.reconnect:
            raise UpstreamError(switched_to(insert))

    def _begin(self, upstream: Upstream, start: list[bytes | SegmentEvent], is_all: bool) -> bool:
        """Detect the container from an opening's first bytes; False while more are needed.

        Once it is known, the channel goes live, or its splicer resumes.  Raises UpstreamError if
        the opening has no media or another container than before.
        """
        has_segments = any(isinstance(item, SegmentEvent) for item in start)
        data = _media_in(start)
        container = None
        if data:
            container = sniff(data, is_all, upstream.media_type)
        if container is OTHER_MEDIA:  # an initialization section may identify it
            data = b"".join(item for item in start if isinstance(item, bytes))
            container = sniff(data, is_all=True, media_type=upstream.media_type)
        if container is None:
            if is_all and self._splicer is None:
                raise UpstreamError(NO_MEDIA)
            return is_all  # the source may have ended while the upstream was down
        self.record.note_good_copy(self.stream.urls[self._address], self._copy)
        if self._splicer is None:
            self._go_live(upstream, container, has_segments)
            return True
        if container is not self.container and not self._may_be_insert(start):
            raise UpstreamError(switched_to(container))
        self.restarts += 1
        self.record.add("restarts")
        self._splicer.resume(upstream.is_clean)
        return True

    def _may_be_insert(self, start: Sequence[bytes | SegmentEvent]) -> bool:
        """Whether another container at a reopening may belong to an insert.

        Such an insert begins with the wanted segment, and _judge limits its time.  A live channel
        with a backup does not wait for an insert to end.
        """
        assert self._splicer
        if self._has_backup and not self._has_end:
            return False
        for item in start:
            if isinstance(item, SegmentEvent):
                return item.number == self._splicer.number
        return False

    def _go_live(self, upstream: Upstream, container: Container, has_segments: bool) -> None:
        """Make the channel LIVE or PRIVATE with its first media, which waiting viewers then get.

        This decides for good whether the source is finite.  Raises Stop if another channel has the
        variant, or the channel was stopped.
        """
        assert self.variants is not None
        assert self.variant is not None
        self._has_end = upstream.is_finite
        is_private = self._has_end or not (has_segments or container.joins_late)

        window = self.window
        window.live_edge = max(1, upstream.live_edge)
        window.can_skip = container.can_skip
        if is_private:
            window.make_private(PRIVATE_WINDOW)

        is_cut = has_segments or container.is_cut_for_hls
        has_hls = not is_private and is_cut and bool(container.extension)
        if has_hls:
            numbering = self.record.numbering(self.variant)
            window.offer_hls(container, numbering, upstream.target_duration)

        self._splicer = Splicer(window, container)
        self.channels.go_live(self, container, has_hls, is_private)

        kind = "live"
        if self._has_end:
            kind = "finite"
        elif is_private:
            kind = "private"
        variant = self.variant
        if set(self.variants.values()) == {ONLY_VARIANT}:
            variant = "single quality"
        log.info("%s: %s, %s, %s", self.stream.name, kind, variant, container.media_type)

    def _move(self, upstream: Upstream, items: list[bytes | SegmentEvent]) -> None:
        assert self._splicer
        self.record.add_received(sum(len(item) for item in items if isinstance(item, bytes)))
        pieces: list[bytes] = []  # bytes without an event between them, to pass on together
        for item in self._splicer.without_inserts(items):
            if isinstance(item, bytes):
                pieces.append(item)
                continue
            if pieces:
                self._pass_bytes(upstream, b"".join(pieces))
                pieces.clear()
            self._pass_event(upstream, item)
        if pieces:
            self._pass_bytes(upstream, b"".join(pieces))
        if self._splicer.insert_container and self.trouble is None:
            self._note_trouble(switched_to(self._splicer.insert_container))

    def _pass_event(self, upstream: Upstream, event: SegmentEvent) -> None:
        assert self._splicer
        self._note_segment(event)
        skipped = self._splicer.pass_event(event)
        self._count_skipped(skipped, upstream, event.duration)
        if event.kind is EventKind.GAP:
            self._count_gaps(1)

    def _pass_bytes(self, upstream: Upstream, data: bytes) -> None:
        assert self._splicer
        if self._splicer.pass_bytes(data):
            if self.trouble and not upstream.trouble:
                self._note_recovery()
            self._last_byte = time.monotonic()
        self._bitrate.add(len(data))
        self.record.note_unplayed(self._splicer.unplayed)

    def _note_segment(self, event: SegmentEvent) -> None:
        """Measure a live channel's bitrate by its segments.

        In a private channel, the pace of segments depends on how fast the viewer takes them.
        """
        if self.state is not State.LIVE:
            return
        if event.kind is EventKind.START:
            self._bitrate.start_segment(event.duration)
        elif event.kind is EventKind.END:
            self._bitrate.end_segment(is_whole=True)
        elif event.kind is EventKind.GAP:
            self._bitrate.end_segment(is_whole=False)

    def _count_losses_of_tracks(self, upstream: Upstream) -> None:
        """Count the segments that the tracks of a muxed stream have lost since the last call."""
        known = self._losses
        self._losses = upstream.losses
        self._count_skipped(self._losses.skipped - known.skipped, upstream)
        self._count_gaps(self._losses.gaps - known.gaps)

    def _count_skipped(
        self, segments: int, upstream: Upstream, duration: float | None = None
    ) -> None:
        """Count segments that are lost because no load of the playlist listed them.

        If there are more than can have passed in the meantime, they are not counted: the origin has
        restarted its numbering.  `duration` is that of the next segment in seconds, as the playlist
        lists it; None: not listed.
        """
        if segments <= 0:
            return
        self._note_segment_time(upstream)
        # The listed durations are often too long; the measured one is too long after a stall.
        lengths = (upstream.target_duration, duration, self._segment_time)
        known = [length for length in lengths if length]
        length = max(LEAST_INTERVAL, min(known, default=LEAST_INTERVAL))
        silent = time.monotonic() - self._last_byte
        if segments * length > silent + LISTED_TIME:
            return
        self.record.add("gaps", segments)
        if self.trouble is None:
            self._note_skip(segments)
        else:
            self._gaps += segments

    def _count_gaps(self, segments: int) -> None:
        """Count segments that were left out or abandoned."""
        if segments > 0:
            self.record.add("gaps", segments)
            self._gaps += segments

    def _note_skip(self, segments: int) -> None:
        """Log segments that no load of the playlist listed; one warning per REPEAT_TIME."""
        self._skipped += segments
        level = self.record.choose_level()
        lost = _many(self._skipped, "segment")
        log.log(level, "%s: %s lost between two loads of the playlist", self.stream.name, lost)
        if level == logging.WARNING:
            self._skipped = 0

    def _finish(self, upstream: Upstream) -> NoReturn:
        """Pass on the bytes that are held back, and raise SourceEnded.

        Raises Stop if the rest of a file does not continue the part that viewers have.
        """
        assert self._splicer
        self._splicer.flush()
        if self._splicer.is_skipping and not upstream.workers:
            log.warning("%s: the file changed during the outage", self.stream.name)
            raise Stop
        if not self._has_end:
            log.info("%s: the origin ended the stream", self.stream.name)
        raise SourceEnded


def _reopen_pauses() -> Iterator[float]:
    """Seconds between tries, with jitter so that a thousand channels do not retry in step."""
    for pause in pauses(REOPEN_PAUSES):
        yield pause * random.uniform(0.8, 1.2)


def switched_to(container: Container) -> str:
    return f"the origin switched to {container.media_type}"


def _media_in(items: Iterable[bytes | SegmentEvent]) -> bytes:
    """The bytes outside initialization sections."""
    media = b""
    in_init_section = False
    for item in items:
        if isinstance(item, SegmentEvent):
            in_init_section = item.kind is EventKind.INIT
        elif not in_init_section:
            media += item
    return media


def names_in(quality: str) -> list[str]:
    """The variants that `720p,best` names, in order of preference."""
    return [name.strip() for name in quality.split(",")]


def variant_of(quality: str, variants: Mapping[str, str]) -> str | None:
    """The variant of the first name in `quality` that `variants` has; None if there is none."""
    for name in names_in(quality):
        if name in variants:
            return variants[name]
    return None


def host_of(address: str) -> str:
    """The host of an address, without streamlink's prefixes; empty if it has none."""
    return _scheme_and_host(without_prefixes(address))[1]


def stopping_error() -> StreamError:
    return StreamError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", RETRY_AFTER)


def no_media_error(stream: StreamSettings, trouble: str | None) -> StreamError:
    reason = f"no media within {stream.options.timeout:g} s"
    if trouble:
        reason += f": {trouble}"
    return StreamError(HTTPStatus.GATEWAY_TIMEOUT, reason)


def no_quality_error(qualities: Iterable[str]) -> StreamError:
    reason = f"no such quality; available: {', '.join(qualities)}"
    return StreamError(HTTPStatus.NOT_FOUND, reason)


# --------------------------------------------------------------------------------------------------
# Channels: finds, starts and shares them
#
# How a viewer leaves.  `log` has the words of the log line, `reason` the label in the metric.
#   cause                               decided by                 log                  reason
#   it closed its connection            Handler._take, or a send;  left                 -
#                                       at a limit, _detach_departed
#   the source ended, and it has all    Window.take                got everything       -
#   it took no byte for viewer_timeout  Handler._send_pieces       read nothing for ... timeout
#   it fell behind, and cannot skip     Window.take                fell behind          fell behind
#   its segment of fMP4 broke off       Window.take                got half a segment   torn
#   its channel failed for `reconnect`  drop_reason                disconnected by the  reconnect
#   its channel failed otherwise        drop_reason                  server             failed
#   a reload changed its stream         drop_reason                                     reload
#   the server stops                    drop_reason                                     shutdown
#   it polls, and was silent for        remove_pollers             left                 -
#     poll_patience
#   it polls another channel, at a      _detach_departed           left                 -
#     limit
#   it polls, and the source ended      Channel._see_pollers_off   left                 -
#   it polls, and the channel failed    end                        left                 drop_reason
#   its start has no media for it       _await_start               a line of the start  -
#   it attached, and had no media       _first_blocks              the answer is a 504  -
#     within `timeout`
#
# How a channel ends.  _close() makes it CLOSED; end() makes it ENDED when its thread ends.
#   cause                               decided by                 first   log
#   the source ended                    Channel._finish            ENDED   the origin ended ...
#   all addresses of a start failed     Channel._open_first        ENDED   the reason
#   a start has no media in time        Channel._judge             ENDED   not started: ...
#   the wanted quality does not exist   Channel._find_variant      ENDED   not started: ...
#   another channel has the variant     note_variants, go_live     ENDED   -
#   no media for `reconnect`            Channel._wait              ENDED   ended: ...
#   a private source without a length   Channel._keep_going        ENDED   ended: ...
#     broke off
#   the rest of a file does not fit     Channel._finish            ENDED   the file changed ...
#   StreamPipe has a fault              Channel._run               ENDED   the feeder failed
#   it was idle for its linger time     close_if_abandoned         CLOSED  -
#   it is idle in a pause between tries close_if_unwatched         CLOSED  -
#   it is idle, and its slot is needed  _free_slots                CLOSED  -
#   it is idle, and its host counts     close_idle_beside          CLOSED  -
#     its connection
#   a reload changed its stream         reload                     CLOSED  the reload's line
#   the server stops                    stop                       CLOSED  shutting down
#
# Requests that cannot attach to a running channel at once (_attach):
#   the server stops                          503 at once
#   a start failed in the last 2 s            the same answer, from memory
#   a quality that the running channel lacks  404 without a request to the origin
#   the stream's variants are being loaded    waits for them, whatever its quality
#   max_viewers, max_upstreams                viewers that closed their connection are removed.  If
#                                             the client's own address holds a slot, it is probably
#                                             a player that zaps: the request waits ZAPPING_TIME for
#                                             the slot; then 503
#
# Slots under max_upstreams (_holding, _room_at).  The server has a limit, and so has each account.
# The same rules apply to both:
#   a channel that starts or runs             holds a slot of the server, and one of the account
#                                             that its address belongs to
#   a channel without viewers                 gives way, the one that has been idle longest first
#   a stream with several addresses           starts at the first one whose account has a slot
#   a channel that moves to another account   gives its slot back and takes one of that account; if
#                                             none is free, the new address counts as failed for now
#   a channel that stays with its account     keeps its slot, even if a reload lowered the limit
# --------------------------------------------------------------------------------------------------

FAILURE_MEMORY = 2.0  # seconds; VLC repeats a request at once if the first answer is an error
ZAPPING_TIME = 2.0  # seconds that a client which changes channels waits for its previous slot
ZAPPING_TICK = 0.05  # seconds between two checks of whether that slot is free
APPLES_PLAYER = "AppleCoreMedia/"  # starts the user agent of Apple's system player
TITLES_TOLD = 3  # titles named in the refusal of a full account
STATES_SHOWN = (*PLAYING, "waiting", "starting")  # best first: a stream shows its channels' best


@dataclass(frozen=True)
class Room:
    """Whether an upstream may be opened at an address."""

    closing: Sequence[Channel] = ()  # channels without viewers that must be closed first
    refusal: LimitReached | None = None  # why it may not be opened; None: it may


class NoHls(StreamError):
    """A finite stream, or one without segments, is not available as HLS."""

    def __init__(self, stream: StreamSettings) -> None:
        reason = f"this stream is not available as HLS: play /{stream.name}"
        super().__init__(HTTPStatus.NOT_FOUND, reason)


class Channels:
    """All channels, and the records of their streams."""

    def __init__(self, config: Config) -> None:
        # Guards everything below, the fields that Channel names, and the records.  Notified when a
        # start finds its variants, when a channel goes live, and when its thread ends.  Reentrant.
        self.changed = threading.Condition()
        self._config = config
        self._channels: dict[Channel, None] = {}  # not ENDED, or with viewers; oldest start first
        self._records: dict[str, StreamRecord] = {}  # by stream
        # When _close() last closed a channel, by the host and account of its address.
        self._closed: dict[tuple[str, str], float] = {}
        self.stopping = threading.Event()  # set once, under `changed`; any thread may check it

    # Viewers' threads

    def watch(self, stream: StreamSettings, quality: str | None, viewer: Viewer) -> Channel:
        """Attach a viewer to the channel that it requests; start one if none is running.

        Blocks until the channel has media, for the stream's `timeout` at most.  Raises StreamError
        if the stream cannot be served, and ViewerGone if the viewer left meanwhile.
        """
        began = time.monotonic()
        is_reserved = False  # the start must serve this viewer alone, in a private channel
        with self.changed:
            while True:
                if viewer.is_gone():
                    raise ViewerGone
                try:
                    channel = self._attach(stream.name, quality, viewer, is_reserved)
                except LimitReached as refusal:
                    may_zap = viewer.address in refusal.held_by
                    if time.monotonic() - began > ZAPPING_TIME or not may_zap:
                        raise
                    self.changed.wait(ZAPPING_TICK)
                    continue
                if self._await_start(channel, viewer, began + stream.options.timeout):
                    return channel
                is_reserved = channel.state is State.PRIVATE

    def poll(
        self, stream: StreamSettings, quality: str | None, viewer: Viewer, *, anew: bool
    ) -> tuple[Channel, Viewer]:
        """Find or start the channel for an HLS request, and the Viewer that stands for its client.

        While an ended channel keeps its playlist, its clients get the rest of it, unless `anew`
        says that a client starts again.  Blocks and raises like watch(), and also raises
        StreamError if the channel has no HLS.
        """
        with self.changed:
            channel = None
            for candidate in self.channels_to_poll(stream, quality):
                has_ended = candidate.state is State.ENDED
                if viewer.key in candidate.pollers and not (has_ended and anew):
                    channel = candidate
                    break
            viewer.has_page = anew
            if channel is None:
                channel = self.watch(stream, quality, viewer)
                self._add_poller(channel, viewer)
            known = channel.pollers[viewer.key]
            known.has_page = known.has_page or anew or _plays_for_a_page(channel, known)
            known.moved = time.monotonic()
        return channel, known

    def _add_poller(self, channel: Channel, viewer: Viewer) -> None:
        """Keep an attached viewer as a poller until it stops sending requests.

        Detaches it instead if its client is a poller already, if the channel has no HLS (raises
        NoHls), or if the channel has ended (raises UpstreamError).
        """
        is_known = viewer.key in channel.pollers  # another request of this client was faster
        has_ended = channel.state is State.ENDED  # while this thread waited for the lock
        if is_known or has_ended or not channel.has_hls:
            self._detach(channel, viewer)
        if has_ended:
            raise UpstreamError(JUST_ENDED)
        if not channel.has_hls:
            raise NoHls(channel.stream)
        if is_known:
            return

        def is_silent() -> bool:
            # Read the patience at every check, because the target duration of a raw source grows.
            return time.monotonic() - viewer.moved > channel.poll_patience

        viewer.is_gone = is_silent
        channel.pollers[viewer.key] = viewer
        channel.record.add("arrivals")
        label = viewer_label(viewer.address)
        log.info("%s: %s started watching (HLS)", channel.stream.name, label)

    def channels_to_poll(self, stream: StreamSettings, quality: str | None) -> list[Channel]:
        """The running channel for a request, then the ended ones that clients still poll."""
        with self.changed:
            wanted = quality or stream.quality
            found = []
            running = self._find(stream, wanted)
            if running:
                found.append(running)
            for channel in self._channels_of(stream.name):
                is_listed = channel.state is State.ENDED and not channel.stopped.is_set()
                if not (is_listed and channel.pollers and channel.variants):
                    continue
                if channel.variant == variant_of(wanted, channel.variants):
                    found.append(channel)
            return found

    def note_poll(self, channel: Channel, key: tuple[str, ...], size: int) -> None:
        """Count the bytes of a segment that a poller has received."""
        with self.changed:
            viewer = channel.pollers.get(key)
            if viewer:
                viewer.moved = time.monotonic()
                viewer.sent += size
            else:  # it took so long that it was detached as gone
                channel.record.add("sent", size)

    def leave(self, channel: Channel, viewer: Viewer) -> None:
        """Detach a viewer; the linger time starts when the last one leaves."""
        with self.changed:
            self._detach(channel, viewer)
        channel.wake()

    def record(self, name: str) -> StreamRecord:
        with self.changed:
            return self._records.setdefault(name, StreamRecord(self.changed))

    def known(self, name: str) -> StreamRecord:
        """A stream's record to read; an empty one if nobody has requested the stream.

        With thousands of streams, a record for each would cost more than the streams.
        """
        with self.changed:
            record = self._records.get(name)
            if record is None:
                record = StreamRecord(self.changed)
            return record

    def status(self, stream: StreamSettings) -> dict[str, Any]:
        """A stream as it is now, as /status prints it."""
        with self.changed:
            return self._status(stream)

    def active_names(self) -> set[str]:
        """The names of streams that have a channel, or that failed and received nothing since."""
        with self.changed:
            running = {channel.stream.name for channel in self._channels}
            failed = {name for name, record in self._records.items() if record.has_failed}
            return running | failed

    def totals(self, stream: StreamSettings) -> Counter[str]:
        """A stream's counts since the server started, including those of its current viewers."""
        with self.changed:
            counts = self.known(stream.name).counts.copy()
            for channel in self._channels_of(stream.name):
                for viewer in channel.viewers:
                    counts["sent"] += viewer.sent
                    counts["skips"] += viewer.skips
            return counts

    def requested(self) -> set[str]:
        """The names of the streams that were requested since the server started."""
        with self.changed:
            return set(self._records)

    def viewer_count(self) -> int:
        with self.changed:
            return sum(len(channel.viewers) for channel in self._channels)

    def slot_count(self) -> int:
        """The number of slots under `max_upstreams` that are in use."""
        with self.changed:
            return len(self._holding())

    def drop_reason(self, channel: Channel) -> str:
        """Why a channel that broke off disconnects its viewers: the metric's label."""
        with self.changed:  # reload() holds this lock until the channel's stop() has returned
            if self.stopping.is_set():
                return "shutdown"
            if channel.stopped.is_set():
                return "reload"
            if channel.error and channel.error.reason == NOT_BACK:
                return "reconnect"
            return "failed"

    def _attach(self, name: str, quality: str | None, viewer: Viewer, is_reserved: bool) -> Channel:
        """Attach the viewer to a running channel or a new one, without waiting for media.

        `is_reserved`: no other viewer may share the channel.  Raises StreamError if the viewer
        cannot attach: the table above ("Requests that cannot attach") lists the cases.
        """
        if self.stopping.is_set():
            raise stopping_error()
        stream = self._config.streams.get(name)  # a reload may have changed or removed it
        if stream is None:
            raise StreamError(HTTPStatus.NOT_FOUND, "there is no such stream")
        wanted = quality or stream.quality
        viewer.wanted = wanted
        viewer.variant = None

        channel = None
        if not is_reserved:
            channel = self._find(stream, wanted)
        if channel is not None:
            viewer.variant = channel.variant
        if channel is None:
            self._recall(stream, wanted)
        if channel is None and not is_reserved:
            channel = self._find_start(stream, wanted)

        self._make_seat(viewer)
        if channel is None:
            order = self._make_slot(stream, viewer)
            channel = self._start(stream, wanted, is_reserved, order)

        channel.viewers[viewer] = None
        if not viewer.polls:
            channel.window.enter(viewer)
        watching = sum(len(other.viewers) for other in self._channels_of(name))
        channel.record.peak = max(channel.record.peak, watching)
        return channel

    def _channels_of(self, name: str) -> list[Channel]:
        """A stream's channels, in the order they started."""
        return [channel for channel in self._channels if channel.stream.name == name]

    def _start(
        self, stream: StreamSettings, wanted: str, is_reserved: bool, order: Sequence[int]
    ) -> Channel:
        """Make a channel and start its thread, which waits for the lock that the caller holds.

        Raises LimitReached if the system has no threads left.
        """
        channel = Channel(self, stream, wanted, is_reserved, order)
        channel.account = self._account_of(stream, channel.address)
        try:
            channel.start()
        except RuntimeError as error:
            held_by = _addresses_of(self._channels)
            raise LimitReached(TOO_MANY_THREADS, "threads", held_by) from error
        self._channels[channel] = None
        return channel

    def _find(self, stream: StreamSettings, wanted: str) -> Channel | None:
        """The channel that has, or will have, the first of the wanted qualities that exists.

        None if there is no such channel, or the variants are unknown.
        """
        variant = variant_of(wanted, self._variants_of(stream))
        if variant is None:
            return None
        for channel in self._channels_of(stream.name):
            if channel.is_offered and channel.variant == variant:
                return channel
        return None

    def _find_start(self, stream: StreamSettings, wanted: str) -> Channel | None:
        """A start to wait for: one with unknown variants, or for the same quality; or None."""
        for channel in self._channels_of(stream.name):
            is_start = channel.is_offered and channel.state is State.STARTING
            if is_start and (channel.variants is None or channel.wanted == wanted):
                return channel
        return None

    def _variants_of(self, stream: StreamSettings) -> Mapping[str, str]:
        """The variants that the newest start found, and all running ones, by name."""
        variants = dict(self.known(stream.name).variants)
        for channel in self._channels_of(stream.name):
            if channel.is_running and channel.variant is not None:
                variants[channel.variant] = channel.variant
        return variants

    def _recall(self, stream: StreamSettings, wanted: str) -> None:
        """Raise the error with which a start would end, if it is known without trying."""
        record = self.record(stream.name)
        now = time.monotonic()
        for quality, (at, _) in tuple(record.start_errors.items()):
            if now - at > FAILURE_MEMORY:
                del record.start_errors[quality]
        if wanted in record.start_errors:
            _, error = record.start_errors[wanted]
            raise error.copy()

        is_running = any(channel.is_running for channel in self._channels_of(stream.name))
        is_fresh = record.resolved is not None and now - record.resolved < FAILURE_MEMORY
        variants = self._variants_of(stream)
        is_offered = any(name in variants for name in names_in(wanted))
        is_known = (is_running or is_fresh) and bool(variants)
        if is_known and not is_offered and wanted != stream.quality:
            raise no_quality_error(_unique(variants.values()))

    def _make_seat(self, viewer: Viewer) -> None:
        """Raise LimitReached if there are too many viewers, not counting those that have left."""
        if not self._has_seat():
            self._detach_departed([viewer])
        if not self._has_seat():
            reason = "there are too many viewers"
            raise LimitReached(reason, "max_viewers", _addresses_of(self._channels))

    def _make_slot(self, stream: StreamSettings, viewer: Viewer) -> list[int]:
        """Make room for a start; returns the positions of the addresses in the order to try them.

        The first one has a slot; those that have none are last.  Raises LimitReached if no address
        has a slot.
        """
        order = self.record(stream.name).start_order(stream.urls)
        first: LimitReached | None = None
        held_by: set[str] = set()
        for number, position in enumerate(order):
            try:
                self._free_slots(stream, stream.urls[position], [viewer])
            except LimitReached as refusal:
                if first is None:
                    first = refusal
                held_by.update(refusal.held_by)
            else:
                return order[number:] + order[:number]
        assert first, "every stream has an address"
        raise LimitReached(first.reason, first.limit, held_by)

    def _detach_departed(self, newcomers: Collection[Viewer]) -> None:
        """Detach viewers that have left.

        A polling client has left its channel if it is among the newcomers to another.
        """
        polling = [newcomer for newcomer in newcomers if newcomer.polls]
        for channel in tuple(self._channels):
            for viewer in tuple(channel.viewers):
                is_elsewhere = viewer not in newcomers and _has_moved(viewer, polling)
                if is_elsewhere or viewer.is_gone():
                    self._detach(channel, viewer)

    def _has_seat(self) -> bool:
        most = self._config.server.max_viewers
        if most == 0:  # no limit
            return True
        return self.viewer_count() < most

    def _holding(self) -> list[Channel]:
        """The channels that hold a slot.

        A closed channel holds none: its connections are closed, even if its thread still runs.
        """
        return [channel for channel in self._channels if not channel.is_over]

    def _account_of(self, stream: StreamSettings, address: str) -> str | None:
        """The name of the playlist whose account an address uses."""
        return account_name_of(self._config, stream, address)

    def _room_at(self, stream: StreamSettings, address: str, mover: Channel | None = None) -> Room:
        """Whether a start may open an upstream at an address, or the channel `mover` move there."""
        holders = [channel for channel in self._holding() if channel is not mover]
        closing: list[Channel] = []

        playlist = account_of(self._config, stream, address)
        if playlist and not (mover and mover.account == playlist.name):
            sharing = [channel for channel in holders if channel.account == playlist.name]
            surplus = _surplus(sharing, playlist.max_upstreams)
            if surplus is None:
                reason = _account_is_full(playlist.max_upstreams, sharing)
                return Room(refusal=LimitReached(reason, "account", _addresses_of(sharing)))
            closing += surplus

        if mover is None:  # a mover already holds a slot of the server
            others = [channel for channel in holders if channel not in closing]
            surplus = _surplus(others, self._config.server.max_upstreams)
            if surplus is None:
                reason = "there are too many upstreams"
                held_by = _addresses_of(holders)
                return Room(refusal=LimitReached(reason, "max_upstreams", held_by))
            closing += surplus
        return Room(closing)

    def _free_slots(
        self,
        stream: StreamSettings,
        address: str,
        newcomers: Collection[Viewer],
        mover: Channel | None = None,
    ) -> None:
        """Make room for a start or a mover: close the channels that _room_at() finds in the way.

        If there is no room, first detaches viewers that have left.  Raises LimitReached if there is
        still none.
        """
        room = self._room_at(stream, address, mover)
        if room.refusal:
            self._detach_departed(newcomers)
            room = self._room_at(stream, address, mover)
        if room.refusal:
            raise room.refusal
        for channel in room.closing:
            self._close(channel)

    def _await_start(self, channel: Channel, viewer: Viewer, deadline: float) -> bool:
        """Wait until the channel has media for this viewer; False if the viewer must start over.

        Raises StreamError if the start failed, or has no media by the viewer's own deadline, NoHls
        for a polling client that the start cannot serve, and ViewerGone if the viewer left.
        """
        if channel.is_running:
            return True
        while channel.state is State.STARTING and channel.suits(viewer):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or viewer.is_gone():
                self._detach(channel, viewer)
                if remaining <= 0:
                    raise no_media_error(channel.stream, channel.trouble)
                raise ViewerGone
            self.changed.wait(min(remaining, START_TICK))

        suits = channel.suits(viewer)
        if suits and channel.had_media:
            is_attached = viewer in channel.viewers  # go_live() leaves a private channel just one
            if viewer.polls and not is_attached and channel.state is State.PRIVATE:
                raise NoHls(channel.stream)
            return is_attached
        self._detach(channel, viewer)
        if suits and channel.error:
            raise channel.error.copy()
        return False

    def _detach(self, channel: Channel, viewer: Viewer) -> None:
        if channel.pollers.get(viewer.key) is viewer:
            del channel.pollers[viewer.key]
            log.info("%s: %s left: %d bytes in %.1f s (HLS)", channel.stream.name,
                     viewer_label(viewer.address), viewer.sent,
                     time.monotonic() - viewer.since)  # fmt: skip
        if viewer in channel.viewers:
            del channel.viewers[viewer]
            channel.record.add("sent", viewer.sent)
            channel.record.add("skips", viewer.skips)
            if not channel.viewers:
                channel.idle_since = time.monotonic()
        channel.window.leave(viewer)
        self._forget_if_over(channel)

    def _forget_if_over(self, channel: Channel) -> None:
        if not channel.viewers and channel.state is State.ENDED:
            self._channels.pop(channel, None)

    def _status(self, stream: StreamSettings) -> dict[str, Any]:
        record = self.known(stream.name)
        counts = self.totals(stream)
        channels = self._channels_of(stream.name)
        shown = [channel.status() for channel in channels if channel.viewers or not channel.is_over]

        states = {channel["state"] for channel in shown}
        state = "failed" if record.has_failed else "idle"
        for best in STATES_SHOWN:
            if best in states:
                state = best
                break

        trouble = record.last_trouble
        last_error: str | None = None
        last_error_seconds: float | None = None
        if trouble is not None:
            last_error = trouble.reason
            last_error_seconds = round(time.monotonic() - trouble.noted, 1)

        return {
            "stream": stream.name,
            "title": stream.title,
            "group": stream.group,
            "state": state,
            "viewers": sum(len(channel.viewers) for channel in channels),
            "peak": record.peak,
            "bytes_in": counts["received"],
            "bytes_out": counts["sent"],
            "bitrate": sum(channel.bitrate for channel in channels),
            "restarts": counts["restarts"],
            "gaps": counts["gaps"],
            "last_error": last_error,
            "last_error_seconds": last_error_seconds,
            "channels": shown,
        }

    # Channels' threads

    def take_slot(self, channel: Channel, address: str) -> None:
        """Take a slot of an address's account, if it has one, for a channel about to open it.

        The channel gives back its slot of another account.  Raises LimitReached if none is free.
        """
        with self.changed:
            newcomers: Collection[Viewer] = ()
            if channel.state is State.STARTING:  # viewers of a running channel may have left it
                newcomers = channel.viewers
            self._free_slots(channel.stream, address, newcomers, channel)
            channel.address = address
            channel.account = self._account_of(channel.stream, address)

    def is_refused_to_itself(self, channel: Channel, failure: StreamError) -> bool:
        """Whether a start has no slot because a client that waits for it holds one.

        That client is probably zapping, and will leave the other channel.
        """
        if not isinstance(failure, LimitReached):
            return False
        with self.changed:
            return any(viewer.address in failure.held_by for viewer in channel.viewers)

    def note_variants(
        self, channel: Channel, canonical: Mapping[str, str], variant: str | None
    ) -> None:
        """Record the variants that a start found; `variant` is None if the wanted one is missing.

        Viewers that wait for the start but want another variant start over.  Raises Stop if the
        start was closed, or if another channel has this variant: its viewers attach there.
        """
        with self.changed:
            if channel.state is State.CLOSED:  # these variants may be those of an old address
                raise Stop
            channel.variants = canonical
            channel.variant = variant
            channel.record.variants = canonical
            channel.record.resolved = time.monotonic()
            self.changed.notify_all()
            if channel.is_offered and self._is_offered_by_another(channel):
                raise Stop

    def go_live(
        self, channel: Channel, container: Container, has_hls: bool, is_private: bool
    ) -> None:
        """Make a channel that has its first media LIVE or PRIVATE.

        Raises Stop if another channel has its variant, or if the channel was stopped: after a
        reload, no viewer may find a channel with the old settings.
        """
        with self.changed:
            channel.container = container
            channel.record.container = container
            is_taken = not is_private and self._is_offered_by_another(channel)
            if is_taken or channel.state is State.CLOSED:
                raise Stop
            channel.state = State.PRIVATE if is_private else State.LIVE
            channel.had_media = True
            channel.has_hls = has_hls
            if is_private:
                self._leave_one(channel)
            self.changed.notify_all()

    def _leave_one(self, channel: Channel) -> None:
        """Detach all suited viewers of a private channel but one; polling clients cannot use it."""
        suited = [viewer for viewer in channel.viewers if channel.suits(viewer)]
        streaming = [viewer for viewer in suited if not viewer.polls]
        kept = (streaming or suited)[:1]
        for viewer in suited:
            if viewer not in kept:
                self._detach(channel, viewer)

    def end(self, channel: Channel, is_complete: bool, error: StreamError | None) -> None:
        """Record that a channel's thread ends, and how; called once for each channel."""
        with self.changed:
            if channel.state is not State.CLOSED:  # if it is, stop() cut the upstream: no failure
                channel.error = error
            if channel.state is State.STARTING and error:
                self._remember_failure(channel, error)
            channel.state = State.ENDED
            # Detach pollers here, so that no request finds them.  If the source truly ended, they
            # stay until _see_pollers_off() detaches them.
            if not is_complete:
                for viewer in tuple(channel.pollers.values()):
                    channel.record.add_drop(self.drop_reason(channel))
                    self._detach(channel, viewer)
            self._forget_if_over(channel)
            self.changed.notify_all()
        channel.window.end(is_complete)

    def _remember_failure(self, channel: Channel, error: StreamError) -> None:
        """Remember a start's error for every requested quality that it would have served."""
        if isinstance(error, LimitReached):  # a slot may be free again at any moment
            return
        qualities = {viewer.wanted for viewer in channel.viewers if channel.suits(viewer)}
        for quality in (channel.wanted, *qualities):
            channel.record.start_errors[quality] = time.monotonic(), error

    def close_idle_beside(self, newcomer: Channel, address: str) -> None:
        """Close the channels without viewers that use an address's host or account.

        Their connections may be the reason why the address refuses another one.
        """
        with self.changed:
            counted = _counted_by(address, self._account_of(newcomer.stream, address))
            self._detach_departed(newcomer.viewers)
            for channel in tuple(self._channels):
                is_counted = not counted.isdisjoint(_counted_by(channel.address, channel.account))
                if not (channel.viewers or channel.is_over) and is_counted:
                    self._close(channel)

    def was_just_closed(self, newcomer: Channel, address: str) -> bool:
        """Whether an address's host or account may still count a connection closed just now.

        Many panels allow only one connection at a time.
        """
        with self.changed:
            counted = _counted_by(address, self._account_of(newcomer.stream, address))
            now = time.monotonic()
            closed = [self._closed[place] for place in counted if place in self._closed]
            return any(now - each < ZAPPING_TIME for each in closed)

    def remove_pollers(self, channel: Channel, *, all_of_them: bool = False) -> None:
        """Detach the pollers that have left, or all of them."""
        with self.changed:
            for viewer in tuple(channel.pollers.values()):
                if all_of_them or viewer.is_gone():
                    self._detach(channel, viewer)

    def close_if_abandoned(self, channel: Channel) -> None:
        """Close a channel that had no viewers for its linger time; none can attach after that."""
        with self.changed:
            self.remove_pollers(channel)
            if channel.viewers or channel.state is State.STARTING:
                return
            if time.monotonic() - channel.idle_since >= channel.linger:
                self._close(channel)

    def close_if_unwatched(self, channel: Channel) -> None:
        """Close a channel without viewers in a pause between two tries; it does not linger.

        The check and the close are one step under the lock: a viewer that attached between them
        would get the error that its channel has just ended.
        """
        with self.changed:
            self.remove_pollers(channel)
            if not channel.viewers:
                self._close(channel)

    def _is_offered_by_another(self, channel: Channel) -> bool:
        """Whether another channel of the stream has, or will have, this one's variant."""
        if channel.variant is None:
            return False
        for other in self._channels_of(channel.stream.name):
            if other is not channel and other.is_offered and other.variant == channel.variant:
                return True
        return False

    def _close(self, channel: Channel) -> None:
        """Stop a channel: its connections are closed before others open.  Idempotent.

        If it has ended already, polling clients lose the rest of its playlist.
        """
        if channel.state is not State.ENDED:
            channel.state = State.CLOSED
            for place in _counted_by(channel.address, channel.account):
                self._closed[place] = time.monotonic()
        channel.stop()

    # Main

    def reload(self, config: Config) -> None:
        """Use a new configuration; stop the channels of streams that were removed or changed.

        A stream counts as changed if its `pulled` differs.  It keeps its totals; all other streams
        also keep their failures.
        """
        with self.changed:
            old = self._config
            self._config = config

            for channel in self._channels:
                stream = config.streams.get(channel.stream.name)
                if stream and stream.pulled == channel.stream.pulled:
                    channel.stream = stream
                    channel.account = self._account_of(stream, channel.address)
                else:
                    self._close(channel)

            in_use = {channel.stream.name for channel in self._channels}
            for name in self._records.keys() - config.streams.keys() - in_use:
                del self._records[name]

            for name, record in self._records.items():
                before = old.streams.get(name)
                after = config.streams.get(name)
                if before is None or after is None or before.pulled != after.pulled:
                    record.forget_failures()

    def stop(self, timeout: float) -> bool:
        """Disconnect all viewers, stop all threads; False if one still runs after `timeout` s."""
        with self.changed:
            self.stopping.set()
            for channel in self._channels:
                self._close(channel)
            return self.changed.wait_for(self._have_all_ended, timeout)

    def _have_all_ended(self) -> bool:
        return all(channel.state is State.ENDED for channel in self._channels)


def _surplus(holders: Sequence[Channel], limit: int) -> list[Channel] | None:
    """The channels without viewers that must close to free a slot under a limit (0: no limit).

    None if closing all of them would free none.
    """
    count = len(holders) + 1 - limit
    if limit == 0 or count <= 0:
        return []
    idle = [channel for channel in holders if not channel.viewers]
    idle.sort(key=lambda channel: channel.idle_since)
    if count > len(idle):
        return None
    return idle[:count]


def _account_is_full(limit: int, sharing: Collection[Channel]) -> str:
    """Why a start is refused: `this account allows 1 connection: BBC One is playing`."""
    titles = _unique(channel.stream.title for channel in sharing if channel.viewers)
    verb = "is" if len(titles) == 1 else "are"
    playing = f"{_joined(titles, TITLES_TOLD)} {verb} playing"
    return f"this account allows {_many(limit, 'connection')}: {playing}"


def _has_moved(viewer: Viewer, newcomers: Iterable[Viewer]) -> bool:
    """Whether a polling client is among the polling newcomers to another channel.

    A page that a person requests counts more than the playlist of a page that is still open in
    another tab: otherwise, two tabs would take one slot from each other again and again.  For the
    same reason, an earlier request takes no slot from a later one.
    """
    if not viewer.polls:
        return False
    for newcomer in newcomers:
        if newcomer.moved < viewer.moved:
            continue
        is_media_of_page = newcomer.has_page and _plays_for(viewer.agent, newcomer.agent)
        is_same_agent = viewer.agent == newcomer.agent or is_media_of_page
        is_same_client = viewer.address == newcomer.address and is_same_agent
        if is_same_client and (newcomer.has_page or not viewer.has_page):
            return True
    return False


def _plays_for_a_page(channel: Channel, player: Viewer) -> bool:
    """Whether this client of a channel plays the media of a page that another client requested."""
    if not player.agent.startswith(APPLES_PLAYER):
        return False
    for viewer in channel.pollers.values():
        is_same_person = viewer.has_page and viewer.address == player.address
        if is_same_person and _plays_for(player.agent, viewer.agent):
            return True
    return False


def _plays_for(agent: str, browser: str) -> bool:
    """Whether this agent requests the media for a browser's page.

    On Apple's devices, the system's own player does, and it names another agent than the browser.
    Both name the device, but Safari on an iPad may say that it is a Mac.
    """
    is_apples = "AppleWebKit/" in browser and "Safari/" in browser
    is_another = "Chrome/" in browser or "Android" in browser
    if not agent.startswith(APPLES_PLAYER) or not is_apples or is_another:
        return False
    device, page_device = _device_in(agent), _device_in(browser)
    return device == page_device or (device, page_device) == ("iPad", "Macintosh")


def _device_in(agent: str) -> str:
    """The device that an agent names: all up to the first ";" in its first parentheses."""
    return agent.partition("(")[2].partition(";")[0]


def _addresses_of(channels: Iterable[Channel]) -> set[str]:
    """The addresses of the clients that watch these channels."""
    return {viewer.address for channel in channels for viewer in channel.viewers}


def _counted_by(address: str, account: str | None) -> set[tuple[str, str]]:
    """The host, and the account if any, that may count connections to an address."""
    counted = {("host", host_of(address))}
    if account:
        counted.add(("account", account))
    return counted


# --------------------------------------------------------------------------------------------------
# Lists: loads the channel lists in the background, and applies them
#
# A thread for each playlist loads its list at the start, every `refresh` seconds, and on a reload.
# When a list has changed, the thread rebuilds the configuration with the streams of all lists, and
# applies it like a reload of the file.  If a list cannot be used, the previous one is kept.
# --------------------------------------------------------------------------------------------------

LIST_TIME = 300.0  # seconds that a list may take to load
LIST_PAUSES = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds between tries; the last repeats
FIRST_LIST_TIME = 60.0  # seconds that players are asked to wait for a list's first load
SHRUNK_TIME = 600.0  # seconds until a list that lost more than half of its channels is accepted
LISTS_WAIT = 5  # seconds after which players may repeat their request
LISTS_LOAD = "the list of channels is being loaded"


def load_list(settings: PlaylistSettings, fetch: Fetch) -> ChannelList:
    """Read a whole list, over HTTP or from a file; raises ListError and StreamError.

    A request blocks for the time of `fetch` at most.
    """
    if "://" in settings.url:
        fetch.open({"Accept-Encoding": "gzip, deflate"})
        parts = fetch.parts()
    else:
        parts = _parts_of_file(Path(settings.url).expanduser())
    parser = ListParser(settings)
    start = b""  # the first bytes
    for part in parts:
        if len(start) < SNIFF_LIMIT:
            start += part
            if _container_that_begins(start, (MPEG_TS, FMP4, MATROSKA, *PACKED_AUDIO)):
                raise ListError(A_STREAM)  # it might not end within the time for a list
        parser.feed(part)
    return parser.finish()


def _parts_of_file(path: Path) -> Iterator[bytes]:
    try:
        if path.exists() and not path.is_file():  # reading a device might never end
            raise ListError("the path is not a file")
        with path.open("rb") as file:
            while part := file.read(64 * KIB):
                yield part
    except OSError as error:
        raise ListError(f"the file cannot be read: {error.strerror}") from error


def fetch_for(settings: PlaylistSettings, address: str, seconds: float) -> Fetch:
    """A request with a playlist's headers, proxy and options; it may take `seconds`."""
    stream = StreamSettings(
        settings.name,
        (address,),
        headers=settings.headers,
        proxy=settings.proxy,
        options=settings.options,
    )
    return Fetch(stream, seconds)


class LoadingList:
    """A playlist at run time.  Guarded by the lock of the Lists that owns it."""

    def __init__(self, settings: PlaylistSettings) -> None:
        self.settings = settings
        self.since = time.monotonic()  # when it was configured
        self.due: float | None = self.since  # when it must be loaded next; None: on a reload
        self.list: ChannelList | None = None  # the newest accepted list
        self.loaded: float | None = None  # when that was accepted
        self.trouble: str | None = None  # why the newest load was refused
        self.refusals = 0  # loads refused in a row
        self.shrunk: float | None = None  # when it was first found to have lost half its channels
        self.is_new = True  # no list was accepted with these settings, so any size is accepted
        self.is_over = False  # removed from the configuration, or the server stops
        self.fetch: Fetch | None = None  # the request in progress
        self.thread: threading.Thread | None = None

    @property
    def channel_count(self) -> int:
        """The number of channels of the accepted list."""
        return 0 if self.list is None else len(self.list.entries)

    def has_lost_half(self, loaded: ChannelList) -> bool:
        """Whether a new list has fewer than half of the accepted list's channels.

        A list with other settings, such as other `groups:`, may be as short as it likes.
        """
        return not self.is_new and len(loaded.entries) * 2 < self.channel_count

    def load_in(self, seconds: float) -> None:
        """Make it due after this time, unless a reload has made it due earlier."""
        due = time.monotonic() + seconds
        if self.due is None or due < self.due:
            self.due = due

    def report(self) -> dict[str, Any]:
        """This list as /status prints it."""
        omitted: dict[str, int] = {}
        if self.list is not None:
            omitted = dict(self.list.omitted)
        age = None
        if self.loaded is not None:
            age = round(time.monotonic() - self.loaded, 1)
        return {
            "playlist": self.settings.name,
            "channels": self.channel_count,
            "omitted": omitted,
            "loaded_seconds": age,
            "last_error": self.trouble,
        }


class Lists:
    """The channel lists of a configuration; builds the configuration with their streams.

    Methods may be called from any thread.
    """

    def __init__(self, config: Config, apply: Callable[[Config], None]) -> None:
        """`apply` is called with each new configuration, by one thread at a time."""
        self._apply = apply
        # Held while a configuration is built and applied, so that configurations are applied in
        # order.  Taken before _changed, which is not held during apply().
        self._applying = threading.Lock()
        # Guarded by _applying.
        self._names: Mapping[Identity, str] = {}  # those that players may have stored
        self._newest_names: Mapping[Identity, str] = {}  # those of the newest configuration
        self._applied = config
        self._missed: set[str] = set()  # overrides without a stream, as last logged
        # Guards everything below.  Notified when a list becomes due earlier, or is over.
        self._changed = threading.Condition()
        self._config = config  # without the streams of lists
        self._lists = {name: LoadingList(found) for name, found in config.playlists.items()}

    # Main

    def start(self) -> None:
        """Load all lists, each in its own thread; returns at once."""
        with self._changed:
            for each in self._lists.values():
                self._start(each)

    def reload(self, config: Config) -> None:
        """Apply another configuration with the lists loaded so far, and load all lists again."""
        with self._changed:
            was_waiting = self._is_waiting()
            known = self._lists
            self._lists = {}
            for name, settings in config.playlists.items():
                each = known.get(name)
                if each is None:
                    each = LoadingList(settings)
                elif each.settings != settings:
                    self._change(each, settings)
                each.due = time.monotonic()
                self._lists[name] = each
                self._start(each)
            for name, each in known.items():
                if name not in self._lists:
                    each.is_over = True
                    self._end_request(each)
            self._config = config
            self._changed.notify_all()
        self._publish(was_waiting=was_waiting, is_reload=True)

    def stop(self, timeout: float) -> bool:
        """End all threads; False if one still runs after `timeout` seconds."""
        with self._changed:
            for each in self._lists.values():
                each.is_over = True
                self._end_request(each)
            threads = [each.thread for each in self._lists.values() if each.thread]
            self._changed.notify_all()
        ends = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _start(self, each: LoadingList) -> None:
        """Give a list its thread, unless it has one.  The caller holds _changed."""
        if each.thread is not None:
            return
        name = f"list-{each.settings.name}-0"
        thread = threading.Thread(target=self._run, args=(each,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no threads left: the next reload tries again
            self._refuse(each, TOO_MANY_THREADS)
        else:
            each.thread = thread

    def _change(self, each: LoadingList, settings: PlaylistSettings) -> None:
        """Use other settings for a list from now on.  The caller holds _changed."""
        if each.settings.url != settings.url:  # the new address has not failed yet
            each.trouble = None
            each.refusals = 0
        each.settings = settings
        each.is_new = True
        each.shrunk = None
        self._end_request(each)

    def _end_request(self, each: LoadingList) -> None:
        """End a list's request, if there is one.  The caller holds _changed."""
        if each.fetch is not None:
            each.fetch.close()

    # Viewers' threads

    def wait_time(self) -> int | None:
        """Seconds after which a player may ask again; None if it may have the streams at once.

        Players delete the channels that a playlist lacks, so they must wait for the first load.
        """
        with self._changed:
            return LISTS_WAIT if self._is_waiting() else None

    def report(self) -> list[dict[str, Any]]:
        """All lists as /status prints them."""
        with self._changed:
            return [each.report() for each in self._lists.values()]

    def _is_waiting(self) -> bool:
        """Whether a list may still be loaded for the first time.  The caller holds _changed."""
        now = time.monotonic()
        return any(
            each.list is None and now - each.since < FIRST_LIST_TIME
            for each in self._lists.values()
        )

    # The lists' threads

    def _run(self, each: LoadingList) -> None:
        while self._await_turn(each):
            self._load(each)

    def _await_turn(self, each: LoadingList) -> bool:
        """Wait until a list is due; False if it is over."""
        with self._changed:
            while not each.is_over:
                remaining = None
                if each.due is not None:
                    remaining = each.due - time.monotonic()
                    if remaining <= 0:
                        return True
                self._changed.wait(remaining)
            return False

    def _load(self, each: LoadingList) -> None:
        """Load a list once; accept and publish it, or refuse it."""
        with self._changed:
            settings = each.settings
            each.due = None

        outcome: ChannelList | str  # the list, or why it cannot be loaded
        try:
            fetch = fetch_for(settings, settings.url, LIST_TIME)
            with self._changed:
                each.fetch = fetch
                if each.is_over or each.settings is not settings:
                    fetch.close()
            with contextlib.closing(fetch):
                outcome = load_list(settings, fetch)
        except Exception as error:
            log.debug("%s: cannot load the list", settings.name, exc_info=True)
            outcome = explain(error)

        with self._changed:
            each.fetch = None
            if each.is_over:
                return
            if each.settings is not settings:  # a reload changed them meanwhile
                each.due = time.monotonic()
                return
            was_waiting = self._is_waiting()
            is_accepted = self._accept_or_refuse(each, outcome)
        if is_accepted:
            self._publish(was_waiting=was_waiting)

    def _accept_or_refuse(self, each: LoadingList, outcome: ChannelList | str) -> bool:
        """Accept or refuse the outcome of a load, and return whether it was accepted.

        The caller holds _changed.
        """
        if isinstance(outcome, str):
            pause = LIST_PAUSES[min(each.refusals, len(LIST_PAUSES) - 1)]
            self._refuse(each, outcome)
            each.load_in(pause)
            return False
        if each.has_lost_half(outcome):
            now = time.monotonic()
            if each.shrunk is None:
                each.shrunk = now
            pause = each.shrunk + SHRUNK_TIME - now
            if pause > 0:
                doubt = (
                    f"the list has only {_many(len(outcome.entries), 'channel')} instead of "
                    f"{each.channel_count}: it will be accepted if it is still this short in "
                    "10 minutes"
                )
                self._refuse(each, doubt)
                each.load_in(pause)
                return False
        self._accept(each, outcome)
        return True

    def _accept(self, each: LoadingList, loaded: ChannelList) -> None:
        """Use a list from now on.  The caller holds _changed."""
        is_news = True
        if each.list is not None and each.trouble is None:
            is_news = each.list.summary() != loaded.summary()
        level = logging.INFO if is_news else logging.DEBUG
        log.log(level, "%s: loaded the list: %s", each.settings.name, loaded.summary())
        each.list = loaded
        each.loaded = time.monotonic()
        each.is_new = False
        each.trouble = None
        each.refusals = 0
        each.shrunk = None
        if each.settings.refresh > 0:
            each.load_in(each.settings.refresh)

    def _refuse(self, each: LoadingList, reason: str) -> None:
        """Keep the previous list.  The caller holds _changed."""
        is_first = each.trouble is None
        level = logging.WARNING if is_first else logging.DEBUG
        kept = "; the previous list stays" if each.list else ""
        log.log(level, "%s: the list is not used: %s%s", each.settings.name, reason, kept)
        each.trouble = reason
        each.refusals += 1

    # Any thread

    def _publish(self, *, was_waiting: bool, is_reload: bool = False) -> None:
        """Build the configuration with the streams of all lists, and apply it if it has changed.

        `was_waiting`: until now, players were told to wait, so they do not know the newest names.
        A reload applies the configuration in any case, because its caller waits for that.
        """
        with self._applying:
            if not was_waiting:
                self._names = self._newest_names
            with self._changed:
                config = self._config
                is_waiting = self._is_waiting()
                lists = {name: each.list for name, each in self._lists.items() if each.list}
                is_complete = len(lists) == len(self._lists)
            config, self._newest_names = with_lists(config, lists, self._names)
            if not is_waiting:  # until then, a list configured earlier may still claim its names
                self._names = self._newest_names
            if is_reload or config != self._applied:
                self._apply(config)
                self._applied = config
            if is_complete:
                self._warn_of_missing(config)

    def _warn_of_missing(self, config: Config) -> None:
        """Warn once about each stream that has no address and is in no list."""
        missing = config.overrides.keys() - config.streams.keys()
        for name in sorted(missing - self._missed):
            log.warning("streams.%s: url is missing, and no list has this stream", name)
        self._missed = missing


# --------------------------------------------------------------------------------------------------
# Pages: playlists, HDHomeRun's documents, status, metrics, and web pages for people
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """The server as one client sees it."""

    server: Server
    config: Config  # as it was when the request was read: a reload replaces server.config
    url: str  # the server's base address, without a slash at the end
    lan_url: str  # the same, for other machines on the network
    is_trusted: bool  # whether the client may learn the token
    asked: Mapping[str, Sequence[str]]  # the query of the request

    @property
    def streams(self) -> Collection[StreamSettings]:
        """The streams that playlists and pages show: all but the hidden ones."""
        return [stream for stream in self.config.streams.values() if not stream.hide]

    @property
    def uptime(self) -> float:
        """Seconds since the server started."""
        return time.monotonic() - self.server.started

    def status(self, stream: StreamSettings) -> Mapping[str, Any]:
        """Return a stream's current state as /status prints it."""
        return self.server.channels.status(stream)

    def record(self, stream: StreamSettings) -> StreamRecord:
        return self.server.channels.known(stream.name)

    def wants(self, name: str) -> str:
        """Return a parameter of the request's query; empty if the query lacks it."""
        values = self.asked.get(name)
        if not values:
            return ""
        return values[-1]

    def query(self, **wanted: str | None) -> str:
        """Return the query of one of our addresses: the wanted parameters, and the token."""
        shown = {key: text for key, text in wanted.items() if text}
        token = self.config.server.token
        if token and self.is_trusted:
            shown["token"] = token
        if not shown:
            return ""
        return "?" + urlencode(shown, quote_via=quote)

    def local(self, path: str, **wanted: str) -> str:
        """Return an address for a page's script, relative like the page's links."""
        return path + self.query(**wanted)

    def link(self, path: str) -> str:
        """Return an absolute address that the client can follow."""
        return f"{self.url}/{path}{self.query()}"

    def typed(self, path: str, **wanted: str | None) -> str:
        """Return an address that people can type into a television."""
        return f"{self.lan_url}/{path}{self.query(**wanted)}"


@dataclass(frozen=True)
class Page:
    body: bytes
    kind: str


def json_page(content: object, indent: int | None = 1) -> Page:
    return Page(json.dumps(content, indent=indent).encode() + b"\n", "application/json")


# For players


def playlist_page(site: Site, streams: Iterable[StreamSettings]) -> Page:
    """Return an extended M3U.

    At least one of Kodi, TVHeadend, Jellyfin, VLC, mpv and Channels DVR reads each attribute.
    """
    head = "#EXTM3U"
    guides = ",".join(site.link(path) for path in guide_paths(site.config))
    if guides:
        head += f' x-tvg-url="{guides}" url-tvg="{guides}"'
    lines = [head]

    for stream in streams:
        title = _cleaned(stream.title) or stream.name
        attributes = {
            "tvg-id": _cleaned(stream.tvg_id),
            "channel-id": stream.name,  # by which Channels DVR identifies a channel
            "tvg-name": title,
            "tvg-logo": _quoted(stream.logo),
            "tvg-chno": "" if stream.number is None else str(stream.number),
            "group-title": _cleaned(stream.group),
        }
        shown = "".join(f' {key}="{value}"' for key, value in attributes.items() if value)
        lines.append(f"#EXTINF:-1{shown},{title}")
        lines.append(site.link(stream.name))
    return Page("\n".join(lines).encode() + b"\n", "audio/x-mpegurl")


def all_streams_page(site: Site) -> Page:
    """Return the extended M3U of all streams but hidden ones."""
    return playlist_page(site, site.streams)


def guide_paths(config: Config) -> list[str]:
    """Return the paths of all guides; most players read only the first."""
    names = list(config.guides)
    if not config.server.epg:
        if not names:
            return []
        names = names[1:]  # the first one's is /epg.xml
    paths = ["epg.xml"]
    for name in names:
        paths.append(f"epg/{name}.xml")
    return paths


def guide_at(config: Config, path: str) -> tuple[PlaylistSettings, str] | None:
    """Return the settings and address for requesting the guide at a path, or None."""
    if path == "/epg.xml" and config.server.epg:
        return PlaylistSettings("epg", "", options=config.options), config.server.epg
    found = GUIDE_PATH.fullmatch(path)
    names = list(config.guides)
    if path == "/epg.xml" and names:
        name = names[0]
    elif found:
        name = found[1]
    else:
        return None
    if name not in config.guides:
        return None
    return config.playlists[name], config.guides[name]


def whole_guide(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield a guide's body; the first part is long enough to show its format.

    Raises UpstreamError if the body is a web page.
    """
    start = b""
    for part in parts:
        start += part
        if len(start) >= GUIDE_START:
            break
    text = start
    if start.startswith(GZIP_START):
        with contextlib.suppress(zlib.error):
            text = zlib.decompressobj(GZIP_FORMAT).decompress(start, GUIDE_START)
    if HTML_START.match(text):
        raise UpstreamError("the origin sent a web page, not a guide")
    yield start
    yield from parts


def unpacked(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the contents of a gzip file in pieces of bounded size.

    The file may consist of several members (RFC 1952, 2.2).  Raises zlib.error if it is broken.
    """
    unpacker = zlib.decompressobj(GZIP_FORMAT)
    for part in parts:
        while part:
            yield unpacker.decompress(part, 64 * KIB)
            part = unpacker.unconsumed_tail
            if unpacker.eof:
                part = unpacker.unused_data
                unpacker = zlib.decompressobj(GZIP_FORMAT)
    yield unpacker.flush()


def _cleaned(text: str | None) -> str:
    """Return text without line breaks, double quotes or commas, which M3U cannot escape.

    mpv ends an entry's attributes at the first comma, and Jellyfin at the last.
    """
    if text is None:
        return ""
    allowed = text.replace(",", " ").replace('"', "'")
    return " ".join(allowed.split())


def _quoted(address: str | None) -> str:
    """Return an equivalent address without white space, commas or double quotes."""
    if address is None:
        return ""
    without_spaces = "%20".join(address.split())
    return without_spaces.replace(",", "%2C").replace('"', "%22")


GUIDE_PATH = re.compile(r"/epg/([a-z0-9-]+)\.xml")
GUIDE_START = 1 * KIB  # bytes of a guide that suffice to show its format, also if compressed
# `<html` or `<!DOCTYPE html`, perhaps after a byte order mark and an XML declaration.
HTML_START = re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<(!doctype\s+)?html", re.IGNORECASE)
GZIP_START = b"\x1f\x8b"  # RFC 1952, 2.3.1
GZIP_FORMAT = 16 + zlib.MAX_WBITS  # selects the gzip format in zlib
GUIDE_NUMBERS = range(10_000, 100_000)  # for streams without a configured number
UNLIMITED_TUNERS = 16  # that a server without limits claims to have
MACHINE_ID = Path("/etc/machine-id")
SCAN_STATUS = {"ScanInProgress": 0, "ScanPossible": 1, "Source": "Cable", "SourceList": ["Cable"]}


def discover_page(site: Site) -> Page:
    """Return the document from which Plex, Jellyfin and Emby recognize a tuner."""
    server = site.config.server
    return json_page({
        "FriendlyName": server.name,
        "ModelNumber": "HDHR4-2US",  # for a model with HDTC, Jellyfin would request transcoding
        "FirmwareName": "hdhomerun4_atsc",
        "FirmwareVersion": "20200907",
        "DeviceID": device_id(site.server.port).upper(),
        "DeviceAuth": "streampipe",
        "BaseURL": site.url,
        "LineupURL": f"{site.url}/lineup.json",
        "TunerCount": tuner_count(site.config),  # a number: Plex turned a string into 49
    })  # fmt: skip


def tuner_count(config: Config) -> int:
    """Return how many streams a client of the tuner can play at once."""
    if config.server.max_upstreams > 0:
        count = config.server.max_upstreams
    elif config.server.max_viewers > 0:
        count = config.server.max_viewers
    else:
        count = UNLIMITED_TUNERS

    limits = [playlist.max_upstreams for playlist in config.playlists.values()]
    is_imported = all(stream.playlist for stream in config.streams.values())
    if is_imported and limits and 0 not in limits:  # 0: no limit
        count = min(count, sum(limits))
    return count


def lineup_page(site: Site) -> Page:
    numbers = guide_numbers(site.streams)
    return json_page([
        {
            "GuideNumber": str(numbers[stream.name]),
            "GuideName": stream.title,
            "URL": site.link(stream.name),
        }
        for stream in site.streams
    ])  # fmt: skip


def scan_status_page(site: Site) -> Page:
    """Answer a client that asks whether a scan for channels is possible."""
    return json_page(SCAN_STATUS)


def scan_page(site: Site) -> Page:
    """Answer a client that starts a scan for channels: there is nothing to do."""
    return json_page({})


def guide_numbers(streams: Collection[StreamSettings]) -> dict[str, int]:
    """Return each stream's number by its name: the configured number, or one made from the name.

    Plex maps its guide by these numbers.  So a new stream changes another one's number only if the
    two collide: then the name that sorts later gets the next free number.
    """
    numbers = {stream.name: stream.number for stream in streams if stream.number}
    taken = set(numbers.values())
    for name in sorted(stream.name for stream in streams if not stream.number):
        first = GUIDE_NUMBERS[zlib.crc32(name.encode()) % len(GUIDE_NUMBERS)]
        number = _free_number(first, taken)
        taken.add(number)
        numbers[name] = number
    return numbers


def _free_number(first: int, taken: Collection[int]) -> int:
    """Return the first free guide number from `first` on; the search wraps around at the end."""
    number = first
    for _ in GUIDE_NUMBERS:
        if number not in taken:
            return number
        number += 1
        if number == GUIDE_NUMBERS.stop:
            number = GUIDE_NUMBERS.start

    number = GUIDE_NUMBERS.stop  # there are more streams than numbers
    while number in taken:
        number += 1
    return number


def device_id(port: int) -> str:
    """Return eight hexadecimal digits that stay the same for this machine and port.

    The machine's ID is hashed, because systemd asks programs not to expose it.
    """
    machine = ""
    with contextlib.suppress(OSError, ValueError):
        machine = MACHINE_ID.read_text(encoding="ascii").strip()
    if not re.fullmatch("[0-9a-f]{32}", machine):  # most containers have no valid ID
        machine = f"{uuid.getnode():012x}"  # the network card's address
    return hashlib.sha256(f"streampipe {machine} {port}".encode()).hexdigest()[:8]


def device_page(site: Site) -> Page:
    name = html.escape(site.config.server.name)
    device = device_id(site.server.port)
    body = f"""<?xml version="1.0" encoding="UTF-8"?>
<root xmlns="urn:schemas-upnp-org:device-1-0">
  <specVersion><major>1</major><minor>0</minor></specVersion>
  <URLBase>{html.escape(site.url)}</URLBase>
  <device>
    <deviceType>urn:schemas-upnp-org:device:MediaServer:1</deviceType>
    <friendlyName>{name}</friendlyName>
    <manufacturer>StreamPipe</manufacturer>
    <modelName>HDHR4-2US</modelName>
    <modelNumber>HDHR4-2US</modelNumber>
    <serialNumber>{device}</serialNumber>
    <UDN>uuid:{device}-0000-4000-8000-000000000000</UDN>
  </device>
</root>
"""
    return Page(body.encode(), "application/xml")


# For monitoring


def status_json(site: Site) -> Page:
    """Return the whole status; `?stream=NAME` and `?active=1` restrict its streams."""
    streams: Iterable[StreamSettings] = site.config.streams.values()
    if name := site.wants("stream"):
        streams = [stream for stream in streams if stream.name == name]
    if site.wants("active") == "1":
        names = site.server.channels.active_names()
        streams = [stream for stream in streams if stream.name in names]
    return json_page({
        "name": site.config.server.name,
        "version": __version__,
        "uptime_seconds": round(site.uptime, 1),
        "playlists": site.server.lists.report(),
        "streams": [site.status(stream) for stream in streams],
    })  # fmt: skip


Samples = Mapping[str, float]  # by the part after the metric's name: labels, or a suffix ("_sum")


def metrics_page(site: Site) -> Page:
    """Return all metrics in Prometheus' text format, version 0.0.4."""
    server = site.server
    answers, refusals, first_bytes, first_byte_sum = server.counts()
    buckets = {f"_bucket{_labels(le=bound)}": first_bytes[bound] for bound in FIRST_BYTE_BOUNDS}
    histogram = {**buckets, "_sum": first_byte_sum, "_count": first_bytes["+Inf"]}
    requests = {_labels(code=code): count for code, count in sorted(answers.items())}
    # Report zeros, too: Prometheus sees no increase in a counter that first appears as 1.
    refused = {_labels(reason=limit): refusals[limit] for limit in LIMITS}
    failed_lists = [each for each in server.lists.report() if each["last_error"] is not None]
    limits = site.config.server
    last_reload = server.last_reload

    families = [
        _family("build_info", "StreamPipe's version.", {_labels(version=__version__): 1}),
        _family("start_time_seconds", "When it started.", {"": time.time() - site.uptime}),
        _family("last_reload_successful", LAST_RELOAD, {"": int(last_reload.is_successful)}),
        _family("last_reload_timestamp_seconds", "When that was.", {"": last_reload.at}),
        _family("failed_lists", FAILED_LISTS, {"": len(failed_lists)}),
        _family("http_requests_total", "Answers by status.", requests),
        _family("refusals_total", "Requests refused at a limit, by reason.", refused),
        _family("max_viewers", "Viewers allowed at once; 0: no limit.", {"": limits.max_viewers}),
        _family("max_upstreams", "Slots for upstreams; 0: no limit.", {"": limits.max_upstreams}),
        _family("upstream_slots", "Slots in use.", {"": server.channels.slot_count()}),
        _family("first_byte_seconds", "From a request to its first media byte.", histogram),
    ]

    requested = server.channels.requested()
    streams = [stream for name, stream in site.config.streams.items() if name in requested]
    stream_samples = [_stream_samples(site, stream) for stream in streams]
    for name, words in STREAM_METRICS.items():
        samples: dict[str, float] = {}
        for each in stream_samples:
            samples.update(each[name])
        families.append(_family(name, words, samples))
    return Page("".join(families).encode(), "text/plain; version=0.0.4; charset=utf-8")


FAILED_LISTS = "Channel lists whose last load failed or was not accepted."
LAST_RELOAD = "1 if the last reload succeeded, or there was none; 0 if the file has mistakes."
STATE_METRICS = {  # the state in the metrics, by the state in /status
    "live": "live",
    "private": "live",
    "waiting": "waiting",
    "starting": "waiting",
    "failed": "failed",
    "idle": "idle",
}
STREAM_METRICS = {
    "stream_state": "1 for the state that a stream is in: live, waiting, failed or idle.",
    "viewers": "Viewers now.",
    "upstreams": "Upstreams that deliver media.",
    "window_bytes": "Bytes in windows.",
    "viewer_connections_total": "Viewers that arrived.",
    "sent_bytes_total": "Media sent to viewers.",
    "received_bytes_total": "Media received from origins.",
    "viewer_skips_total": "Times that viewers fell behind and skipped ahead.",
    "segment_gaps_total": "Segments lost.",
    "upstream_restarts_total": "Upstreams reopened.",
    "upstream_errors_total": "Upstream failures, by reason.",
    "last_error_timestamp_seconds": "When an origin failed last, if it did.",
    "viewer_drops_total": "Viewers that StreamPipe disconnected, by reason.",
}


def _stream_samples(site: Site, stream: StreamSettings) -> Mapping[str, Samples]:
    """Return a stream's samples by metric: one number, or one for each state or reason."""
    status = site.status(stream)
    totals = site.server.channels.totals(stream)
    channels = status["channels"]
    working = [channel for channel in channels if channel["state"] in PLAYING]
    numbers = {
        "viewers": status["viewers"],
        "upstreams": len(working),
        "window_bytes": sum(channel["window_bytes"] for channel in channels),
        "viewer_connections_total": totals["arrivals"],
        "sent_bytes_total": totals["sent"],
        "received_bytes_total": totals["received"],
        "viewer_skips_total": totals["skips"],
        "segment_gaps_total": totals["gaps"],
        "upstream_restarts_total": totals["restarts"],
    }
    samples: dict[str, Samples] = {
        name: {_labels(stream=stream.name): number} for name, number in numbers.items()
    }

    state = STATE_METRICS[status["state"]]
    samples["stream_state"] = {
        _labels(stream=stream.name, state=each): int(each == state)
        for each in ("live", "waiting", "failed", "idle")
    }

    record = site.record(stream)
    trouble = record.last_trouble
    samples["last_error_timestamp_seconds"] = {}
    if trouble:
        samples["last_error_timestamp_seconds"] = {_labels(stream=stream.name): trouble.unix_time}

    errors, drops = record.reasons()
    samples["upstream_errors_total"] = _samples_by_reason(stream, errors)
    samples["viewer_drops_total"] = _samples_by_reason(stream, drops)
    return samples


def _samples_by_reason(stream: StreamSettings, counts: Counter[str]) -> Samples:
    samples = {}
    for reason, number in sorted(counts.items()):
        samples[_labels(stream=stream.name, reason=reason)] = number
    return samples


def _labels(**labels: object) -> str:
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    shown = (f'{name}="{str(value).translate(escapes)}"' for name, value in labels.items())
    return "{" + ",".join(shown) + "}"


def _family(name: str, words: str, samples: Samples) -> str:
    if name.endswith("_total"):
        kind = "counter"
    elif "_sum" in samples:
        kind = "histogram"
    else:
        kind = "gauge"
    lines = [f"# HELP streampipe_{name} {words}", f"# TYPE streampipe_{name} {kind}"]
    lines += [f"streampipe_{name}{tail} {value!r}" for tail, value in samples.items()]
    return "\n".join(lines) + "\n"


# For people
#
# All pages work without JavaScript; PAGE_SCRIPT only makes them more convenient.  No page reloads
# itself, because a person with a remote control, a keyboard or a screen reader would lose the
# focus.

HTML = "text/html; charset=utf-8"
NO_STREAMS = "no streams are configured: add some under streams: in the file, and restart"
ALL_OPEN = 60  # streams; if there are more, only the requested group is open
ALL_SENT = 500  # streams; if there are more, the page has only the requested cards
MOST_CARDS = 200  # in a page with the requested cards, or in a search's results
MOST_LINES = 50  # in the list of streams and channel lists that need attention
MOST_PLAYING = 24  # cards of playing streams while no group is open
MOST_VIEWERS = 200  # rows of the table of viewers
HUES = 24  # colors behind initials
FEW_GROUPS = 24  # if there are more, their links would push the results of a search off the screen
UNFOLDED_LINES = 3  # if more need attention, their list is folded
ATTENTION_TIME = 600.0  # seconds during which a failure needs attention
HELP = """<p>No picture? Chrome and Edge play this from version 142 on, as do Safari and Android's
browsers. Firefox on a desktop does not. Page Up and Page Down change the channel.</p>"""
NO_HLS = "Firefox on a desktop does not play this kind of stream (HLS). Chrome, Edge and Safari do."
PAGE_STYLE = """
:root{color-scheme:light dark;--bg:#f4f5f7;--card:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;
--live:#1a7f4b;--wait:#a15200;--bad:#c0262d;--mark:#2563c9;--halo:#0007;
--tile:45% 90%;--letters:60% 24%}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--card:#1e2227;--ink:#e8eaed;--soft:#9aa4b0;
--line:#343b43;--live:#4cc38a;--wait:#f0a04b;--bad:#ff8080;--mark:#7db2ff;--halo:#fff9;
--tile:30% 24%;--letters:60% 84%}}
*{box-sizing:border-box;overflow-wrap:anywhere}[hidden]{display:none!important}
html{scroll-padding:1rem}@media (min-width:1600px){html{font-size:calc(8px + .9vw)}}
body{margin:0;background:var(--bg);color:var(--ink);
font:1rem/1.35 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{padding:1rem;max-width:80rem;margin:0 auto}p{margin:.25rem 0}a{color:inherit}
h1,.home{font-size:1.4rem;line-height:1.2;margin:0}.home{font-weight:600}
.sorry{padding:15vh 0;text-align:center}.sorry nav{justify-content:center}
h2{font-size:1rem;margin:0;color:var(--soft)}
:focus-visible,li a:focus-visible::after{outline:3px solid var(--mark);outline-offset:2px}
li a:focus-visible{outline:0}summary{cursor:pointer;min-height:44px;padding:.7rem 0}
b{font-weight:600}.facts,.note,.more,td,th{font-size:.875rem;color:var(--soft)}
.live,.private{color:var(--live)}.waiting,.starting{color:var(--wait)}.failed{color:var(--bad)}
code{user-select:all;-webkit-user-select:all;color:var(--ink);font-size:1rem;background:var(--line);
border-radius:6px;padding:2px 6px}
header{display:flex;flex-wrap:wrap;gap:.5rem 1.5rem;align-items:center;
justify-content:space-between}
form{display:flex;gap:.5rem;flex:0 1 26rem}
input{flex:1;min-width:0}input,button,.button{font:inherit;color:inherit;min-height:44px;
padding:.64rem .9rem;border:1px solid var(--line);border-radius:1.5rem;background:var(--card)}
input{border-color:var(--soft)}button{cursor:pointer}
.button{display:inline-block;max-width:min(100%,18rem);overflow:hidden;text-overflow:ellipsis;
white-space:nowrap;text-align:center;text-decoration:none}.button b{color:var(--soft)}
.button:hover,button:hover{border-color:var(--mark)}
[aria-current]{background:var(--mark);border-color:var(--mark);color:var(--card)}
[aria-current] b{color:inherit!important}
nav{display:flex;flex-wrap:wrap;gap:.5rem;margin:.75rem 0}
.many nav{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(47%,11rem),1fr))}
.many nav .button{white-space:normal;max-width:none;border-radius:.75rem;padding:.64rem .4rem}
.many .group:not([open]){display:none}.many .group>summary{pointer-events:none;list-style:none}
.group>summary::-webkit-details-marker{color:var(--soft)}.group h2{display:inline}
ul{list-style:none;margin:0;padding:0}.cards{display:grid;gap:.6rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr))}
.cards:has(.chart){align-items:start}
.cards li{display:grid;align-content:center;position:relative;min-width:0;
padding:.5rem .75rem;background:var(--card);border:1px solid var(--line);border-radius:.75rem}
.cards li:hover,li:target{border-color:var(--mark)}
.cards a{display:flex;align-items:center;gap:.75rem;min-height:2.75rem;font-weight:600;
text-decoration:none;line-height:1.2}.cards a::after{content:"";position:absolute;top:0;
right:0;bottom:0;left:0;border-radius:.75rem}
.logo{flex:none;position:relative;width:4rem;height:2.25rem;border-radius:.4rem;overflow:hidden;
line-height:0}
.logo b{position:absolute;top:0;right:0;bottom:0;left:0;display:grid;place-items:center;
font-size:.9375rem;line-height:1;background:hsl(var(--hue) var(--tile));
color:hsl(var(--hue) var(--letters))}
.logo img{position:relative;width:4rem;min-height:2.25rem;max-height:2.25rem;object-fit:contain;
background:var(--card);filter:drop-shadow(0 0 1px var(--halo))}
@media (scripting:enabled){.logo img:not(.loaded){opacity:0}}.logo:has(.loaded) b{display:none}
.watch .logo img{background:var(--bg)}
.name{flex:1;min-width:0;display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:3;
overflow:hidden;unicode-bidi:plaintext}.name b{color:var(--soft);margin-inline-end:.15rem}
.name small{display:block;font-size:.8125rem;font-weight:400;color:var(--soft)}
.now p{margin:.2rem 0 0}.note::first-letter{text-transform:uppercase}
.chart{margin-top:.4rem;font-size:.75rem;color:var(--soft)}.chart p{display:flex;margin:0;
justify-content:space-between}.chart svg{display:block;width:100%;height:2.25rem;fill:var(--live);
border:solid var(--line);border-width:1px 0}
#Attention{margin:.75rem 0;padding:0 .75rem;background:var(--card);border:1px solid var(--line);
border-radius:.75rem}
#Attention li{display:flex;gap:.6rem;align-items:baseline;border-top:1px solid var(--line);
white-space:nowrap;font-size:.875rem}#Attention span{flex:none}
#Attention a,#Attention i{overflow:hidden;text-overflow:ellipsis;font-style:normal}
#Attention a{flex:0 1 auto;min-width:5rem;padding:.8rem 0;font-weight:600;font-size:1rem}
#Attention i{flex:1 9 0;color:var(--soft)}
#Attention summary{font-weight:600}table{border-collapse:collapse;width:100%}
.wide{overflow-x:auto}td,th{text-align:left;padding:.3rem .75rem .3rem 0;overflow-wrap:normal;
border-top:1px solid var(--line);white-space:nowrap}.more{margin-top:1.25rem}
#List>h2,#Playing h2{margin:1rem 0 .6rem}
main:has(.group[open]) #Playing,
main:has([type=search]:not(:placeholder-shown)) #Playing{display:none}
.watch{max-width:none;padding:0;display:grid;grid-template-columns:minmax(0,1fr)}
.watch>*{margin:.6rem 1rem}
.watch header{justify-content:start;flex-wrap:nowrap;gap:.75rem;min-width:0}
.watch header div{min-width:0}.watch h1{font-size:1.1rem}.watch .more{color:var(--soft)}
.screen{position:relative;margin:0!important}
.watch .button[rel]{flex:1 1 40%;display:flex;justify-content:center;gap:.4rem}
.button span{overflow:hidden;text-overflow:ellipsis}
.screen .said b{font-size:1.25rem}
video{display:block;width:100%;aspect-ratio:16/9;max-height:calc(100vh - 9rem);background:#000}
.said{padding:.5rem 1rem;max-width:60rem;margin:0}.said p{margin:.5rem 0}
.said p::first-letter,p.said::first-letter{text-transform:uppercase}
video:not([hidden])~.said{position:absolute;left:1rem;top:1rem;max-width:calc(100% - 2rem);
padding:.5rem 1rem;border-radius:.75rem;background:var(--card)}
.screen #Sound{position:absolute;right:1rem;top:1rem;background:var(--card);font-weight:600}
.screen:not(:has(video:not([hidden]))){display:grid;place-content:center;justify-items:center;
min-height:56.25vw;padding:1rem 0;background:var(--card);text-align:center;text-wrap:balance}
@media (min-width:700px){.watch{grid-template-columns:minmax(0,auto) minmax(14rem,1fr)}
.screen,.watch .more{grid-column:1/3}.watch header{order:1;justify-self:end}.watch .more{order:2}
.watch nav{align-items:center}.watch .button[rel]{flex:none;width:11rem}
video{aspect-ratio:auto;height:calc(100vh - 4.2rem);max-height:none}
.watch .button{max-width:13rem}.watch:has(header .note) video{height:calc(100vh - 5.7rem)}
.watch:not(:has(video:not([hidden]))) header{order:0;grid-column:1/3;justify-self:start}
.screen:not(:has(video:not([hidden]))){min-height:calc(100vh - 8.2rem)}}
@media (max-width:600px){.many:has([type=search]:not(:placeholder-shown)) nav{display:none}}
.vast:has([type=search]:not(:placeholder-shown)) nav{display:none}
@media (max-width:600px){#Attention i{display:none}}
.watch:has(#Trouble) header .note{display:none}
"""
# If a logo fails to load, the initials behind it show, because its image takes no space: an image
# with neither a height nor alternative text represents nothing (HTML, 15.4.2).

# Browsers run no other script, because the policy allows only the hash of this one.
PAGE_SCRIPT = r"""
"use strict"
// The pages work without it, in less comfort.
const one = (selector, inside = document) => inside.querySelector(selector)
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)]
const about = one("main").dataset, video = one("video"), search = one("[type=search]")
let state = about.state  // of the watched stream

const reveal = ({target}) => target.naturalWidth && target.classList.add("loaded")
document.addEventListener("load", reveal, true)
all("img").forEach(target => reveal({target}))

// States and figures

// Replaces only what changed: the focus and the place stay.
function show(place, html) {
  if (!place || (place.html ?? place.innerHTML) === html) return
  const {tagName, href} = document.activeElement, hadFocus = place.contains(document.activeElement)
  place.innerHTML = place.html = html
  place.hidden = !html
  if (hadFocus) all(tagName, place).find(each => each.href === href)?.focus()
}

function showNews({parts, streams}) {
  for (const id in parts) show(document.getElementById(id), parts[id])
  const known = new Map(streams.map(stream => [stream.stream, stream]))
  for (const card of all("#List li")) {
    const html = known.get(card.id)?.html ?? ""
    if (html && !one(".now", card)) card.insertAdjacentHTML("beforeend", "<div class=now></div>")
    show(one(".now", card), html)
  }
  const watched = known.get(about.stream)
  state = watched?.state ?? state
  if (watched) show(one("header .now"), watched.html)
}

async function update() {
  let pause = 5000  // ms; longer after a long answer: 1 KB/s at most
  try {
    const answer = document.hidden || await fetch(about.status)
    pause = Math.max(pause, answer.headers?.get("content-length") ?? 0)
    if (answer.ok) showNews(await answer.json())
  } catch {}  // no server
  setTimeout(update, pause)
}
if (about.status) update()

// Remote control and keyboard

const ways = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}
const zaps = {PageUp: "next", ChannelUp: "next", PageDown: "prev", ChannelDown: "prev"}
const starts = {ArrowUp: "#Sound:not([hidden])", ArrowRight: "[rel~=next]"}
const box = element => (element.closest("li, .screen") ?? element).getBoundingClientRect()

function goTo(element, block = "center") {
  element?.focus()
  element?.scrollIntoView({block})
}

// Moves the focus to the nearest element in a direction.
function move([x, y]) {
  const from = box(document.activeElement)
  let best, least = Infinity
  for (const each of all("a, button, input, summary:not([tabindex]), video")) {
    const to = box(each)
    const ahead = x * (x > 0 ? to.left - from.right : to.right - from.left)
      + y * (y > 0 ? to.top - from.bottom : to.bottom - from.top)
    const aside = x ? Math.max(0, to.top - from.bottom, from.top - to.bottom)
      : Math.max(0, to.left - from.right, from.left - to.right)
    if (!each.offsetParent || ahead < -3 || ahead + 4 * aside >= least) continue
    [best, least] = [each, ahead + 4 * aside]
  }
  goTo(best, "nearest")
}

// Channels replace each other in the history: Back leads to the list.  The focus stays.
const zap = link => {
  sessionStorage.rel = document.activeElement.rel ?? ""
  location.replace(link.href)
}
one(`a[rel="${sessionStorage.rel}"]`)?.focus()
all("a[rel]").forEach(link => link.onclick = () => zap(link) ?? false)

// Digits find a channel by its number.
let number = "", dialing

function dial(digit) {
  clearTimeout(dialing)
  dialing = setTimeout(() => { number = "" }, 2000)
  enterList(searchFor(number += digit))
}

document.onkeydown = event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return
  const {key} = event, here = document.activeElement, way = ways[key]
  const link = one(`a[rel~=${zaps[key] ?? "none"}]`)
  if (link) zap(link)
  else if (/^\d$/.test(key) && about.list && here !== search) dial(key)
  else if (!way || (here === video ? key !== "ArrowDown" : way[0] && here.value)) return
  else if (here !== document.body) move(way)
  else if (video || innerWidth >= 1600) (one(starts[key] ?? "nav a") ?? search)?.focus()
  else return
  event.preventDefault()
}

// The list

let newest, typing  // request; timer of the next

async function listAt({search}) {
  const answer = await fetch(about.list + search.replace("?", "&"))
  return new DOMParser().parseFromString(await answer.text(), "text/html")
}

const searchFor = words => new URL(about.list + encodeURIComponent(words), location)

// Shows a group or a search
async function showList(address, enter = "replaceState") {
  clearTimeout(typing)
  newest = address
  const page = await listAt(address), links = all("nav a", page)
  if (newest !== address) return
  search.value = one("[type=search]", page).value  // fails on others
  one("#List").replaceWith(one("#List", page))
  for (const link of all("nav a"))
    link.ariaCurrent = links.find(({href}) => href === link.href)?.ariaCurrent
  history[enter](null, "", address.href)
}

async function enterList(address, enter) {
  await showList(address, enter)
  goTo(one("#Found a, .group[open] a"))
}

// Focuses the last channel.
async function focusLast(name) {
  const shown = () => all(".cards a").find(each =>
    each.offsetParent && each.pathname.endsWith("/" + name))
  const group = document.getElementById(name)?.closest(".group")
  if (group && !shown()) await showList(one(`nav a[href$="#${group.id}"]`))
  goTo(shown() ?? one("#Found a"))
}

if (about.list) {
  search.oninput = () => {
    newest = ""
    clearTimeout(typing)
    typing = setTimeout(() => showList(searchFor(search.value)), 150)
  }
  search.form.onsubmit = () => {
    enterList(searchFor(search.value))
    return false
  }
  for (const link of all("nav a")) link.onclick = () => {
    enterList(link, "pushState")
    return false
  }
  onpopstate = () => showList(location)
  if (sessionStorage.last) focusLast(sessionStorage.last)
  sessionStorage.last = ""
}

// The video

const PAUSES = [1, 2, 5, 10, 20, 30, 60, 120, 300]  // seconds between two tries
let tries = about.trouble ? 3 : 0, timer, time = 0, still = 0, well = 0

function say(words) {
  one("#Said").textContent = words
  one("#Said").hidden = !words
}

function tryLater(why) {
  const pause = PAUSES[Math.min(tries++, 8)]
  clearTimeout(timer)
  timer = setTimeout(tryNow, 1000 * pause)
  say(`${why}. Trying again in ${pause} s.`)
}

// The playlist tells whether the video may play.
async function tryNow() {
  if (document.hidden) return document.addEventListener("visibilitychange", tryNow, {once: true})
  try {
    const answer = await fetch(about.source)
    if (answer.status >= 500) return tryLater((await answer.json()).error)
    answer.body.cancel()
    if (answer.ok) load()
    else location.reload()  // it says why
  } catch {
    tryLater("The server does not answer")
  }
}

function load() {
  timer = still = time = 0
  one("#Trouble")?.remove()
  video.hidden = false
  video.src = about.source
  play()
}

// With sound if the browser allows it, else with a button.
function play() {
  one("#Sound").hidden = !(video.muted = sessionStorage.sound !== "on")
  video.play().catch(error => {
    if (error.name !== "NotAllowedError") return
    video.muted = true
    video.play().catch(() => {})
  })
}

function look() {
  const hasMoved = video.currentTime !== time
  time = video.currentTime
  still = hasMoved || video.paused || document.hidden ? 0 : still + 1
  well = hasMoved ? well + 1 : 0
  if (well > 2 && !timer) say("")
  if (well > 20) tries = 0
  if (timer || video.ended || still < (time ? 8 : 30)) return
  if (state === "waiting") say("The source has stopped. The picture returns with it.")
  else tryLater("The picture has stopped")
}

if (video) {
  const sound = one("#Sound")
  sessionStorage.last = about.stream
  sound.onclick = () => { video.muted = false }
  video.onvolumechange = () => {
    sound.hidden = !video.muted
    if (navigator.userActivation.isActive) sessionStorage.sound = video.muted ? "" : "on"
  }
  video.onerror = () => tryLater("The picture broke off")
  if (about.trouble > 499) tryLater("Not playing yet")
  if (!about.trouble) play()
  setInterval(look, 1000)
}
"""
_digest = hashlib.sha256(PAGE_SCRIPT.encode()).digest()
SCRIPT_HASH = f"sha256-{base64.b64encode(_digest).decode()}"

# A proxy refuses an answer whose head exceeds the proxy's buffer, often 4 KiB.
POLICY_HOSTS = 1 * KIB  # bytes of logo hosts in a policy; if there are more, it allows any host
# The scheme and the host with its port, without a user and password.  The host must end there: one
# with other characters does not match, because it does not fit into a policy.
LOGO_HOST = re.compile(r"(https?://)(?:[^/?#@]*@)?([\w.-]+(?::\d+)?)(?![^/?#])", re.ASCII | re.I)


def policy_headers(config: Config) -> dict[str, str]:
    """Return headers that restrict our pages to our script, our media and the logos."""
    found: dict[str, None] = {}  # each host once, in the order of the file
    for stream in config.streams.values():
        if stream.logo is None:
            continue
        logo = LOGO_HOST.match(stream.logo)
        if logo:
            found[logo[1] + logo[2]] = None
    hosts = " ".join(found)
    if len(hosts) > POLICY_HOSTS:
        hosts = "http: https:"
    return {
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
        f"script-src '{SCRIPT_HASH}'; connect-src 'self'; "
        f"media-src 'self'; img-src data: {hosts}; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
    }


def _document(title: str, body: str, kind: str = "", about: Mapping[str, str] = {}) -> Page:
    """Return a page.  `kind` is the CSS class of its content; `about` is data for its script."""
    data = "".join(f' data-{key}="{html.escape(text)}"' for key, text in about.items() if text)
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<link rel="icon" href="data:,"><style>{PAGE_STYLE}</style></head><body>
<main class="{kind}"{data}>
{body}
</main><script>{PAGE_SCRIPT}</script></body></html>
"""
    return Page(text.encode(), HTML)


def _button(address: str, words: str, attributes: str = "") -> str:
    """Return a link.  Links between our pages are relative, so they work behind any proxy."""
    return f'<a class="button"{attributes} href="{html.escape(address)}">{html.escape(words)}</a>'


# The page with all streams


@dataclass(frozen=True)
class Choice:
    """A person's selection on the status page: a search, a group, or none."""

    words: Sequence[str]
    group: str

    def has(self, stream: StreamSettings) -> bool:
        """Whether a stream has all words of the search."""
        text = _search_text(stream)
        return all(word in text for word in self.words)

    def rank(self, stream: StreamSettings) -> int:
        """Return how well a found stream matches: 0 is the best, and shown first."""
        phrase = " ".join(self.words)
        title = _folded(stream.title)
        if phrase in (title, str(stream.number)):
            return 0
        if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", title):  # as whole words
            return 1
        if title.startswith(phrase):
            return 2
        if phrase in title:
            return 3
        if phrase in _folded(_group_of(stream)):
            return 4
        return 5


def _group_of(stream: StreamSettings) -> str:
    return stream.group or "Streams"


@functools.lru_cache(maxsize=20_000)  # a channel list may have that many channels
def _folded(text: str) -> str:
    """Return text for comparisons that ignore accents and case."""
    letters = ""
    for each in unicodedata.normalize("NFD", text):
        is_mark = unicodedata.category(each).startswith("M")  # an accent, for example
        if not is_mark:
            letters += each
    return letters.lower()


def _search_text(stream: StreamSettings) -> str:
    return _folded(f"{stream.number or ''} {stream.title} {stream.name} {_group_of(stream)}")


class Board:
    """The current state of a page's streams as HTML."""

    def __init__(self, site: Site, streams: Collection[StreamSettings]) -> None:
        self.site = site
        self.streams = streams
        self.query = html.escape(site.query())
        names = site.server.channels.active_names()
        # Other streams have nothing to report.
        self.active = {
            stream.name: site.status(stream) for stream in self.streams if stream.name in names
        }
        self.playing_accounts: set[str] = set()
        for name, status in self.active.items():
            if status["state"] not in PLAYING:
                continue
            account = self._account(name)
            if account is not None:
                self.playing_accounts.add(account)
        self.scale = self._scale()
        self.lists = site.server.lists.report()

    def parts(self) -> dict[str, str]:
        """Return the changing parts of the page outside the cards, by ID."""
        return {
            "Summary": self._summary(),
            "Attention": self._attention(),
            "Playing": self._playing(),
            "Viewers": self._viewers(),
        }

    def now(self, stream: StreamSettings, *, has_figures: bool = True) -> str:
        """Return a stream's state, figures and chart; empty if there is nothing to report."""
        status = self.active.get(stream.name)
        if not status:
            return ""

        facts = []
        if status["state"] != "idle":
            facts.append(self._state_html(stream))
        if status["viewers"]:
            viewers = _many(status["viewers"], "viewer")
            if status["peak"] > status["viewers"]:
                viewers += f", peak {status['peak']}"
            facts.append(_whole(viewers))
        chart = ""
        if status["channels"] and has_figures:
            if status["bitrate"]:  # zero in the first seconds
                facts.append(_whole(_rate(status["bitrate"])))
            uptime = max(channel["uptime_seconds"] for channel in status["channels"])
            chart = _chart(self.site.record(stream).bitrates(), self.scale, uptime)

        notes = "".join(f'<p class="note">{note}</p>' for note in self._notes(status))
        # The no-break space keeps a dot from beginning a line.
        shown = "\u00a0· ".join(f"<span>{fact}</span>" for fact in facts)
        return f'<p class="facts">{shown}</p>{notes}{chart}'

    def state(self, stream: StreamSettings) -> str:
        status = self.active.get(stream.name)
        if status is None:
            return "idle"
        return str(status["state"])

    def _notes(self, status: Mapping[str, Any]) -> list[str]:
        """Return notes on missing parts of the stream, and the last error."""
        notes = [channel["note"] for channel in status["channels"] if channel["note"]]
        if status["last_error"] and status["state"] in ("failed", "waiting"):
            notes.append(status["last_error"])
        elif status["last_error"] and status["channels"]:
            age = _ago(status["last_error_seconds"])
            notes.append(f"last error, {age}: {status['last_error']}")
        return [html.escape(note) for note in notes]

    def _state_html(self, stream: StreamSettings) -> str:
        """Return a state in words, with the age of a failure or the times of a wait."""
        status = self.active[stream.name]
        state = status["state"]
        color = state
        words = state
        if state == "private":
            words = "playing"
        elif state == "failed":
            words = f"failed {_ago(status['last_error_seconds'])}"
            if self._no_longer_matters(stream):
                color = "over"
                words += ", not tried since"
        elif state in ("waiting", "starting"):
            words = self._waiting_words(status)
        return f'<span class="{color}">{words}</span>'

    def _waiting_words(self, status: Mapping[str, Any]) -> str:
        """Return how long the first channel with the stream's state has waited, and will wait."""
        state = status["state"]
        channels = [each for each in status["channels"] if each["state"] == state]
        waited = _whole(_duration(channels[0]["waiting_seconds"]))
        left = _whole(_duration(channels[0]["gives_up_seconds"]))
        return f"{state} for {waited}, gives up in {left}"

    def _no_longer_matters(self, stream: StreamSettings) -> bool:
        """Whether a failure no longer matters: it is old, or its account now plays a stream."""
        is_old = self.active[stream.name]["last_error_seconds"] > ATTENTION_TIME
        return is_old or self._account(stream.name) in self.playing_accounts

    def _account(self, name: str) -> str | None:
        """Return the name of the playlist whose account a stream's first address uses, if any."""
        stream = self.site.config.streams[name]
        return account_name_of(self.site.config, stream, stream.urls[0])

    def _scale(self) -> float:
        """Return the bits per second at the top of all charts: 1, 2 or 5 times a power of ten."""
        highest = 1.0
        for name, status in self.active.items():
            if status["channels"]:
                highest = max(highest, *self.site.server.channels.known(name).bitrates())
        power = 10.0 ** max(5, math.floor(math.log10(highest)))
        for factor in (1, 2, 5):
            if factor * power >= highest:
                return factor * power
        return 10 * power

    def _summary(self) -> str:
        viewers = sum(status["viewers"] for status in self.active.values())
        uptime = _duration(self.site.uptime)
        return f"{_many(len(self.streams), 'stream')}, {_many(viewers, 'viewer')}, up {uptime}"

    def _attention(self) -> str:
        """Return a line for each list and each stream that needs attention."""
        lines: list[str] = []
        counts: Counter[str] = Counter()  # of these lines, by state
        for report in self.lists:
            trouble = report["last_error"]
            if trouble:
                counts["list failed"] += 1
                lines.append(
                    f"<li>List {report['playlist']}: "
                    f'<span class="failed">{html.escape(trouble)}</span></li>'
                )
        for stream in self.streams:
            state = self.state(stream)
            if state == "waiting" or (state == "failed" and not self._no_longer_matters(stream)):
                counts[state] += 1
                trouble = html.escape(self.active[stream.name]["last_error"] or "")
                title = html.escape(stream.title)
                lines.append(
                    f'<li><a href="{stream.name}{self.query}">{title}</a> '
                    f"{self._state_html(stream)} <i>{trouble}</i></li>"
                )
        if not lines:
            return ""

        more = len(lines) - MOST_LINES
        if more > 0:
            lines = [*lines[:MOST_LINES], f"<li>and {more} more</li>"]
        words = []
        for state, count in sorted(counts.items()):
            color = "failed" if state == "list failed" else state
            words.append(f'<span class="{color}">{count} {state}</span>')
        return f"<summary>{', '.join(words)}</summary><ul>{''.join(lines)}</ul>"

    def _playing(self) -> str:
        """Return the cards of playing streams, for a page whose groups are all closed."""
        playing = [each for each in self.streams if self.state(each) in PLAYING]
        if len(self.streams) <= ALL_OPEN or not playing:
            return ""
        cards = ""
        for stream in playing[:MOST_PLAYING]:
            now = self.now(stream, has_figures=False)
            cards += f'<li>{_link(self, stream)}<div class="now">{now}</div></li>'
        more = ""
        if len(playing) > MOST_PLAYING:
            more = f"<p>and {len(playing) - MOST_PLAYING} more</p>"
        return f'<h2>Playing now</h2><ul class="cards">{cards}</ul>{more}'

    def _viewers(self) -> str:
        """Return a table of the viewers, for the operator."""
        rows = []
        for name, status in self.active.items():
            title = self.site.config.streams[name].title
            for channel in status["channels"]:
                rows += [_viewer_row(title, viewer) for viewer in channel["viewers"]]
        if not rows:
            return ""

        words = ("Stream", "Address", "Player", "For", "Bitrate", "Skips")
        head = "".join(f'<th scope="col">{word}</th>' for word in words)
        shown = "".join(rows[:MOST_VIEWERS])
        more = ""
        if len(rows) > MOST_VIEWERS:
            more = f"<p>and {len(rows) - MOST_VIEWERS} more</p>"
        return (
            f"<summary>Who is watching: {_many(len(rows), 'viewer')}</summary>"
            f'<div class="wide" tabindex="0"><table><tr>{head}</tr>{shown}</table>{more}</div>'
        )


def _viewer_row(title: str, viewer: Mapping[str, Any]) -> str:
    seconds = viewer["since_seconds"]
    values = (
        title,
        viewer["address"],
        player_of(viewer["user_agent"]),
        _duration(seconds),
        _rate(8 * viewer["bytes"] / max(seconds, 1.0)),
        str(viewer["skips"]),
    )
    cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
    return f"<tr>{cells}</tr>"


# In units of the drawing, which the browser stretches to the width of the card.
CHART_HEIGHT = 36
TALLEST_BAR = 35
BAR_WIDTH = 3
BAR_STEP = 4  # from one bar to the next


def _chart(bitrates: Sequence[float], scale: float, uptime: float) -> str:
    """Return the last five minutes as bars; `scale` is the bits per second at the top.

    The line above the bars also shows `uptime`, in seconds, which would need another line among the
    figures of a narrow card.
    """
    bars = ""
    for n, rate in enumerate(bitrates):
        if rate:
            height = max(1, round(TALLEST_BAR * rate / scale))
            # From the bottom left corner up, to the right, down, and back.
            bars += f"M{BAR_STEP * n} {CHART_HEIGHT}v-{height}h{BAR_WIDTH}v{height}z"
    top = f"{scale / 1e3:g} kbit/s"
    if scale >= 1e6:
        top = f"{scale / 1e6:g} Mbit/s"
    minutes = f"{CHART_STEP * CHART_BARS // 60} minutes"
    return (
        f'<div class="chart" role="img" aria-label="Bitrate of the last {minutes}, on a scale to '
        f'{top}"><p>{top}<span>{_duration(uptime)} up</span></p>'
        f'<svg viewBox="0 0 {BAR_STEP * CHART_BARS} {CHART_HEIGHT}" preserveAspectRatio="none">'
        f'<path d="{bars}"/></svg><p>{minutes} ago<span>now</span></p></div>'
    )


def status_page(site: Site) -> Page:
    """Return the page with all streams, for a phone, a desktop or a television."""
    name = html.escape(site.config.server.name)
    words = site.wants("q")
    board = Board(site, site.streams)
    group = site.wants("group")
    groups = {_group_of(stream) for stream in board.streams}
    if group not in groups:  # a bookmark may have a group that no longer exists
        group = ""
    choice = Choice(_folded(words).split(), group)
    count = len(board.streams)

    about = {"status": site.local("status", active="1", html="1")}
    form = ""
    if count > 1:
        about["list"] = _search_address(site)
        form = _search_form(site, words)
    cards = _found(board, choice) if choice.words else _groups(board, choice.group)
    hint = ""
    if count == 0:
        hint = _no_streams_hint(board)

    parts = board.parts()
    attention = parts["Attention"]
    is_unfolded = attention.count("<li>") <= UNFOLDED_LINES
    attention_flags = _flag("open", is_unfolded) + _flag("hidden", not attention)
    playing = parts["Playing"]
    playing_flags = _flag("hidden", not playing)
    viewers = parts["Viewers"]
    viewers_flags = _flag("hidden", not viewers)
    playlist = html.escape(site.typed("playlist.m3u"))
    body = f"""<header><div><h1>{name}</h1>
<p class="facts" id="Summary">{parts["Summary"]}</p></div>
{form}</header>
<details id="Attention"{attention_flags}>{attention}</details>
{_group_links(site, choice)}
<div id="List">{cards}</div>
<div id="Playing"{playing_flags}>{playing}</div>
{hint}
<div class="more"><details id="Viewers"{viewers_flags}>{viewers}</details>
<p>For TVs and players, enter <code>{playlist}</code></p>
{_lists(board)}</div>"""

    kinds = []
    if count > ALL_OPEN:
        kinds.append("many")
    if len(groups) > FEW_GROUPS:
        kinds.append("vast")
    return _document(name, body, " ".join(kinds), about)


def _flag(name: str, is_set: bool) -> str:
    """Return a boolean HTML attribute with a leading blank; empty if it is not set."""
    return f" {name}" if is_set else ""


def _search_address(site: Site) -> str:
    """Return the address of a search, to which the page's script appends the words."""
    query = site.query()
    if not query:
        return "./?q="
    return f"./{query}&q="


def _search_form(site: Site, words: str = "", home: str = "./") -> str:
    field = ""
    token = site.config.server.token
    if token and site.is_trusted:
        field = f'<input type="hidden" name="token" value="{html.escape(token)}">'
    return (
        f'<form role="search" action="{home}"><input type="search" name="q" autocomplete="off" '
        f'aria-label="Channel" placeholder="Title, group or number" value="{html.escape(words)}">'
        f"{field}<button>Search</button></form>"
    )


def _anchor(group: str) -> str:
    """Return the ID of a group's cards.  It begins with a colon, which no stream's name has."""
    return f":{quote(group, safe='')}" if group else ""


def _group_links(site: Site, choice: Choice) -> str:
    counts = Counter(_group_of(stream) for stream in site.streams)
    if len(counts) < 2:
        return ""
    links = ""
    if counts.total() <= ALL_OPEN:
        links += _group_link(site, choice, "", "All", counts.total())
    for group, count in counts.items():
        links += _group_link(site, choice, group, group, count)
    return f'<nav aria-label="Groups">{links}</nav>'


def _group_link(site: Site, choice: Choice, group: str, title: str, count: int) -> str:
    """Return the link to a group's cards; an empty `group` stands for all groups."""
    address = html.escape(f"./{site.query(group=group)}#{_anchor(group)}")
    current = ""
    if group == choice.group and not choice.words:
        current = ' aria-current="true"'
    words = f"{html.escape(title)} <b>{count}</b>"
    return f'<a class="button"{current} href="{address}">{words}</a>'


def _found(board: Board, choice: Choice) -> str:
    """Return the cards of the streams that a search finds, the best matches first."""
    found = [stream for stream in board.streams if choice.has(stream)]
    if not found:
        return '<p id="Nothing">No channel matches. Try fewer or shorter words.</p>'

    found.sort(key=choice.rank)
    cards = "".join(_card(board, stream, has_group=True) for stream in found[:MOST_CARDS])
    more = ""
    if len(found) > MOST_CARDS:
        more = f"<p>{len(found) - MOST_CARDS} more are not shown: use the search.</p>"
    heading = f"<h2>{_many(len(found), 'channel')} found</h2>"
    return f'{heading}<ul class="cards" id="Found">{cards}</ul>{more}'


def _groups(board: Board, chosen: str) -> str:
    """Return the cards by group; groups and cards keep the order of the file."""
    groups: dict[str, list[StreamSettings]] = {}
    for stream in board.streams:
        groups.setdefault(_group_of(stream), []).append(stream)

    is_many = len(board.streams) > ALL_OPEN
    has_all = len(board.streams) <= ALL_SENT
    if is_many and len(groups) == 1:  # there are no links to groups, so open this one
        (chosen,) = groups

    text = ""
    for group, streams in groups.items():
        is_chosen = group == chosen
        if not (is_chosen or has_all):
            continue
        shown = streams
        if not has_all:
            shown = streams[:MOST_CARDS]
        cards = "".join(_card(board, stream) for stream in shown)

        is_open = is_chosen or not (chosen or is_many)
        is_hidden = bool(chosen) and not is_chosen
        # If there are many streams, closed groups are hidden.  So headings must not take the focus:
        # a person who closed a group with its heading could not open it again.
        fixed = ""
        if is_many:
            fixed = ' tabindex="-1"'
        flags = _flag("open", is_open) + _flag("hidden", is_hidden)
        text += (
            f'<details class="group" id="{_anchor(group)}"{flags}>'
            f"<summary{fixed}><h2>{html.escape(group)}</h2></summary>"
            f'<ul class="cards">{cards}</ul></details>\n'
        )
        if len(streams) > len(shown):
            text += f"<p>{len(streams) - len(shown)} more are not shown: use the search.</p>"

    if is_many and chosen not in groups:
        text += '<p id="Hint">Choose a group, or search.</p>'
    return text


def _card(board: Board, stream: StreamSettings, *, has_group: bool = False) -> str:
    """Return a stream's card.  Its whole area is a link to the watch page."""
    link = _link(board, stream, has_group=has_group)
    now = board.now(stream)
    if now:
        now = f'<div class="now">{now}</div>'
    return f'<li id="{stream.name}">{link}{now}</li>'


def _link(board: Board, stream: StreamSettings, *, has_group: bool = False) -> str:
    """Return the logo, number and title of a stream as a link to its watch page."""
    words = ""
    if has_group:
        words += f"<small>{html.escape(_group_of(stream))}</small>"
    if stream.number:
        words += f"<b>{stream.number}</b> "
    words += html.escape(stream.title)
    address = stream.name + board.query
    return f'<a href="{address}">{_logo(stream)}<span class="name">{words}</span></a>'


def _logo(stream: StreamSettings) -> str:
    """Return the logo, with the stream's initials and color behind it until it has loaded."""
    hue = zlib.crc32(stream.name.encode()) % HUES * 360 // HUES
    image = ""
    if stream.logo:
        address = html.escape(stream.logo)
        image = f'<img src="{address}" alt="" loading="lazy" referrerpolicy="no-referrer">'
    initials = f"<b>{html.escape(_initials(stream.title))}</b>"
    return f'<span class="logo" style="--hue:{hue}" aria-hidden="true">{initials}{image}</span>'


def _initials(title: str) -> str:
    """Return up to six letters and digits for a title: "ZDF", or "C12" for "Channel 12"."""
    words = re.findall(r"\w+", title)
    if len(words) == 1 and len(title) <= 4:
        return title.upper()
    letters = [word[0] for word in words if not word[0].isdigit()]
    initials = "".join(letters[:2]).upper()
    number = re.search("[0-9]{1,4}", title)
    if number:
        initials += number[0]
    return initials


def status_answer(site: Site) -> Page:
    """Return the status for programs or, if the query has `html=1`, for the pages' script."""
    if site.wants("html"):
        return update_page(site)
    return status_json(site)


def update_page(site: Site) -> Page:
    """Return the parts that the script of an open page replaces, as JSON."""
    name = site.wants("stream")
    parts: dict[str, str] = {}
    if name:  # a watch page
        shown = []
        if name in site.config.streams:
            shown.append(site.config.streams[name])
        board = Board(site, shown)
    else:
        board = Board(site, site.streams)
        shown = [stream for stream in board.streams if stream.name in board.active]
        parts = board.parts()

    streams = []
    for stream in shown:
        streams.append({
            "stream": stream.name,
            "state": board.state(stream),
            "html": board.now(stream, has_figures=not name),
        })  # fmt: skip
    return json_page({"parts": parts, "streams": streams}, indent=None)


# Names by a word in the User-Agent.  The order matters: Edge and Opera also call themselves Chrome.
BROWSERS: Mapping[str, str] = {
    "Edg": "Edge",
    "OPR": "Opera",
    "Firefox": "Firefox",
    "CriOS": "Chrome",
    "FxiOS": "Firefox",
    "Chrome": "Chrome",
}


def player_of(agent: str) -> str:
    """Return a player's or browser's name and version, taken from its User-Agent."""
    for word, name in BROWSERS.items():
        version = re.search(rf"\b{word}/(\d+)", agent)
        if version:
            return f"{name} {version[1]}"
    if agent.startswith("Mozilla/") and "Safari/" in agent:
        return "Safari"
    player = agent.partition(" ")[0][:40]
    if not player:
        return "unknown"
    return player


def _no_streams_hint(board: Board) -> str:
    """Return the reasons why the page has no streams.

    Lists are not loaded yet, or all streams are hidden, or none are configured.
    """
    reasons = []
    for report in board.lists:
        if report["loaded_seconds"] is not None:
            continue
        name = report["playlist"]
        trouble = report["last_error"]
        if trouble is None:
            reason = f"The list {name} is being loaded: reload this page in a moment"
        else:
            reason = f"The list {name} could not be loaded: {trouble}"
        reasons.append(f"<p>{html.escape(reason)}.</p>")
    if not reasons and board.site.config.streams:
        reasons.append("<p>All streams are hidden: change hide: in the file to show some.</p>")
    if not reasons:
        reasons.append(f"<p>{NO_STREAMS.capitalize()}.</p>")
    return "\n".join(reasons)


def _lists(board: Board) -> str:
    """Return a line for each channel list: its number of channels, and when it was loaded."""
    lines = []
    for report in board.lists:
        words = "not loaded yet"
        if report["loaded_seconds"] is not None:
            age = _ago(report["loaded_seconds"])
            words = f"{_many(report['channels'], 'channel')}, loaded {age}"
        if report["omitted"]:
            words += f"; left out: {_counts(report['omitted'])}"
        line = f"List {report['playlist']}: {words}"
        lines.append(f'<p class="facts">{html.escape(line)}</p>')
    return "\n".join(lines)


# The page that plays a stream


@dataclass(frozen=True)
class Watched:
    """The contents of a watch page: a stream in a quality, or the reason why it does not play."""

    quality: str | None  # the requested one
    variant: str = ""  # the playing one
    path: str = ""  # of the media; empty if no browser plays it
    has_hls: bool = True  # if not, browsers can play only the plain stream
    trouble: StreamError | None = None


def watch_page(site: Site, stream: StreamSettings, watched: Watched, agent: str) -> Page:
    """Return the page that plays a stream or explains why it does not play.

    `agent` is the browser's User-Agent.

    Raises StreamError if a reload has just removed the stream.
    """
    if stream.name not in site.config.streams:
        raise StreamError(HTTPStatus.NOT_FOUND, "there is no such stream")
    stream = site.config.streams[stream.name]
    board = Board(site, [stream])
    title = html.escape(stream.title)
    address = html.escape(site.typed(stream.name, quality=watched.quality))
    source = ""
    if watched.path:
        source = watched.path + site.query(quality=watched.quality)
    about = {
        "status": site.local("status", active="1", html="1", stream=stream.name),
        "stream": stream.name,
        "state": board.state(stream),
        "source": source,
    }
    if watched.trouble:
        about["trouble"] = str(int(watched.trouble.status))

    screen = _screen(site, stream, watched, source, agent)
    player = _player_link(site, stream)
    if player in screen:
        player = ""
    advice = ""
    if "<video" in screen and not watched.trouble:
        advice = HELP
    body = f"""<header>{_logo(stream)}<div><h1>{title}</h1>
<div class="now">{board.now(stream, has_figures=False)}</div></div></header>
<div class="screen">{screen}</div>
<nav aria-label="Streams">{_zap_links(site, stream)}
{_qualities(site, stream, watched.variant)}
{player}</nav>
<div class="more">{_unplayed(site, stream)}
<p>For TVs and players, enter <code>{address}</code></p>
{advice}</div>"""
    return _document(f"{title} - {html.escape(site.config.server.name)}", body, "watch", about)


def _screen(site: Site, stream: StreamSettings, watched: Watched, source: str, agent: str) -> str:
    """Return the video, or the reason why there is none and what to do about it."""
    has_hls = plays_hls(agent) or not watched.has_hls
    trouble = ""
    loads = f'src="{html.escape(source)}"'
    if watched.trouble:
        trouble = _trouble(site, stream, watched)
        loads = "hidden"
        may_pass = watched.trouble.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        if not (may_pass and has_hls):
            return trouble
    if not source:
        words = "Browsers cannot play this recording: open it in a player."
        return f'<div class="said"><p>{words}</p>{_player_link(site, stream)}</div>'
    if not has_hls:
        return f'<div class="said"><p>{NO_HLS}</p>{_player_link(site, stream)}</div>'
    poster = ""
    if stream.logo:  # radio's only picture
        poster = f' poster="{html.escape(stream.logo)}"'
    return (
        '<button id="Sound" hidden>Switch the sound on</button>'
        f"<video controls autoplay muted playsinline{poster} {loads}></video>"
        f"{trouble}"
        '<p class="said" id="Said" role="status" hidden></p>'
    )


def _trouble(site: Site, stream: StreamSettings, watched: Watched) -> str:
    """Return the reason why a stream does not play, and what to do about it."""
    assert watched.trouble
    reason = watched.trouble.reason
    advice = advice_for(reason, watched.trouble.status)
    if advice:
        advice = f"<p>{_marked(advice)}.</p>"
    again = stream.name + site.query(quality=watched.quality)
    return (
        f'<div class="said" id="Trouble"><p class="failed"><b>{html.escape(reason)}</b></p>'
        f"{advice}{_button(again, 'Try now')}</div>"
    )


def _marked(advice: str) -> str:
    """Return HTML for a text with addresses and settings in backquotes."""
    return re.sub("`(.+?)`", r"<code>\1</code>", html.escape(advice, quote=False))


def plays_hls(agent: str) -> bool:
    """Whether a browser with this User-Agent plays HLS: all but Firefox on a desktop do."""
    return "Firefox/" not in agent or "Android" in agent


def _unplayed(site: Site, stream: StreamSettings) -> str:
    """Return a note about the codecs of a stream that browsers do not play."""
    codecs = " and ".join(site.record(stream).unplayed)
    if not codecs:
        return ""
    words = f"It has {codecs}, which browsers cannot play: open it in a player."
    return f'<p class="note">{words}</p>'


def _zap_links(site: Site, stream: StreamSettings) -> str:
    """Return links to the previous and next streams in the file, and to all streams."""
    query = html.escape(site.query())
    streams = [each for each in site.config.streams.values() if each == stream or not each.hide]
    at = streams.index(stream)
    before = streams[at - 1]  # before the first one, the last
    after = streams[(at + 1) % len(streams)]
    links = ""
    if before != after:
        title = html.escape(before.title)
        links += (
            f'<a class="button" rel="prev" href="{before.name}{query}">'
            f"\u2039 <span>{title}</span></a>"
        )
    if after != stream:
        roles = "next"
        if before == after:
            roles = "prev next"
        title = html.escape(after.title)
        links += (
            f'<a class="button" rel="{roles}" href="{after.name}{query}">'
            f"<span>{title}</span> \u203a</a>"
        )

    group = None  # the one that the status page must open to show this stream's card
    if len(site.streams) > ALL_OPEN:
        group = _group_of(stream)
    links += _button(f"./{site.query(group=group)}#{stream.name}", "All streams")
    return links


def _qualities(site: Site, stream: StreamSettings, variant: str) -> str:
    """Return links to all qualities of a stream; empty if it has only one."""
    qualities = site.record(stream).qualities()
    if len(qualities) < 2:
        return ""
    links = ""
    for quality in qualities:
        current = ""
        if quality == variant:
            current = ' aria-current="true"'
        links += _button(stream.name + site.query(quality=quality), quality, current)
    return links


def _player_link(site: Site, stream: StreamSettings) -> str:
    playlist = f"{stream.name}.m3u"
    address = html.escape(playlist + site.query())
    return f'<a class="button player" download="{playlist}" href="{address}">Open in a player</a>'


def folder_above(count: int) -> str:
    """Return the relative address of the folder `count` levels up; `./` is the same folder."""
    if count == 0:
        return "./"
    return "../" * count


def error_page(site: Site, status: HTTPStatus, reason: str, name: str, agent: str) -> Page:
    """Return the page that replaces a stream's page, or any other, if a request fails."""
    stream = site.config.streams.get(name)
    if stream and site.is_trusted and status != HTTPStatus.METHOD_NOT_ALLOWED:
        trouble = StreamError(status, reason)
        quality: str | None = site.wants("quality")
        if not quality:
            quality = None  # an empty one means the configured
        watched = Watched(quality, path=f"{name}.m3u8", trouble=trouble)
        return watch_page(site, stream, watched, agent)

    title = status.phrase.capitalize()
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:  # it may pass
        title = "Not playing now"
    head = ""
    links = ""
    if site.is_trusted:  # the links would lead a stranger to the same page
        home = folder_above(name.count("/"))
        search = ""
        if len(site.streams) > 1:
            search = _search_form(site, home=home)
        shown = html.escape(site.config.server.name)
        head = f'<header><p class="home">{shown}</p>{search}</header>'
        links = f"<nav>{_button(home + site.query(), 'All streams')}</nav>"
    body = f"""{head}<div class="sorry"><h1>{title}</h1><p class="note">{html.escape(reason)}</p>
{links}</div>"""
    return _document(title, body)


# Advice for people about failures, as in README: the reasons, or parts of them, and the advice.
ADVICE: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        tuple(sorted(EXPIRED)),
        "the address has expired or is wrong: get a new one. Some sites require `headers: "
        '{Referer: "https://..."}`, a browser\'s `user_agent`, or a `proxy` in their '
        "country",
    ),
    (
        tuple(sorted(BUSY - EXPIRED)),
        "your account allows no more connections: close other players, or lower "
        "`max_upstreams` to what the account allows",
    ),
    (
        (WEB_PAGE, SHORT_TEXT),
        "this is often a login page, an error message or a list of links: open the address in a "
        "browser to see it",
    ),
    (
        (CHANNEL_LIST,),
        "move the address to `playlists:`",
    ),
    (
        (UNKNOWN_HOST,),
        "check the address for typos, and the server's network connection",
    ),
    (
        (TIMED_OUT, CONNECTION_REFUSED, CONNECTION_CLOSED),
        "the origin is down, or it blocks you: try the address on another device or network",
    ),
    (
        (DRM_PROTECTED,),
        "only the provider's own players can decrypt it",
    ),
    (
        (NO_SUCH_QUALITY,),
        "set `quality` to one that is available",
    ),
    (
        (UNSUPPORTED_SCHEME,),
        "check the address for typos; StreamPipe cannot open other protocols, such as `rtsp` and "
        "`udp`",
    ),
    (
        (FROM_HTTPS_TO_HTTP, NO_TLS),
        "begin the address with `http://`",
    ),
    (
        (NOT_HLS, NOT_HTTP, TOO_LARGE_PLAYLIST),
        "the address does not lead to a stream: check it for typos, including the port",
    ),
    (
        (UNSUPPORTED_ADDRESS, INVALID_TAG),
        "the playlist is broken: try another address of the stream",
    ),
    (
        (BAD_COMPRESSION,),
        "the web server declares a compression that it does not use: try another address of the "
        "stream",
    ),
    (
        (EMPTY_PLAYLIST, NO_VARIANT, NO_STREAM),
        "nothing is broadcast there at the moment: try again later, or use another address",
    ),
    (
        (
            EMPTY_ANSWER,
            BROKEN_ANSWER,
            NO_MEDIA,
            NO_DATA,
            NO_MORE_SEGMENTS,
            ENDED_BEFORE,
            OTHER_FILE,
            NOT_RESUMABLE,
            NOT_BACK,
        ),
        "the origin has a problem: try again later, or configure a second address as a backup",
    ),
    (
        (REDIRECT_LOOP,),
        "this often means that a login is required: open the address in a browser to see it",
    ),
    (
        (NO_ROUTE,),
        "check the server's network connection, including IPv6 if the address requires it",
    ),
    (
        (PROXY_FAILED,),
        "check the `proxy` of the stream",
    ),
    (
        (NOT_A_KEY, WRONG_KEY, CUT_SEGMENT),
        "the origin may require `headers` for its key, or the address may have expired",
    ),
    (
        (BAD_CERTIFICATE,),
        "check the server's clock; if you trust the origin, set "
        "`streamlink: {http-ssl-verify: false}`",
    ),
    (
        (LOCAL_FILE,),
        "the origin tries to read a file of your server: do not use this address",
    ),
    (
        (NO_FFMPEG, FFMPEG_NOT_STARTED, FFMPEG_FAILED),
        "install ffmpeg, and restart StreamPipe; if ffmpeg is installed, see the log",
    ),
    (
        (UNREADABLE_COOKIES,),
        "check that StreamPipe may read the file, and that it is in Netscape format "
        "(cookies.txt); a program that updates it should write a new file and rename it",
    ),
    (
        (TOO_MANY_FILES, TOO_MANY_THREADS),
        "raise the limits of the service (`LimitNOFILE`, `TasksMax`)",
    ),
)


# The advice for any other reason with the status 503 or 504.
PATIENCE_ADVICE = (
    "raise the limit: `max_viewers`, `max_upstreams` or, if your account allows more, "
    "`playlists.NAME.max_upstreams`; wait a minute for the list; set a longer `timeout`"
)


def advice_for(reason: str, status: HTTPStatus) -> str:
    """Return advice for a person about a failure; empty if there is none."""
    for parts, advice in ADVICE:
        if any(part in reason for part in parts):
            return advice
    if status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT):
        return PATIENCE_ADVICE
    return ""


def _rate(bitrate: float) -> str:
    """Return a bitrate in Mbit/s, or in kbit/s if it is low (radio)."""
    if bitrate >= 1e6:
        return f"{bitrate / 1e6:.1f} Mbit/s"
    return f"{bitrate / 1e3:.0f} kbit/s"


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    hours = int(seconds // 3600)
    days = int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    if minutes:
        return f"{minutes} min"
    return f"{int(seconds)} s"


def _ago(seconds: float) -> str:
    """Return how long ago something happened, in words that stay on one line."""
    words = "just now"
    if seconds >= 1:
        words = f"{_duration(seconds)} ago"
    return _whole(words)


def _whole(words: str) -> str:
    """Return words with no-break spaces, so that a browser keeps them on one line."""
    return words.replace(" ", "\u00a0")


# Some players accept only .m3u8.  HDHomeRun tuners have a lineup.m3u.
M3U_LISTS = ("/playlist.m3u", "/playlist.m3u8", "/lineup.m3u")
# By path.  All of these need the token; paths that need none are in Handler._route.  The playlist
# of a single stream is at /NAME.m3u.
PAGES: Mapping[str, Callable[[Site], Page]] = {
    "/": status_page,
    "/status": status_answer,
    "/metrics": metrics_page,
    **dict.fromkeys(M3U_LISTS, all_streams_page),
    "/discover.json": discover_page,
    "/lineup.json": lineup_page,
    "/lineup_status.json": scan_status_page,
    "/lineup.post": scan_page,
    "/device.xml": device_page,
}


# --------------------------------------------------------------------------------------------------
# HTTP: requests and answers (RFC 9110, RFC 9112)
#
# Every answer closes its connection.  A media body is chunked for HTTP/1.1 and bare for HTTP/1.0.
# Its final chunk is sent only if the source truly ended: without it, clients that can reconnect do
# so.
# --------------------------------------------------------------------------------------------------

# Requests.  The groups of STREAM_PATH are the stream's name, the rest of the path, and within that
# a segment's number and extension.
STREAM_PATH = re.compile(r"/([a-z0-9-]+)(\.m3u8?|\.ts|/([0-9]{1,18})\.([a-z0-9]+))?")
TUNER_PATH = re.compile(r"/auto/v([0-9]{1,9})")  # Channels DVR makes these from guide numbers
EMPTY_LINE = re.compile(rb"\r?\n\r?\n")  # ends a head
HTTP_VERSION = re.compile(r"HTTP/[0-9]\.[0-9]")  # RFC 9112, 2.3
HEAD_TIMEOUT = 10.0  # seconds for a whole request head: slow clients occupy threads
HEAD_LIMIT = 64 * KIB  # bytes of a request head, which is kept in memory
RAW_BYTES = re.compile(rb"[\x80-\xff]+")
# A name, IPv4, or IPv6 in brackets, perhaps with a port.
HOST = re.compile(r"[\w.-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?", re.ASCII)
EVERYWHERE = "0.0.0.0", "::"  # hosts that listen on every address of the machine
# A host that stands for the machine itself, before a port or the end.
THIS_MACHINE = re.compile(r"(localhost|127[\d.]*|\[::1\])(?=$|:)", re.IGNORECASE)

# Headers that a proxy adds.  A prefix has no "." or ".." among its parts.
PREFIX = re.compile(r"(?:/(?!\.\.?(?:/|$))(?:[\w.~-]|%[0-9A-Fa-f]{2})+)+", re.ASCII)
FORWARDED_ADDRESS = re.compile(  # IPv4 or IPv6 in brackets, perhaps with a port; bare IPv6
    r"([\d.]+)(?::\d+)?|\[([0-9A-Fa-f:.]+)\](?::\d+)?|([0-9A-Fa-f:.]+)", re.ASCII
)

# Answers.
SILENCE = 5.0  # seconds without media until null packets are sent: ExoPlayer times out after 8
SEND_TICK = 1.0  # seconds that a send waits for room at most; then its progress is checked
UNSENT_LIMIT = 128 * KIB  # unsent bytes that the kernel holds for a viewer
HLS_HEADERS = {"Accept-Ranges": "none"}
MEDIA_HEADERS = {
    "X-Accel-Buffering": "no",  # nginx would spool a slow viewer's stream to its disk
    "Accept-Ranges": "none",
}
GUIDE_HEADERS = {"Content-Type": "application/xml", "Cache-Control": "no-cache"}
GUIDE_TIME = 3600.0  # seconds that relaying a guide may take in all; some guides have 500 MB
GUIDE_SEND_TIME = 60.0  # seconds without progress after which a guide's client is disconnected
RELOAD_WAIT = 5.0  # seconds that a playlist request may wait for a new segment
ANSWER_PART = 64 * KIB  # bytes of a short answer that have HEAD_TIMEOUT seconds to be sent
COMPRESSED_SIZE = 1 * KIB  # bytes of the smallest page worth compressing
NO_TOKEN = (
    "a token is required: add ?token=... to the address, or enter it as the password, leaving the "
    "user name empty"
)
WRONG_TOKEN = (
    "the token is wrong: add the right one to the address as ?token=..., or enter it as the "
    "password, leaving the user name empty"
)
TOO_LARGE = "its segments are larger than the window: set a larger ringbuffer_size"


def _credentials_text(pair: bytes) -> str:
    """Decode the user and password of Basic authentication.

    The challenge requests UTF-8, but clients that send credentials before they receive a challenge
    use Latin-1 (OkHttp, requests, aiohttp).
    """
    try:
        return pair.decode()
    except UnicodeDecodeError:
        return pair.decode("latin-1")


def client_label(address: str) -> str:
    """Return the name that the log uses for any client at this address, viewer or not."""
    return f"client {address}"


class Handler(BaseHTTPRequestHandler):
    """Handles one connection: reads a request head, answers, closes."""

    server: Server
    protocol_version = "HTTP/1.1"
    address = ""  # the client's, even behind a listed proxy
    path = ""  # empty until a request line is read
    headers = http.client.HTTPMessage()  # empty until they are read
    is_for_players = False  # whether the path is that of media, HLS or an M3U list
    has_token = False  # whether the request carries the token, or no token is configured
    is_trusted = False  # whether the client has the token, or needs none
    query: Mapping[str, list[str]] = {}  # empty until it is read
    target_host = ""  # of an absolute request target; empty if the target is a path

    def handle(self) -> None:
        self.address = self.client_address[0]
        try:
            head = self._receive_head()
            self.rfile = io.BytesIO(head)  # parse_request() must not wait for the socket
            # Kodi does not encode addresses.  The library would read bytes 85 and A0 as spaces.
            line = self.rfile.readline()
            self.raw_requestline = RAW_BYTES.sub(lambda found: quote(found[0]).encode(), line)
            if self.parse_request():
                self.address = self._viewers_address()
                self._answer_request()
        except (ViewerGone, OSError):
            log.debug("%s left", client_label(self.address))

    def _receive_head(self) -> bytes:
        """Return the bytes up to the empty line.

        Raises ViewerGone or OSError if the client leaves first, or exceeds HEAD_TIMEOUT or
        HEAD_LIMIT.
        """
        head = bytearray()
        start = 0  # where the next search begins
        deadline = time.monotonic() + HEAD_TIMEOUT
        while not EMPTY_LINE.search(head, start):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or len(head) >= HEAD_LIMIT:
                raise ViewerGone("no request")
            self.connection.settimeout(remaining)
            data = self.connection.recv(HEAD_LIMIT - len(head))
            if not data:
                raise ViewerGone("no request")
            if not head:
                data = data.lstrip(b"\r\n")  # empty lines may precede the request: RFC 9112, 2.2
            start = max(0, len(head) - 3)  # the empty line may span two reads
            head += data
        self.connection.settimeout(HEAD_TIMEOUT)  # for the answer, which gets the full time again
        return bytes(head)

    def _viewers_address(self) -> str:
        """Return the client's address; behind listed proxies, the last address before theirs.

        A proxy appends to X-Forwarded-For the address that connected to it.  The entries before
        that one are believed only if that address is a listed proxy, too.
        """
        address = str(self.client_address[0])
        proxies = self.server.config.server.proxies
        entries = ",".join(self.headers.get_all("X-Forwarded-For", [])).split(",")
        for entry in reversed(entries):
            if not entry.strip():
                continue
            if not is_in(address, proxies):
                break
            forwarded = forwarded_address(entry.strip())
            if forwarded is None:  # for example "unknown": then only the proxy is known
                break
            address = forwarded
        return address

    def _answer_request(self) -> None:
        try:
            target = urlsplit(self.path)
            path = unquote(target.path, errors="strict")
            self.query = parse_qs(target.query, keep_blank_values=True)
            self.target_host = target.netloc
        except ValueError:
            path = ""  # matches no stream and no page
        self.is_for_players = is_for_players(path)

        allowed = ["GET", "HEAD", "OPTIONS"]
        if path == "/lineup.post":
            allowed.append("POST")
        allow = {"Allow": ", ".join(allowed)}

        if self.request_version == "HTTP/0.9":
            self.send_error(HTTPStatus.BAD_REQUEST, "HTTP/0.9 is not supported")
        elif not HTTP_VERSION.fullmatch(self.request_version):
            self.send_error(HTTPStatus.BAD_REQUEST, "the HTTP version is not valid")
        elif self.command not in allowed:
            self.answer_error(HTTPStatus.METHOD_NOT_ALLOWED, "use GET", allow)
        elif self.command == "OPTIONS":  # RFC 9110, 8.6: no length without content
            self._send_head(HTTPStatus.NO_CONTENT, allow)
        else:
            try:
                self._route(path)
            except StreamError as error:
                headers = {}
                if error.retry_after is not None:
                    headers["Retry-After"] = str(error.retry_after)
                self.answer_error(error.status, error.reason, headers)

    def _route(self, path: str) -> None:
        """Answer a request, after checking its token unless the path is open to everyone.

        Raises StreamError.
        """
        offered = self._offered_tokens()
        self.has_token = self._is_token_among(offered)
        trusted = self.server.config.server.trusted
        self.is_trusted = self.has_token or is_in(self.address, trusted)
        is_wrong = any(offered) and not self.is_trusted
        if is_wrong:  # even on open paths, where no guess is refused
            self.server.note_wrong_token(self.address)
        # A page's script requests searches, too, but without a browser's headers for a page.
        is_page = self.is_person or "q" in self.query
        if path == "/health" or (path == "/" and not is_page):
            self.answer_health()
        elif not self.is_trusted:
            headers = {"WWW-Authenticate": 'Basic realm="StreamPipe", charset="UTF-8"'}
            reason = WRONG_TOKEN if is_wrong else NO_TOKEN
            self.answer_error(HTTPStatus.UNAUTHORIZED, reason, headers)
        else:
            self._answer_path(path)

    def _answer_path(self, path: str) -> None:
        """Answer a client that may request any path.  Raises StreamError."""
        tuned = TUNER_PATH.fullmatch(path)
        if tuned:
            path = self._tuned_path(int(tuned[1]))
        found = STREAM_PATH.fullmatch(path)
        wait = self.server.lists.wait_time()  # read before the streams: loading may end in between
        streams = self.server.config.streams
        if found and found[1] in streams:  # a stream called `lineup` has its own /lineup.m3u
            self._answer_stream(streams[found[1]], found)
        elif wait and (path in M3U_LISTS or path == "/lineup.json"):
            raise StreamError(HTTPStatus.SERVICE_UNAVAILABLE, LISTS_LOAD, wait)
        elif path in PAGES:
            self.answer(PAGES[path](self.site()))
        elif guide := guide_at(self.server.config, path):
            self.answer_guide(*guide)
        elif wait and (tuned or self._may_be_loaded(path)):
            raise StreamError(HTTPStatus.SERVICE_UNAVAILABLE, LISTS_LOAD, wait)
        else:
            self._redirect(path)

    def _may_be_loaded(self, path: str) -> bool:
        """Whether this path may exist once the channel lists are loaded, but does not exist now."""
        typed = STREAM_PATH.fullmatch(_plain(path))
        if typed:
            return typed[1] not in self.server.config.streams and typed[1] not in RESERVED_NAMES
        return path == "/epg.xml" or GUIDE_PATH.fullmatch(path) is not None

    def _tuned_path(self, number: int) -> str:
        """Return the path of the stream with this guide number; empty if there is none."""
        for name, each in guide_numbers(self.site().streams).items():
            if each == number:
                return f"/{name}.ts"
        return ""

    def _redirect(self, path: str) -> None:
        """Redirect an address as people type it, such as /News or /news/, to the stream.

        The new address is relative, so it works behind any proxy.  Raises StreamError if there is
        no such stream.
        """
        as_sent, mark, query = self.path.partition("?")
        found = STREAM_PATH.fullmatch(_plain(path))
        not_found = StreamError(HTTPStatus.NOT_FOUND, "there is no such stream")
        if found is None or found[1] not in self.server.config.streams:
            raise not_found
        is_segment = found[3] is not None
        if is_segment or "%2f" in as_sent.lower():
            raise not_found
        depth = path.count("/") - 1  # folders between the server's root and the typed name
        location = folder_above(depth) + found[0].removeprefix("/") + mark + query
        self._send_head(HTTPStatus.FOUND, {"Location": location, "Content-Length": "0"})

    def _answer_stream(self, stream: StreamSettings, path: re.Match[str]) -> None:
        """Answer a request for one of a stream's paths; `path` is the match of STREAM_PATH.

        Raises StreamError.
        """
        _, kind, number, extension = path.groups()
        quality: str | None = self.query.get("quality", [""])[-1]
        if not quality:
            quality = None  # an empty one means the configured
        try:
            if kind == ".m3u":
                self.answer(playlist_page(self.site(), [stream]))
            elif number:
                self.answer_segment(stream, quality, int(number), extension)
            elif self.command == "HEAD":
                self.answer_head(stream, kind)
            elif kind == ".m3u8":
                self.answer_playlist(stream, quality)
            elif self.is_person and kind != ".ts":
                self.answer_watch_page(stream, quality)
            else:
                self.stream_channel(stream, quality)
        except LimitReached as refusal:
            self.server.note_refusal(refusal.limit)
            level = self.server.channels.record(stream.name).choose_level()
            viewer = viewer_label(self.address)
            log.log(level, "%s: %s refused: %s", stream.name, viewer, refusal.reason)
            raise
        except WindowEnded:  # before the answer began
            if self.server.stopping.is_set():
                raise stopping_error() from None
            raise UpstreamError(JUST_ENDED) from None

    @property
    def is_person(self) -> bool:
        """Whether a browser requests a page for a person to see.

        Browsers say so in Sec-Fetch-Dest, but over plain HTTP only to localhost.  Without such a
        header, XHTML in Accept identifies a browser.  HTML does not, because some programs accept
        it, too (Java's and Delphi's clients).
        """
        if any(name.lower().startswith("sec-fetch-") for name in self.headers):
            return self.headers.get("Sec-Fetch-Dest", "").lower() in ("document", "iframe")
        return "application/xhtml+xml" in self.headers.get("Accept", "").lower()

    @property
    def agent(self) -> str:
        """The client's User-Agent; empty if it sends none."""
        return self.headers.get("User-Agent", "")

    def site(self) -> Site:
        """Return this server as the client reaches it, through any proxies."""
        config = self.server.config
        if config.server.public_url:
            url = config.server.public_url.rstrip("/")
            return Site(self.server, config, url, url, self.is_trusted, self.query)

        scheme = "http"
        if self._first_of("X-Forwarded-Proto").lower() == "https":  # in any case: RFC 3986, 3.1
            scheme = "https"
        host = self._host()
        others_host = host
        listening = self.server.configured[0]
        if listening in EVERYWHERE:  # other machines cannot use `localhost`
            found = THIS_MACHINE.match(host)
            if found:
                others_host = lan_host(listening) + host[found.end() :]
        url = f"{scheme}://{host}{self._prefix()}"
        lan_url = f"{scheme}://{others_host}{self._prefix()}"
        return Site(self.server, config, url, lan_url, self.is_trusted, self.query)

    def _first_of(self, name: str) -> str:
        """Return a header's first element, which the proxy nearest to the client wrote."""
        return self.headers.get(name, "").partition(",")[0].strip()

    def _host(self) -> str:
        """Return the host that the client requested, with the port even if a proxy dropped it.

        An absolute request target, such as clients of a forward proxy send, replaces Host (RFC
        9112, 3.2.2).
        """
        forwarded = self._first_of("X-Forwarded-Host")
        for host in (forwarded, self.target_host, self._first_of("Host")):
            found = HOST.fullmatch(host)
            if found:
                has_port = found[1] or found[2]
                port = self._forwarded_port()
                if has_port or port is None:
                    return host
                return f"{host}:{port}"
        address, own_port = self.connection.getsockname()[:2]
        return f"{in_brackets(ip_of(address))}:{own_port}"

    def _forwarded_port(self) -> int | None:
        """Return the port that a proxy names; None if there is none, or addresses omit it."""
        text = self._first_of("X-Forwarded-Port")
        if not re.fullmatch("[0-9]{1,5}", text):
            return None
        port = int(text)
        if not 0 < port < 65536:
            return None
        if port in (80, 443):  # the scheme's own; if it is the other one's, an inner proxy wrote it
            return None
        return port

    def _prefix(self) -> str:
        """Return the path under which a proxy offers this server; empty if it is the root."""
        prefix = self._first_of("X-Forwarded-Prefix").rstrip("/")
        return prefix if PREFIX.fullmatch(prefix) else ""

    def _offered_tokens(self) -> list[str]:
        """Return the texts that this request offers as a token; some may be empty."""
        offered = list(self.query.get("token", []))
        if offered:  # a "+" in a query means a space, but people type tokens unencoded
            typed = urlsplit(self.path).query.replace("+", "%2B")
            offered += parse_qs(typed, keep_blank_values=True)["token"]
        scheme, _, credentials = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":  # the library decodes heads as Latin-1
            offered.append(credentials.strip().encode("latin-1").decode(errors="replace"))
        elif scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                pair = base64.b64decode(credentials, validate=True)
                offered.append(_credentials_text(pair).partition(":")[2])
        return offered

    def _is_token_among(self, offered: Iterable[str]) -> bool:
        """Whether the configured token is among these texts, or no token is configured."""
        configured = self.server.config.server.token
        if not configured:
            return True
        token = configured.encode()
        return any(hmac.compare_digest(each.encode(), token) for each in offered)

    # Short answers

    def answer(
        self, page: Page, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] = {}
    ) -> None:
        """Send a complete answer, without its body if the request is HEAD."""
        body = page.body
        about = {"Content-Type": page.kind}
        if len(body) >= COMPRESSED_SIZE and page.kind != PLAYLIST_TYPE:
            about["Vary"] = "Accept-Encoding"
            if accepts_gzip(self.headers.get("Accept-Encoding", "")):
                about["Content-Encoding"] = "gzip"
                body = gzip.compress(body, mtime=0)
        about["Content-Length"] = str(len(body))
        about["X-Content-Type-Options"] = "nosniff"
        if page.kind == HTML:
            config = self.server.config if self.is_trusted else Config()
            about.update(policy_headers(config))
        about.update(headers)
        self._send_head(status, about)
        if self.command != "HEAD":
            # A write's time-out is for all of its bytes, and a large list takes its time.
            for at in range(0, len(body), ANSWER_PART):
                self.wfile.write(body[at : at + ANSWER_PART])

    def answer_error(
        self, status: HTTPStatus, reason: str, headers: Mapping[str, str] = {}
    ) -> None:
        """Answer with a reason: as a page for a person, as JSON for a program."""
        if self.is_person:
            name = self.path.partition("?")[0].removeprefix("/")
            page = error_page(self.site(), status, reason, name, self.agent)
        else:
            page = json_page({"error": reason}, indent=None)
        self.answer(page, status, headers)

    def answer_health(self) -> None:
        """Answer a monitor or load balancer; only trusted clients see how busy the server is."""
        is_stopping = self.server.stopping.is_set()
        content: dict[str, object] = {
            "status": "stopping" if is_stopping else "ok",
            "streams": len(self.server.config.streams),
        }
        if self.is_trusted:
            content["viewers"] = self.server.channels.viewer_count()
            content["uptime_seconds"] = int(time.monotonic() - self.server.started)
        page = json_page(content, indent=None)
        if is_stopping:
            self.answer(page, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "5"})
        else:
            self.answer(page)

    def answer_watch_page(self, stream: StreamSettings, quality: str | None) -> None:
        """Answer with the page that plays a stream, after starting the stream's channel.

        Raises StreamError if the channel does not start.
        """
        channels = self.server.channels
        try:
            viewer = self._viewer(stream, polls=True)
            channel, viewer = channels.poll(stream, quality, viewer, anew=True)
            viewer.listed = None  # a new page has no segment yet
            watched = Watched(quality, channel.variant or "", f"{stream.name}.m3u8")
        except NoHls:
            path = ""
            if channels.known(stream.name).container.plays_bare:
                path = stream.name
            watched = Watched(quality, path=path, has_hls=False)
        self.answer(watch_page(self.site(), stream, watched, self.agent))

    def answer_head(self, stream: StreamSettings, kind: str | None) -> None:
        """Answer HEAD without opening an upstream.  Kodi and Jellyfin send it before they play."""
        if self.server.stopping.is_set():
            raise stopping_error()
        if kind == ".m3u8":
            headers = {"Content-Type": PLAYLIST_TYPE, **HLS_HEADERS}
        elif self.is_person and kind != ".ts":
            headers = {"Content-Type": HTML, **MEDIA_HEADERS}
        else:  # use the media type that the stream had last
            known = self.server.channels.known(stream.name)
            headers = {"Content-Type": known.container.media_type, **MEDIA_HEADERS}
        self._send_head(HTTPStatus.OK, headers)

    def _send_head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        """Send the status line, these headers, and those of every answer."""
        complete = dict(headers)
        if headers.get("Content-Type") != HTML:
            complete.update(self._cors_headers())
        complete.setdefault("Cache-Control", "no-store")
        complete["Connection"] = "close"
        self.send_response(status)
        for name, value in complete.items():
            self.send_header(name, value)
        self.end_headers()

    def _cors_headers(self) -> dict[str, str]:
        """Return the headers that allow players on other web pages to read the answer (Fetch, 3.2).

        Clients that only `trusted` admits get none: otherwise any web page opened at home could
        read the token from a list.  Preflight requests get them, because they carry no credentials.
        """
        if not self.is_for_players:
            return {}
        if self.command == "OPTIONS":
            return {
                "Access-Control-Allow-Origin": "*",
                "Access-Control-Allow-Methods": "GET, HEAD",
                "Access-Control-Allow-Headers": "Authorization, Range",
            }
        if self.is_trusted and not self.has_token:
            return {}
        return {"Access-Control-Allow-Origin": "*"}

    # A program guide

    def answer_guide(self, settings: PlaylistSettings, address: str) -> None:
        """Relay the guide at an address as its bytes arrive.

        A guide may have hundreds of megabytes.  If it is compressed at the origin, it stays so for
        a client that accepts gzip.  Raises StreamError, but only before the answer has begun.
        """
        if self.command == "HEAD":
            self._send_head(HTTPStatus.OK, GUIDE_HEADERS)
            return
        asked = {"Accept-Encoding": "gzip"}
        for name in ("If-None-Match", "If-Modified-Since"):
            if self.headers.get(name):
                asked[name] = self.headers[name]
        fetch = fetch_for(settings, address, GUIDE_TIME)
        try:
            self._pass_on(fetch, fetch.open(asked))
        finally:
            fetch.close()

    def _pass_on(self, fetch: Fetch, response: requests.Response) -> None:
        """Pass on the origin's answer: the guide, or that it has not changed."""
        headers = dict(GUIDE_HEADERS)
        for name in ("ETag", "Last-Modified"):
            if response.headers.get(name):
                headers[name] = response.headers[name]
        if response.status_code == HTTPStatus.NOT_MODIFIED:
            self._send_head(HTTPStatus.NOT_MODIFIED, headers)
            return

        encoding = response.headers.get("Content-Encoding", "identity").lower()
        is_unchanged = encoding in ("identity", "gzip", "x-gzip")  # the bytes stay as they are
        parts = whole_guide(fetch.parts(is_decoded=not is_unchanged))
        start = next(parts, b"")
        parts = itertools.chain([start], parts)
        if start.startswith(GZIP_START):
            headers["Vary"] = "Accept-Encoding"
            if accepts_gzip(self.headers.get("Accept-Encoding", "")):
                headers["Content-Encoding"] = "gzip"
            else:
                parts = unpacked(parts)
                is_unchanged = False

        if is_unchanged and "Content-Length" in response.headers:
            headers["Content-Length"] = response.headers["Content-Length"]
        elif self.request_version != "HTTP/1.0":
            headers["Transfer-Encoding"] = "chunked"
        etag = headers.get("ETag", "")
        if not is_unchanged and etag.startswith('"'):  # the bytes differ (RFC 9110, 8.8.1)
            headers["ETag"] = f"W/{etag}"
        self._send_head(HTTPStatus.OK, headers)
        self._send_guide(parts, is_chunked="Transfer-Encoding" in headers)

    def _send_guide(self, parts: Iterator[bytes], *, is_chunked: bool) -> None:
        """Send a guide's body.  Raises ViewerGone if it breaks off.

        In that case the final chunk, or the rest of the announced length, is missing, so clients do
        not mistake the part for the whole guide.
        """
        self.connection.settimeout(GUIDE_SEND_TIME)
        try:
            for part in parts:
                if not part:
                    continue  # an empty chunk would end the body
                if is_chunked:
                    part = b"%x\r\n%b\r\n" % (len(part), part)
                self.wfile.write(part)
        except (StreamError, zlib.error) as error:
            log.warning("%s: the guide broke off: %s", self.path.partition("?")[0], explain(error))
            raise ViewerGone("left") from error
        if is_chunked:
            self.wfile.write(b"0\r\n\r\n")

    # A channel

    def stream_channel(self, stream: StreamSettings, quality: str | None) -> None:
        """Answer with the channel's media until it ends or the viewer leaves.

        Raises StreamError if no media arrives.
        """
        channels = self.server.channels
        while True:
            viewer = self._viewer(stream, polls=False)
            channel = channels.watch(stream, quality, viewer)
            try:
                self._stream(channel, viewer, self._first_blocks(channel, viewer))
                return
            except WindowEnded:  # before the answer began
                if channels.drop_reason(channel) != "reload":
                    raise
            finally:
                channels.leave(channel, viewer)
            # A reload changed the stream, so continue with the new one.
            stream = self.server.config.streams.get(stream.name, stream)

    def _viewer(self, stream: StreamSettings, polls: bool) -> Viewer:
        """Return the client as a viewer, after tuning its connection for media."""
        tune(self.connection, stream.options.viewer_timeout)
        left = functools.partial(has_left, self.connection)
        return Viewer(self.address, self.agent, left, polls=polls)

    def _stream(self, channel: Channel, viewer: Viewer, first: list[Block]) -> None:
        """Send the body, and log the viewer's start and how it ended."""
        channel.record.add("arrivals")
        self.server.note_first_byte(time.monotonic() - viewer.since)
        name = channel.stream.name
        threading.current_thread().name = f"viewer-{name}-{next(self.server.numbers)}"
        log.info("%s: %s started watching", name, viewer_label(viewer.address))

        ending = "left"
        try:
            self._send_body(channel, viewer, first)
            ending = "got everything"
        except WindowEnded:
            ending = "disconnected by the server"
            channel.record.add_drop(self.server.channels.drop_reason(channel))
        except ViewerGone as gone:
            ending = gone.reason
            if gone.label is not None:
                channel.record.add_drop(gone.label)
        except OSError:
            pass  # it left
        finally:
            log.info(
                "%s: %s %s: %d bytes in %.1f s, %d skips",
                name,
                viewer_label(viewer.address),
                ending,
                viewer.sent,
                time.monotonic() - viewer.since,
                viewer.skips,
            )

    def _first_blocks(self, channel: Channel, viewer: Viewer) -> list[Block]:
        """Wait for the first media, which makes the answer a 200.

        Raises StreamError if none arrives within `timeout`.
        """
        deadline = time.monotonic() + channel.stream.options.timeout
        while time.monotonic() < deadline:
            blocks = self._take(channel, viewer)
            if blocks:
                return blocks
        raise no_media_error(channel.stream, channel.trouble)

    def _take(self, channel: Channel, viewer: Viewer) -> list[Block]:
        """Return the next blocks; an empty list after a second without any.

        Raises ViewerGone if the viewer has left by then.
        """
        blocks = channel.window.take(viewer, 1.0)
        if not blocks and viewer.is_gone():
            raise ViewerGone
        return blocks

    def _send_body(self, channel: Channel, viewer: Viewer, blocks: list[Block]) -> None:
        """Send the head, these blocks, and all later ones as they arrive.

        Returns once the source has truly ended.  Raises WindowEnded if the channel ended otherwise,
        and OSError or ViewerGone if the viewer left.
        """
        is_chunked = self.request_version != "HTTP/1.0"
        headers = {"Content-Type": channel.container.media_type, **MEDIA_HEADERS}
        if is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        self._send_head(HTTPStatus.OK, headers)

        filler = channel.container.filler
        silence = 0  # seconds without media
        try:
            while True:
                if blocks:
                    size = sum(map(len, blocks))
                    if is_chunked:
                        blocks = [b"%x\r\n" % size, *blocks, b"\r\n"]
                    self._send_pieces(blocks, channel, viewer)
                    viewer.sent += size
                blocks = self._take(channel, viewer)
                if blocks:
                    silence = 0
                else:
                    silence += 1
                if silence >= SILENCE and filler:
                    blocks = [filler]  # splits no packet: blocks hold whole ones
        except WindowEnded as ending:
            if not ending.is_complete:
                raise
        if is_chunked:
            self._send_pieces([b"0\r\n\r\n"], channel, viewer)

    def _send_pieces(self, pieces: list[Block], channel: Channel, viewer: Viewer) -> None:
        """Send all pieces, several with each call, and empty the list.

        Each byte taken counts as progress of the viewer.  Raises ViewerGone if no byte is taken for
        `viewer_timeout`.
        """
        viewer.moved = time.monotonic()
        while pieces:
            sent = send_some(self.connection, pieces)
            now = time.monotonic()
            patience = channel.stream.options.viewer_timeout  # a reload may change it
            if sent:
                viewer.moved = now
            elif now - viewer.moved >= patience:
                raise ViewerGone(f"read nothing for {patience:g} s", label="timeout")
            while pieces and sent >= len(pieces[0]):
                sent -= len(pieces.pop(0))
            if sent:
                pieces[0] = memoryview(pieces[0])[sent:]

    # A channel as HLS

    def answer_playlist(self, stream: StreamSettings, quality: str | None) -> None:
        """Answer with the media playlist.  Raises StreamError if there is none within `timeout`."""
        text = ""
        while not text:
            viewer = self._viewer(stream, polls=True)
            channel, viewer = self.server.channels.poll(stream, quality, viewer, anew=False)
            try:
                text = self._playlist_text(channel, viewer, quality)
            except WindowEnded:
                if self.server.channels.drop_reason(channel) != "reload":
                    raise
                # Some players stop at an error, so the client gets the changed stream's playlist.
                stream = self.server.config.streams.get(stream.name, stream)
        self.answer(Page(text.encode(), PLAYLIST_TYPE), headers=HLS_HEADERS)

    def _playlist_text(self, channel: Channel, viewer: Viewer, quality: str | None) -> str:
        """Return the media playlist once it has news.

        Raises StreamError and ViewerGone as _await_news() does, and WindowEnded.
        """
        self._await_news(channel, viewer)
        tail = self.site().query(quality=quality)
        name = channel.stream.name
        viewer.listed, text = media_playlist(channel.window, name, tail, viewer.listed)
        return text

    def _await_news(self, channel: Channel, viewer: Viewer) -> None:
        """Wait for the first playlist; later, wait briefly for one that the client has not seen.

        Chromium loads every listed segment before it starts to play, then reloads the playlist at
        once, and stops if it finds no new segment.  So a playlist without news must not be sent at
        once.
        """
        window = channel.window
        if viewer.listed is not None:
            window.await_listed(viewer.listed, min(RELOAD_WAIT, window.target_duration))
            return
        deadline = time.monotonic() + channel.stream.options.timeout
        while True:
            remaining = deadline - time.monotonic()
            if window.await_listed(None, max(0.0, min(START_TICK, remaining))):
                return
            viewer.moved = time.monotonic()  # it waits, so it is not silent
            if viewer.moved >= deadline:
                trouble = TOO_LARGE if window.lacks_room else channel.trouble
                raise no_media_error(channel.stream, trouble)
            if has_left(self.connection):
                raise ViewerGone

    def answer_segment(
        self, stream: StreamSettings, quality: str | None, number: int, extension: str
    ) -> None:
        """Answer with a segment or initialization section; raises StreamError if there is none.

        The segment may be that of a running channel, or of an ended one that is still polled.
        """
        channel, blocks = self._find_segment(stream, quality, number, extension)
        size = sum(map(len, blocks))
        about = {"Content-Type": channel.container.media_type, "Content-Length": str(size)}
        self._send_head(HTTPStatus.OK, about | HLS_HEADERS)
        if self.command == "HEAD":
            return
        request = self._viewer(stream, polls=True)  # each request has its own progress
        try:
            self._send_pieces(list(blocks), channel, request)
        except ViewerGone as gone:
            if gone.label is not None:
                channel.record.add_drop(gone.label)
            raise
        self.server.channels.note_poll(channel, request.key, size)

    def _find_segment(
        self, stream: StreamSettings, quality: str | None, number: int, extension: str
    ) -> tuple[Channel, list[Block]]:
        """Return a segment and the channel that has it; raises StreamError if none has it."""
        for channel in self.server.channels.channels_to_poll(stream, quality):
            blocks = channel.window.find(number, extension)
            if blocks:
                return channel, blocks
        raise StreamError(HTTPStatus.NOT_FOUND, "there is no such segment")

    # Methods that the standard library calls

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error in the form of our other answers; called for heads that cannot be read."""
        self.request_version = "HTTP/1.1"
        if not self.command:  # None if the request line cannot be read
            self.command = "GET"
        status = HTTPStatus(code)
        if not message:
            message = status.phrase
        self.answer_error(status, message)

    def version_string(self) -> str:
        return f"StreamPipe/{__version__}"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.server.note_answer(int(code))
        path = self.path.partition("?")[0]  # a query may hold the token
        # A number, because Python 3.10 would write "HTTPStatus.OK".
        client = client_label(self.address)
        log.debug("%s: %s %s: %d", client, self.command, path, int(code))


def is_for_players(path: str) -> bool:
    """Whether a path is that of media, HLS or an M3U list; the stream need not exist."""
    if path in M3U_LISTS or TUNER_PATH.fullmatch(path):
        return True
    found = STREAM_PATH.fullmatch(_plain(path))
    if found is None:
        return False
    return found[1] not in RESERVED_NAMES


def _plain(path: str) -> str:
    """Return a typed path in a stream's form: lower case, without a slash at the end."""
    return path.rstrip("/").lower()


def ip_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return a socket's address without its scope.

    A server that listens on "::" sees IPv4 clients at IPv6 addresses, which become IPv4 again here.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def is_in(address: str, networks: Iterable[str]) -> bool:
    """Whether a socket's address is in one of these networks."""
    return any(ip_of(address) in ipaddress.ip_network(network) for network in networks)


def forwarded_address(entry: str) -> str | None:
    """Return the address in an entry of X-Forwarded-For; None if it has none ("unknown")."""
    found = FORWARDED_ADDRESS.fullmatch(entry)
    if not found:
        return None
    try:
        return str(ip_of(found[1] or found[2] or found[3]))
    except ValueError:
        return None


def in_brackets(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return an address as the host of a URL."""
    if ip.version == 6:
        return f"[{ip}]"
    return str(ip)


def lan_host(listening: str) -> str:
    """Return the host for URLs with which others on the network reach this server.

    The server listens everywhere: `listening` is one of EVERYWHERE, of which only "::" serves IPv6.
    Returns "localhost" if there is no network.
    """
    # Addresses for documentation (RFC 5737, RFC 3849): connecting finds a route but sends nothing.
    routes = [(socket.AF_INET, "192.0.2.1")]
    if listening == "::":
        routes.append((socket.AF_INET6, "2001:db8::1"))
    for family, nobody in routes:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((nobody, 9))
            return in_brackets(ip_of(sock.getsockname()[0]))
    return "localhost"


def accepts_gzip(accepted: str) -> bool:
    """Whether a request with this Accept-Encoding accepts gzip (RFC 9110, 12.5.3)."""
    for each in accepted.lower().split(","):
        coding, _, weight = each.replace(" ", "").partition(";")
        if coding in ("gzip", "x-gzip"):
            return not re.fullmatch(r"q=0(\.0*)?", weight)  # a weight of 0 refuses it
    return False


def tune(sock: socket.socket, viewer_timeout: float) -> None:
    """Limit the bytes that the kernel holds for a viewer, and make it detect vanished machines.

    Sends block with the kernel's own time-out, if it has one, so that a send needs no other system
    call.
    """
    idle = max(30, int(viewer_timeout / 4))  # a paused player's machine answers probes, too
    options = [
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", UNSENT_LIMIT),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", idle),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 10),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 6),
        # Later than our own decision: the kernel counts while a paused player answers probes, too.
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", int((viewer_timeout + 60) * 1000)),
    ]
    for level, name, value in options:
        with contextlib.suppress(OSError, AttributeError):  # some platforms lack some of them
            sock.setsockopt(level, getattr(socket, name), value)
    seconds = min(SEND_TICK, viewer_timeout)
    sock.settimeout(seconds)
    with contextlib.suppress(OSError, AttributeError):
        microseconds = int(seconds % 1 * 1e6)
        timeval = struct.pack("ll", int(seconds), microseconds)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        if hasattr(sock, "sendmsg"):  # not on Windows, which takes no timeval
            sock.settimeout(None)


def has_left(sock: socket.socket) -> bool:
    """Whether the other end has closed its connection, or its sending side.  Never blocks.

    Bytes that it sent after its request are dropped, because they precede the end and so hide it.
    """
    try:
        for _ in range(2):  # the first read may return such bytes
            if not _receive_at_once(sock):
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def _receive_at_once(sock: socket.socket) -> bytes:
    """Return some of the bytes that have arrived; none if the other end has closed.

    Raises BlockingIOError if none have arrived, and OSError if the connection broke.
    """
    if sock.gettimeout() is None and hasattr(socket, "MSG_DONTWAIT"):
        return sock.recv(4 * KIB, socket.MSG_DONTWAIT)
    readable, _, _ = select.select([sock], [], [], 0)  # recv() alone would wait like a send
    if not readable:
        raise BlockingIOError
    return sock.recv(4 * KIB)


def send_some(sock: socket.socket, pieces: Sequence[Block]) -> int:
    """Send as much of the pieces as the kernel accepts within SEND_TICK; returns the bytes sent.

    Returns 0 for a viewer that reads nothing.  Raises ConnectionError if the connection itself
    timed out, because that viewer has left.
    """
    try:
        if hasattr(sock, "sendmsg"):
            return sock.sendmsg(pieces[:SEND_BLOCKS])
        return sock.send(b"".join(pieces))
    except (BlockingIOError, TimeoutError) as error:
        if error.errno == errno.ETIMEDOUT:
            raise ConnectionError("the connection timed out") from error
        return 0


# --------------------------------------------------------------------------------------------------
# Server: connections and their threads
# --------------------------------------------------------------------------------------------------

GUESSERS = 10_000  # addresses that sent a wrong token, remembered for REPEAT_TIME
SPARE_CONNECTIONS = 256  # connections beyond max_viewers, for /health, pages and refusals
MOST_CONNECTIONS = 4096  # connections if max_viewers is 0


@dataclass(frozen=True)
class Reload:
    """The result of the newest reload."""

    is_successful: bool
    at: float = field(default_factory=time.time)  # a Unix time


class Server(ThreadingHTTPServer):
    """Accepts connections, and gives each its own thread.

    Main starts and stops it, the listener accepts connections, and any thread may call the rest.
    """

    request_queue_size = 1024  # IPTV clients connect in bursts; the library's 5 would drop some

    def __init__(
        self,
        config: Config,
        channels: Channels,
        before_use: Callable[[Config], None] = lambda config: None,
    ) -> None:
        """Bind and listen; raises OSError.

        `before_use` is called with each configuration before it is used.
        """
        self.config = config  # a reload replaces it as a whole
        self.last_reload = Reload(is_successful=True)  # main replaces it; until then, the start
        self.channels = channels
        self.stopping = channels.stopping  # once set, new viewers are refused
        self.lists = Lists(config, self.use)
        self._before_use = before_use
        self.started = time.monotonic()
        self.numbers = itertools.count(1)  # for threads' names
        self._file_warnings = LineLimit()  # used only by the listener
        # _counts_lock guards the five below.
        self._counts_lock = threading.Lock()
        self.answers: Counter[int] = Counter()  # by status
        self.refusals: Counter[str] = Counter()  # by limit
        self.first_bytes: Counter[str] = Counter()  # by bound
        self.first_byte_sum = 0.0  # seconds
        self._wrong_tokens = LineLimit(GUESSERS)  # by the client's address
        # _open_lock guards _open, the sockets of all connections.
        self._open_lock = threading.Lock()
        self._open: set[socket.socket] = set()
        host, port = config.server.host, config.server.port
        self.configured = host, port
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def note_first_byte(self, seconds: float) -> None:
        with self._counts_lock:
            for bound in FIRST_BYTE_BOUNDS:
                if seconds <= float(bound):
                    self.first_bytes[bound] += 1
            self.first_byte_sum += seconds

    def note_answer(self, status: int) -> None:
        with self._counts_lock:
            self.answers[status] += 1

    def note_wrong_token(self, address: str) -> None:
        """Log a wrong token, for fail2ban: at most one line in REPEAT_TIME per address."""
        client = str(ip_of(address))
        with self._counts_lock:
            is_allowed = self._wrong_tokens.allow(client)
        if is_allowed:
            log.warning("wrong token from %s", client)

    def note_refusal(self, limit: str) -> None:
        """Count a request that was refused at one of LIMITS."""
        with self._counts_lock:
            self.refusals[limit] += 1

    def counts(self) -> tuple[Counter[int], Counter[str], Counter[str], float]:
        """Return answers by status, refusals by limit, and the first bytes' histogram and sum."""
        with self._counts_lock:
            first_bytes = self.first_bytes.copy()
            return self.answers.copy(), self.refusals.copy(), first_bytes, self.first_byte_sum

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks DNS for an unused name

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._warn_of_files()
            # The connection still waits to be accepted, so without a pause the listener would spin.
            time.sleep(0.1)
            raise

    def _warn_of_files(self) -> None:
        """Log at most once in REPEAT_TIME that no connection can be accepted."""
        if self._file_warnings.allow():
            log.warning("no connection can be accepted: raise the limit of open files")

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread that answers a new connection, or refuse it if there is no room."""
        most = MOST_CONNECTIONS
        if self.config.server.max_viewers:
            most = self.config.server.max_viewers + SPARE_CONNECTIONS
        with self._open_lock:
            is_full = len(self._open) >= most
            self._open.add(request)
        if is_full:
            self._refuse(request, "connections")
            return

        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name=f"viewer-{next(self.numbers)}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:  # the system has no threads left
            self._refuse(request, "threads")

    def _refuse(self, request: socket.socket, limit: str) -> None:
        """Answer 503 without blocking, because this runs in the listener's thread.

        `limit` is one of LIMITS.
        """
        self.note_refusal(limit)
        body = b'{"error": "there are too many connections"}\n'
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nRetry-After: 5\r\nConnection: close\r\n\r\n"
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(head.encode() + body)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        client = client_label(client_address[0])
        log.error("a request from %s failed:\n%s", client, traceback.format_exc())

    def reload(self, config: Config) -> None:
        """Use a new configuration and load its lists; the listening address does not change."""
        if (config.server.host, config.server.port) != self.configured:
            log.warning("changes to server.host and server.port take effect after a restart")
        self.lists.reload(config)

    def use(self, config: Config) -> None:
        """Use a new configuration that includes the streams of its lists."""
        self._before_use(config)
        self.config = config
        self.channels.reload(config)

    def hang_up(self) -> None:
        """Shut down all connections, so that their threads end."""
        with self._open_lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


# --------------------------------------------------------------------------------------------------
# Check: opens every address of every stream once, and prints the result
#
# It opens up to CHECKS_AT_ONCE addresses at a time, within `max_upstreams` and the limit of each
# account.  A provider may still count a connection for a while after it was closed, so an address
# that may be refused for that reason is tried up to REFUSED_TRIES times.
# --------------------------------------------------------------------------------------------------

CHECKS_AT_ONCE = 4
CHECK_TIME = 3.0  # estimated seconds per address, until the first check is done
REFUSED_PAUSE = 2.0  # seconds until a refused address is tried again
REFUSED_TRIES = 4
# Answers that can only mean that no connection is free.  The others in BUSY may have other causes,
# so they count only if another check has already used the same host.
SURELY_BUSY = frozenset(answered(status) for status in (429, 458, 509))
SHOWN_POSITIONS = ("the first", "the second", "the third")
ESTIMATE_WIDTH = 20  # characters of the estimate in a progress line; the last line covers it


@dataclass(frozen=True)
class Finding:
    """The result for one address of a stream."""

    is_ok: bool
    words: str  # facts about the stream, or the reason for the failure


@dataclass
class Check:
    """An address to check, with its stream and account."""

    stream: StreamSettings
    address: str
    account: str | None  # name of the playlist whose account it uses
    finding: Finding | None = None


def check_address(check: Check, had_connection: bool) -> Finding:
    """Start a stream at one address as a viewer would, and stop it after its first bytes.

    `had_connection` tells whether another check has already used the same host.  If no connection
    is free, this waits for REFUSED_PAUSE and tries again.
    """
    busy = BUSY if had_connection else SURELY_BUSY
    finding = _check_once(check)
    for _ in range(REFUSED_TRIES - 1):
        if finding.is_ok or finding.words not in busy:
            break
        time.sleep(REFUSED_PAUSE)
        finding = _check_once(check)
    return finding


def _check_once(check: Check) -> Finding:
    stream = replace(check.stream, urls=(check.address,))
    channels = Channels(Config(streams={stream.name: stream}))
    began = time.monotonic()
    try:
        channel = channels.watch(stream, None, Viewer("check"))
        seconds = time.monotonic() - began
    except StreamError as error:
        return Finding(is_ok=False, words=error.reason)
    finally:
        channels.stop(STOP_TIME)
    qualities = _unique(channels.record(stream.name).variants.values())
    facts = [
        channel.container.media_type,
        ", ".join(qualities),
        f"first byte after {seconds:.2f} s",
    ]
    if channel.note:
        facts.append(channel.note)
    return Finding(is_ok=True, words="; ".join(facts))


class Checker:
    """Runs checks in a few threads, within the limits of the server and of each account.

    Only run() blocks its caller.
    """

    def __init__(self, config: Config, checks: Sequence[Check]) -> None:
        self._checks = checks
        self._limits = {name: found.max_upstreams for name, found in config.playlists.items()}
        self._at_once = CHECKS_AT_ONCE
        if config.server.max_upstreams > 0:  # 0: no limit
            self._at_once = min(CHECKS_AT_ONCE, config.server.max_upstreams)
        # Guards everything below.  Notified when a check ends.
        self._changed = threading.Condition()
        self._waiting = list(checks)
        self._open: Counter[str | None] = Counter()  # addresses being checked, by account
        self._hosts: set[str] = set()  # hosts that have had a connection
        self._done = 0

    def run(self, show: Callable[[int], None]) -> None:
        """Run all checks, and block until they end.

        `show` is called with the number of finished checks whenever it grows.
        """
        for number in range(min(self._at_once, len(self._checks))):
            threading.Thread(target=self._run, name=f"check-{number}", daemon=True).start()
        shown = 0
        while shown < len(self._checks):
            with self._changed:
                while self._done == shown:
                    self._changed.wait()
                shown = self._done
            show(shown)

    def seconds(self) -> float:
        """Estimate how many seconds all checks take within the limits."""
        counts = Counter(check.account for check in self._checks)
        turns = [len(self._checks) / self._at_once]
        for account, count in counts.items():
            turns.append(count / self._places_of(account))
        return max(turns) * CHECK_TIME

    def _places_of(self, account: str | None) -> int:
        """Return how many addresses of an account may be checked at once."""
        if account is None:
            return self._at_once
        limit = self._limits[account]
        if limit == 0:  # no limit
            return self._at_once
        return min(limit, self._at_once)

    def _run(self) -> None:
        while (check := self._take()) is not None:
            host = host_of(check.address)
            with self._changed:
                had_connection = host in self._hosts
            try:
                finding = check_address(check, had_connection)
            except Exception:
                log.exception("a check failed")
                finding = Finding(is_ok=False, words="StreamPipe failed: see its log")
            with self._changed:
                check.finding = finding
                self._hosts.add(host)
                self._open[check.account] -= 1
                self._done += 1
                self._changed.notify_all()

    def _take(self) -> Check | None:
        """Wait for a check whose account has a free place, and return it; None at the end."""
        with self._changed:
            while self._waiting:
                for check in self._waiting:
                    if self._open[check.account] < self._places_of(check.account):
                        self._waiting.remove(check)
                        self._open[check.account] += 1
                        return check
                self._changed.wait()
            return None


def load_for_check(config: Config) -> tuple[Config, dict[str, str]]:
    """Load all lists once.

    Returns the configuration with their streams, and the reasons of failed lists by their names.
    """
    loaded: dict[str, ChannelList] = {}
    failures: dict[str, str] = {}
    for name, settings in config.playlists.items():
        fetch = fetch_for(settings, settings.url, LIST_TIME)
        try:
            loaded[name] = load_list(settings, fetch)
        except Exception as error:
            failures[name] = explain(error)
        finally:
            fetch.close()
    complete, _ = with_lists(config, loaded, {})
    return complete, failures


def run_check(config: Config, names: Sequence[str] = ()) -> int:
    """Check all streams, or only those named, and print a line for each.

    Lists are loaded unless the file has all streams named.  Returns the exit status.  Raises
    ConfigError if a name is not that of a stream.
    """
    failures: Mapping[str, str] = {}
    has_all_named = bool(names) and all(name in config.streams for name in names)
    if not has_all_named:
        config, failures = load_for_check(config)
    for name, reason in failures.items():
        print(f"{name}  failed  {reason}")  # noqa: T201

    streams = _streams_to_check(config, names)
    if not streams and not failures:
        print(NO_STREAMS, file=sys.stderr)  # noqa: T201
        return EXIT_FAILED

    checks = {stream.name: _checks_of(config, stream) for stream in streams}
    all_checks = [check for found in checks.values() for check in found]
    _run_with_progress(Checker(config, all_checks), len(all_checks))

    is_all_well = not failures
    for name, found in checks.items():
        is_ok, words = _summary([check.finding for check in found if check.finding is not None])
        print(f"{name}  {words}")  # noqa: T201
        if not is_ok:
            is_all_well = False
    return EXIT_OK if is_all_well else EXIT_FAILED


def _streams_to_check(config: Config, names: Sequence[str]) -> list[StreamSettings]:
    """The streams with these names, or all streams if no name is given; raises ConfigError."""
    if not names:
        return list(config.streams.values())
    unknown = [name for name in names if name not in config.streams]
    if unknown:
        raise ConfigError([f"{name}: there is no stream of this name" for name in unknown])
    return [config.streams[name] for name in names]


def _checks_of(config: Config, stream: StreamSettings) -> list[Check]:
    checks = []
    for address in stream.urls:
        account = account_name_of(config, stream, address)
        checks.append(Check(stream, address, account))
    return checks


def _summary(findings: Sequence[Finding]) -> tuple[bool, str]:
    """Return whether a stream plays, and its line: `ok, 1 of 2: the first answered 403 ...`."""
    working = [finding for finding in findings if finding.is_ok]
    if not working:
        reasons = _unique(finding.words for finding in findings)
        return False, f"failed  {'; '.join(reasons)}"
    if len(findings) == 1:
        return True, f"ok  {working[0].words}"
    state = f"ok, {len(working)} of {len(findings)}"
    problems = []
    for number, finding in enumerate(findings, 1):
        if not finding.is_ok:
            problems.append(_problem(number, finding.words))
    if problems:
        state += f": {', '.join(problems)}"
    return True, f"{state}  {working[0].words}"


def _problem(number: int, reason: str) -> str:
    """Why one of several addresses failed: `the first answered 403`."""
    position = f"number {number}"
    if number <= len(SHOWN_POSITIONS):
        position = SHOWN_POSITIONS[number - 1]
    if reason.startswith("the origin "):
        return reason.replace("the origin", position, 1)
    return f"{position}: {reason}"


def _run_with_progress(checker: Checker, total: int) -> None:
    """Run the checks; on a terminal, show their progress and the estimated time left."""
    is_terminal = sys.stderr.isatty()
    began = time.monotonic()

    def show(done: int) -> None:
        if not is_terminal:
            return
        text = f"\r{done} of {total} checked"
        if done == total:
            text += " " * ESTIMATE_WIDTH + "\n"
        else:
            left = (time.monotonic() - began) / done * (total - done)
            text += f", {_duration(left)} left "
        print(text, end="", file=sys.stderr, flush=True)  # noqa: T201

    if is_terminal:
        about = _duration(checker.seconds())
        addresses = "1 address" if total == 1 else f"{total} addresses"
        print(f"checking {addresses}, about {about}", file=sys.stderr)  # noqa: T201
    checker.run(show)


# --------------------------------------------------------------------------------------------------
# Demo: our own live HLS origin, so that a new user sees a picture without a network
# --------------------------------------------------------------------------------------------------

DEMO_STREAM = "test-card"
DEMO_SEGMENTS = 6  # listed at a time
DEMO_SEGMENT_TIME = TEST_CARD_TICKS / 90_000  # seconds; MPEG-TS counts 90,000 ticks a second


class DemoHandler(BaseHTTPRequestHandler):
    """Serves the clip in a loop: `/live.m3u8` slides with the clock, `/N.ts` is loop N."""

    protocol_version = "HTTP/1.1"
    started = time.monotonic()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # our own upstream may hang up
            super().handle()

    def do_GET(self) -> None:
        newest = DEMO_SEGMENTS + int((time.monotonic() - self.started) / DEMO_SEGMENT_TIME)
        number = re.fullmatch(r"/(\d{1,12})\.ts", self.path)
        if self.path == "/live.m3u8":
            body = self._playlist(newest)
        elif number and int(number[1]) <= newest:
            body = test_card_segment(int(number[1]))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _playlist(self, newest: int) -> bytes:
        first = newest - DEMO_SEGMENTS + 1
        lines = [
            "#EXTM3U",
            "#EXT-X-VERSION:3",
            f"#EXT-X-TARGETDURATION:{math.ceil(DEMO_SEGMENT_TIME)}",
            f"#EXT-X-MEDIA-SEQUENCE:{first}",
        ]
        for number in range(first, newest + 1):
            lines += [f"#EXTINF:{DEMO_SEGMENT_TIME:.3f},", f"{number}.ts"]
        return "".join(f"{line}\n" for line in lines).encode()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("demo origin: %s", format % args)


@contextlib.contextmanager
def demo_origin() -> Iterator[str]:
    """Run the origin on the loopback interface; yields the address of its playlist."""
    with ThreadingHTTPServer(("127.0.0.1", 0), DemoHandler) as origin:
        threading.Thread(target=origin.serve_forever, args=(0.1,), name="demo", daemon=True).start()
        try:
            yield f"hls://http://127.0.0.1:{origin.server_address[1]}/live.m3u8"
        finally:
            origin.shutdown()


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

DEFAULT_FILE = Path("config.yml")  # in the working directory
DRAIN_TIME = 1.0  # seconds for which a stopping server still answers a balancer at /health
LOG_LINES = 10_000  # log lines that may wait while nothing reads the log
LOG_BYTES = 16 * MIB  # bytes of those lines; at debug level, one may contain a path of 64 KiB
LOG_TIME = 1.0  # seconds that the process may wait at its end for all lines to be written


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pipe.py", description="Serve HLS channels as plain HTTP streams."
    )
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        type=Path,
        help="configuration file (default: config.yml)",
    )
    parser.add_argument(
        "--host",
        metavar="ADDR",
        help="listen on this address instead of the configured one",
    )
    parser.add_argument(
        "--port",
        metavar="N",
        type=_port,
        help="listen on this port instead of the configured one",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help=f"serve /{DEMO_STREAM}, a channel that needs no network",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="test every stream, or only those named, print the results and exit",
    )
    parser.add_argument(
        "--log-level",
        metavar="LEVEL",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="debug, info, warning or error (default: info)",
    )
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    parser.add_argument(
        "--version",
        action="version",
        version=f"StreamPipe {__version__}, streamlink {engine_version}, Python {python}",
    )
    parser.add_argument(
        "addresses",
        metavar="ADDRESS",
        nargs="*",
        help="serve this stream or channel list: an address, NAME=ADDRESS or the path of an .m3u "
        "file",
    )
    return parser


def _port(value: str) -> int:
    if not value.isdecimal() or int(value) > 65535:
        raise argparse.ArgumentTypeError("expected a number from 0 to 65535")
    return int(value)


# Addresses on the command line

JUDGE_TIME = 5.0  # seconds to find out whether an address that ends in .m3u8 is a list
JUDGED_AT_ONCE = 8  # how many such addresses are loaded at the same time
NAMELESS = "stream"  # the name of a stream whose address yields none
_NEVER_IN_NAMES = re.compile(r"[/:?&.]")  # characters of addresses


@dataclass(frozen=True)
class Given:
    """The command line's arguments other than options."""

    addresses: Mapping[str, str]  # addresses of streams, by name
    lists: Mapping[str, str]  # addresses or paths of channel lists, by name
    names: Sequence[str]  # names of streams to check


def read_words(words: Sequence[str], is_check: bool) -> Given:
    """Sort the command line's arguments; raises ConfigError if one is invalid.

      has `://` or `NAME=`, or ends in .m3u          an address
        has get.php, or ends in .m3u                 of a channel list
        ends in .m3u8                                of a list if its first load shows one
        otherwise                                    of a stream
      has `/`, `:`, `?`, `&` or `.`                  a mistake: an address without `http://`
      anything else                                  a stream's name, for --check alone

    Blocks while the addresses that end in .m3u8 are loaded: for at most JUDGE_TIME per
    JUDGED_AT_ONCE of them.
    """
    mistakes: list[str] = []
    found: list[tuple[str | None, str]] = []  # names, if any are given, and addresses
    names: list[str] = []
    for word in words:
        split = _split_word(word)
        if split is not None:
            name, address = split
            found.append(split)
            try:
                _check_word(name, address)
            except ValueError as error:
                mistakes.append(f"{_label_of(name, address)}: {error}")
        elif is_check and not _NEVER_IN_NAMES.search(word):
            names.append(word)
        else:
            mistakes.append(f"{_shown(word)}: this is not an address: {NO_SCHEME}")
    if mistakes:
        raise ConfigError(mistakes)

    named = _named(found)
    with ThreadPoolExecutor(JUDGED_AT_ONCE, thread_name_prefix="judge") as executor:
        are_lists = list(executor.map(_is_list, [address for _, address in named]))

    addresses: dict[str, str] = {}
    lists: dict[str, str] = {}
    for (name, address), is_list in zip(named, are_lists, strict=True):
        if is_list:
            lists[name] = address
        else:
            addresses[name] = address
    return Given(addresses, lists, names)


def _named(found: Sequence[tuple[str | None, str]]) -> list[tuple[str, str]]:
    """Return the names and addresses, after naming each address that has no name.

    Raises ConfigError if the same name was given twice.
    """
    given = Counter(name for name, _ in found if name is not None)
    twice = [name for name, count in given.items() if count > 1]
    if twice:
        raise ConfigError([f"{name}: two addresses have this name" for name in twice])
    taken = set(given)
    named = []
    for name, address in found:
        if name is None:
            name = _new_name(address, taken)
            taken.add(name)
        named.append((name, address))
    return named


def _new_name(address: str, taken: Collection[str]) -> str:
    """A name for an address, other than those taken: `news`, `news-2` ..."""
    base = _name_from(address)
    name = base
    number = 2
    while name in taken:
        name = f"{base}-{number}"
        number += 1
    return name


def _split_word(word: str) -> tuple[str | None, str] | None:
    """Split an argument into its name, or None, and its address; None if it has no address."""
    name, equals, address = word.partition("=")
    if equals and not _NEVER_IN_NAMES.search(name):  # or the "=" is that of an address's query
        if not address:
            return None
        if not name:
            return None, address
        return name, address
    if "://" in word or word.lower().endswith(".m3u"):
        return None, word
    return None


def _label_of(name: str | None, address: str) -> str:
    """The beginning of a message about an argument.

    It names a local file without its folders, because the argument may be a mistyped address with
    a password: `http:/tv.example/user/password/tv.m3u`.
    """
    if name is not None:
        return name
    if "://" in address:
        return "ADDRESS"
    return Path(address).name


def _shown(word: str) -> str:
    """An argument that is no address, or `ADDRESS` if it may be one with a user or a password."""
    has_folders = word.count("/") > 1
    if has_folders or re.search("[?&@]", word):
        return "ADDRESS"
    return word


def _check_word(name: str | None, address: str) -> None:
    """Raise ValueError if the address, or the name if there is one, cannot be used."""
    if name is not None:
        _check_name(name, "a stream name may only contain a-z, 0-9 and -")
    if "://" in address:
        stream_address(address)
    elif not address.lower().endswith((".m3u", ".m3u8")):
        raise ValueError(NO_SCHEME)
    elif not Path(address).expanduser().is_file():
        raise ValueError("there is no such file")


def _name_from(address: str) -> str:
    """Make a name from the last part of an address's path."""
    path = unquote(urlsplit(without_prefixes(address)).path).rstrip("/")
    last = path.rpartition("/")[2]
    stem = last.rpartition(".")[0]
    if not stem:
        stem = last  # it has no extension
    name = plain_name(stem)
    if not name or name in RESERVED_NAMES:
        return NAMELESS
    return name


def _is_list(address: str) -> bool:
    """Whether an address is that of a channel list.  Blocks for JUDGE_TIME at most."""
    path = urlsplit(without_prefixes(address)).path.lower()
    if "://" not in address or path.endswith(".m3u") or "get.php" in address:
        return True
    if not path.endswith(".m3u8") or urlsplit(address).scheme not in ("http", "https"):
        return False
    settings = PlaylistSettings("list", address, films=True)
    fetch = fetch_for(settings, address, JUDGE_TIME)
    try:
        load_list(settings, fetch)
    except PipeError:  # a stream's playlist, or a failure, which the stream's start will report
        return False
    finally:
        fetch.close()
    return True


def _file_to_read(arguments: argparse.Namespace, given: Given) -> Path | None:
    """The path of the configuration; None if the command line needs no file and names none."""
    if arguments.config is not None:
        return Path(arguments.config)
    if arguments.demo or given.addresses or given.lists:
        return None
    return DEFAULT_FILE


def warn_of_unread_file(arguments: argparse.Namespace, given: Given) -> None:
    """Log that the default file is not read, if there is one: its token might be relied on."""
    if _file_to_read(arguments, given) is not None or not DEFAULT_FILE.is_file():
        return
    reason = "an address was given"
    if arguments.demo:
        reason = "--demo was given"
    log.warning(
        "%s is not read, because %s: add -c %s to use both", DEFAULT_FILE, reason, DEFAULT_FILE
    )


def read_settings(arguments: argparse.Namespace, given: Given, demo: str | None) -> Config:
    """Return the file's configuration, overridden and extended by the command line.

    `demo` is the address of the demo's stream.  Raises ConfigError.
    """
    config = Config()
    path = _file_to_read(arguments, given)
    if path is not None:
        config = load_config(path, engine_options())
    server = config.server
    if arguments.host is not None:
        server = replace(server, host=arguments.host)
    if arguments.port is not None:
        server = replace(server, port=arguments.port)
    config = replace(config, server=server)
    return _extended(config, given, demo)


def _extended(config: Config, given: Given, demo: str | None) -> Config:
    """A configuration with the streams and lists of the command line; raises ConfigError."""
    mistakes = []
    streams = dict(config.streams)
    playlists = dict(config.playlists)
    for name, address in given.addresses.items():
        if name in streams or name in config.overrides:
            mistakes.append(f"streams.{name}: the command line adds another stream with this name")
        streams[name] = StreamSettings(name, (address,), title=name, options=config.options)
    for name, address in given.lists.items():
        if name in playlists:
            mistakes.append(f"playlists.{name}: the command line adds another list with this name")
        playlists[name] = PlaylistSettings(name, address, options=config.options)
    if demo is not None:
        if DEMO_STREAM in streams:
            mistakes.append(
                f"streams.{DEMO_STREAM}: --demo adds a stream with this name: rename yours"
            )
        card = StreamSettings(DEMO_STREAM, (demo,), title="Test card", options=config.options)
        streams[DEMO_STREAM] = card
    if mistakes:
        raise ConfigError(mistakes)
    return replace(config, streams=streams, playlists=playlists)


# Logging

# An address: its scheme, a user and password, if any, its host with the port, and the rest.
_ADDRESS = re.compile(
    r"\b([a-z][a-z0-9+.-]*://)(?:[^\s/'\"]*@)?([^\s/?#'\"<>()]*)[^\s'\"<>()]*", re.I
)
# An address that lacks the slashes before its host.
_BARE_ADDRESS = re.compile(r"\b(https?:)(?!//)[^\s'\"]+")
_REQUEST_PATH = re.compile(r"(\burl: )/\S*")  # urllib3 logs paths without a host
# A thread that works for one stream or list: its kind, the name, perhaps a word after two hyphens,
# a number, and the suffix of a pool's threads.
_CHANNEL_THREAD = re.compile(r"[A-Za-z]+-([a-z0-9-]+?)(?:--\w+)?-\d+(?:-executor_\d+)?")


class LogFormatter(logging.Formatter):
    """Formats an event as one line, with its channel and without secrets.

    Tracebacks, which add lines of their own, and other libraries' events show only the hosts of
    addresses.  For systemd's journal, each line begins with its priority: the journal reads the
    lines of a traceback one by one, and treats a line without a priority as information.
    """

    def __init__(self, form: str | None = None, *, for_journal: bool = False) -> None:
        super().__init__(form)
        self.secrets = Secrets(())  # a reload replaces it as a whole
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        record.channel = ""
        match = _CHANNEL_THREAD.fullmatch(record.threadName or "")
        if match and not record.getMessage().startswith(f"{match[1]}: "):
            record.channel = f" {match[1]}:"
        text = super().format(record)
        text = self.secrets.hide(text)
        is_ours = record.name == log.name
        if record.exc_info or not is_ours:
            text = _ADDRESS.sub(r"\1\2/...", text)
            text = _BARE_ADDRESS.sub(r"\1...", text)
            text = _REQUEST_PATH.sub(r"\1/...", text)
        lines = [_printable(line) for line in text.split("\n")]
        if self._for_journal:
            priority = journal_priority(record.levelno)
            lines = [priority + line for line in lines]
        return "\n".join(lines)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _printable(super().formatMessage(record))  # one line, even if a client sent more


def journal_priority(level: int) -> str:
    """Return the prefix that gives a line its priority in the journal (sd-daemon(3))."""
    if level >= logging.ERROR:
        return "<3>"
    if level >= logging.WARNING:
        return "<4>"
    if level >= logging.INFO:
        return "<6>"
    return "<7>"


def is_journal(stream: TextIO) -> bool:
    """Whether systemd's journal reads this stream, and adds the time (systemd.exec(5)).

    That JOURNAL_STREAM is set proves nothing: programs inherit it, but may redirect their output.
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # the stream is closed, or is not a file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _printable(text: str) -> str:
    shown = ""
    for letter in text:
        if letter.isprintable():
            shown += letter
        else:
            shown += letter.encode("unicode_escape").decode()
    return shown


class Secrets:
    """Texts that no log may show.

    A list may add tens of thousands of them, so they are indexed by their first characters.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = frozenset(text for text in texts if len(text) >= LEAST_SECRET)
        lengths: dict[str, set[int]] = {}
        for text in self._texts:
            lengths.setdefault(text[:LEAST_SECRET], set()).add(len(text))
        # The lengths of the texts with the same start, longest first.
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def hide(self, text: str) -> str:
        """Replace the secrets in a text by "***"; overlapping secrets are replaced together."""
        parts: list[str] = []
        shown = 0  # the end of the secrets found so far
        for at in range(len(text) - LEAST_SECRET + 1):
            size = self._size_at(text, at)
            if size is None:
                continue
            if at >= shown:
                parts += [text[shown:at], "***"]
            shown = max(shown, at + size)
        return "".join([*parts, text[shown:]])

    def _size_at(self, text: str, at: int) -> int | None:
        """Return the size of the longest secret that begins at index `at`; None if none does."""
        for size in self._lengths.get(text[at : at + LEAST_SECRET], ()):
            if text[at : at + size] in self._texts:
                return size
        return None


def secrets_of(config: Config) -> Secrets:
    """Return all texts of a configuration that no log may show."""
    found: set[str] = set()
    if config.server.token is not None:
        found.add(config.server.token)
    if config.server.epg is not None:
        found |= _secrets_of_address(config.server.epg)
    for guide in config.guides.values():
        found |= _secrets_of_address(guide)
    for playlist in config.playlists.values():
        found |= _secrets_of_settings(playlist, [playlist.url])
    for stream in config.streams.values():
        found |= _secrets_of_settings(stream, stream.urls)
        for address, other in stream.others.items():
            found |= _secrets_of_settings(other, [address])
    found |= {quote(secret, safe="") for secret in found}
    return Secrets(found)


def _secrets_of_settings(
    settings: StreamSettings | PlaylistSettings, addresses: Iterable[str]
) -> set[str]:
    found: set[str] = set()
    options = settings.options.streamlink
    for address in (*addresses, settings.proxy, options.get("http-proxy")):
        if address:
            found |= _secrets_of_address(address)
    found.update(settings.headers.values())
    for option in ("http-headers", "http-cookies", "http-query-params"):
        found.update(options.get(option, {}).values())
    return found


def _secrets_of_address(address: str) -> set[str]:
    """Return the secrets in an address: user, password, query values, query, all after the host.

    The path is not a secret if it has only one part and no query follows.
    """
    # Schemes, a user and password, if any, the host, and the path with the query.
    found = re.match(r"(?:\w+://)*(?:([^/?#]*)@)?[^/?#]*([^#]*)", address)
    assert found  # the pattern matches any text
    user, tail = found.groups("")
    query = tail.partition("?")[2]
    texts = {*user.split(":", 1), *unquote(user).split(":", 1)}
    texts |= {value for _, value in parse_qsl(query)}
    if query or tail.count("/") > 1:
        texts |= {query, tail}
    return texts


class LogHandler(logging.Handler):
    """Hands each line to a thread that writes it, so that no other thread waits for a reader.

    Up to LOG_LINES lines of LOG_BYTES in all may wait.  Beyond that, a new line is dropped, except
    that a warning or an error displaces the oldest line of a lower level.  The next line that is
    written says how many were dropped.  A line that cannot be written (a full disk, a reader that
    left) is dropped, too.

    Any thread may log, and may hold any locks.  Only flush() blocks, for LOG_TIME at most.
    """

    def __init__(self, stream: TextIO) -> None:
        """Log to `stream`; starts the thread, which close() ends."""
        super().__init__()
        self._encoding = stream.encoding
        # Write unbuffered: a buffer would keep a line that failed, and write it with a later one.
        binary = stream.buffer
        self._raw = cast(io.RawIOBase, getattr(binary, "raw", binary))
        # The library's own lock, which its handle() holds, guards the fields below.  It is
        # reentrant: the garbage collector may run a finalizer that logs.  The condition is notified
        # when a line is added or written, and by close().
        self._changed = threading.Condition(self.lock)
        self._waiting: dict[int, deque[tuple[int, bytes]]] = {}  # by level: line number and line
        self._numbers = itertools.count()
        self._lines = 0  # waiting lines
        self._bytes = 0  # of the waiting lines
        self._dropped = 0  # lines dropped since the last one that was written
        self._is_writing = False
        self._is_closed = False
        # Used only by the log's thread.
        self._is_mid_line = False  # whether a write broke off within a line
        threading.Thread(target=self._write_lines, name="log", daemon=True).start()

    # Any thread

    def emit(self, record: logging.LogRecord) -> None:
        """Add a line.  The caller, handle(), holds the lock."""
        try:
            line = self._line_of(record)
        except Exception:  # the arguments do not match the message
            self.handleError(record)
            return
        if self._make_room(record.levelno, len(line)):
            lines = self._waiting.setdefault(record.levelno, deque())
            lines.append((next(self._numbers), line))
            self._lines += 1
            self._bytes += len(line)
            self._changed.notify_all()

    def handleError(self, record: logging.LogRecord) -> None:
        """Log the failure: the library would write to stderr, and block until that is read."""
        place = f"{record.filename}:{record.lineno}"
        self.emit(_own_record(logging.ERROR, f"a log line of {place} cannot be formatted"))

    def flush(self) -> None:
        """Wait until every line is written, for LOG_TIME at most."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._lines or self._is_writing), LOG_TIME)

    def close(self) -> None:
        """Make the thread end once it has written the waiting lines; returns at once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _line_of(self, record: logging.LogRecord) -> bytes:
        """Return a record as bytes to write.

        The record is formatted at once, because a waiting record would keep its traceback alive,
        and with it perhaps a channel's window.
        """
        return f"{self.format(record)}\n".encode(self._encoding, "backslashreplace")

    def _make_room(self, level: int, size: int) -> bool:
        """Return whether a line of this level and size may wait; may drop lesser lines for it."""
        while self._lines >= LOG_LINES or self._bytes + size > LOG_BYTES:
            # A copy, because a finalizer that logs in between may add a level.
            queues = tuple(self._waiting.items())
            lesser = [lines for each, lines in queues if each < level and lines]
            self._dropped += 1
            if level < logging.WARNING or not lesser:
                return False
            self._remove_oldest(lesser)
        return True

    def _remove_oldest(self, queues: Iterable[deque[tuple[int, bytes]]]) -> bytes:
        oldest = min(queues, key=lambda lines: lines[0])
        line = oldest.popleft()[1]
        self._lines -= 1
        self._bytes -= len(line)
        return line

    # The log's thread

    def _write_lines(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closed)
                if not self._lines:
                    return
                queues = tuple(self._waiting.values())
                line = self._remove_oldest([lines for lines in queues if lines])
                dropped, self._dropped = self._dropped, 0
                self._is_writing = True
            if dropped:
                words = f"dropped {_many(dropped, 'log line')}: the log was not read, or was full"
                line = self._line_of(_own_record(logging.WARNING, words)) + line
            is_written = self._write(line)
            with self._changed:
                if not is_written:
                    self._dropped += dropped + 1
                self._is_writing = False
                self._changed.notify_all()

    def _write(self, data: bytes) -> bool:
        """Write all data, blocking until it is accepted; returns False if it cannot be written."""
        if self._is_mid_line:
            data = b"\n" + data
        rest = memoryview(data)
        with contextlib.suppress(OSError, ValueError):  # full, without a reader, or closed
            while rest:
                written = self._raw.write(rest)
                if written is None:  # another process that shares the file has made it non-blocking
                    select.select([], [self._raw], [])
                    continue
                self._is_mid_line = written < len(rest)
                rest = rest[written:]
        return not rest


def _own_record(level: int, words: str) -> logging.LogRecord:
    """A record about the log itself."""
    return logging.LogRecord(log.name, level, __file__, 0, words, None, None)


def set_up_logging(level: str) -> LogFormatter:
    """Log to stderr from a dedicated thread; returns the formatter, whose secrets can be set."""
    if sys.stderr is None:  # closed before the start; a socket must not get its number
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (stays open)
    for_journal = is_journal(sys.stderr)
    form = "%(levelname)s%(channel)s %(message)s"
    if not for_journal:
        form = f"%(asctime)s {form}"

    formatter = LogFormatter(form, for_journal=for_journal)
    handler = LogHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)

    log.setLevel(level.upper())
    engine_level = level
    if level == "info":
        engine_level = "warning"
    logging.getLogger("streamlink").setLevel(engine_level.upper())
    if level != "debug":  # channels log these themselves, once: a failed load, a missing ffmpeg ...
        for name in ("stream.hls", "stream.segmented", "stream.ffmpegmux"):
            logging.getLogger(f"streamlink.{name}").setLevel(logging.CRITICAL)
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)

    # Python's own hooks would write to stderr, and block until that is read.
    threading.excepthook = _log_dead_thread
    sys.unraisablehook = _log_unraisable
    return formatter


def _log_dead_thread(dead: threading.ExceptHookArgs) -> None:
    name = "a thread" if dead.thread is None else dead.thread.name
    log.error("%s died", name, exc_info=dead.exc_value)


def _log_unraisable(failed: sys.UnraisableHookArgs) -> None:
    """Log an error that Python cannot raise, such as one in a finalizer."""
    message = failed.err_msg
    if message is None:
        message = "Exception ignored in"
    log.error("%s %r", message, failed.object, exc_info=failed.exc_value)


# Running

END_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Signals = queue.SimpleQueue[int]  # its put() may be called from a signal handler
LISTEN_ADVICE = {
    errno.EACCES: "a port below 1024 needs root: choose another with --port",
    errno.EADDRNOTAVAIL: "this machine has no such address: --host 0.0.0.0 takes all it has",
}


def serve(
    config: Config,
    received: Signals,
    read_again: Callable[[], Config],
    before_use: Callable[[Config], None],
) -> int:
    """Serve, and block until a signal ends it.  Returns the exit status.

    `read_again` returns the configuration for a reload, or raises ConfigError.  `before_use` is
    called with each configuration before it is used.
    """
    channels = Channels(config)
    try:
        server = Server(config, channels, before_use)
    except (OSError, ValueError, TypeError, OverflowError) as error:  # odd hosts may raise any
        where = f"{config.server.host} port {config.server.port}"
        advice = "choose another with --host or --port"
        if isinstance(error, OSError) and error.errno in LISTEN_ADVICE:
            advice = LISTEN_ADVICE[error.errno]
        log.error("cannot listen on %s: %s; %s", where, error, advice)
        return EXIT_FAILED
    with server:
        accept = server.serve_forever
        threading.Thread(target=accept, args=(0.1,), name="listener", daemon=True).start()
        announce(config, server)
        server.lists.start()
        while next_signal(received) not in END_SIGNALS:
            reload(server, read_again)
        close(server, channels)
    return EXIT_OK


def raise_file_limit() -> None:
    """Raise the limit of open files to the maximum: each viewer needs one, and 1,024 are few."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def release_signals() -> None:
    """Unblock the signals that were held during the start."""
    if HELD_SIGNALS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)


def collect_signals() -> Signals:
    """Return a queue that receives SIGINT, SIGTERM and SIGHUP; releases the signals held so far.

    A second SIGINT or SIGTERM ends the process at once.
    """
    received: Signals = queue.SimpleQueue()

    def exit_at_once(number: int, frame: object) -> None:
        os._exit(EXIT_FAILED)

    def note(number: int, frame: object) -> None:
        if number in END_SIGNALS:
            for each in END_SIGNALS:
                signal.signal(each, exit_at_once)
        received.put(number)

    for number in END_SIGNALS:
        signal.signal(number, note)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, note)
    release_signals()
    return received


def next_signal(received: Signals) -> int:
    """Wait for a signal, waking twice a second.

    The system may deliver a signal to any thread, but Python runs its handler only in the main
    thread, once that thread executes code.  A wait without a time-out would sleep through it.
    """
    while True:
        with contextlib.suppress(queue.Empty):
            return received.get(timeout=0.5)


def reload(server: Server, read_again: Callable[[], Config]) -> None:
    """Read the file again and use it; a file with mistakes changes nothing."""
    try:
        config = read_again()
    except ConfigError as error:
        for mistake in error.mistakes:
            log.error("not reloaded: %s", mistake)
        server.last_reload = Reload(is_successful=False)
        return
    old = server.config
    server.reload(config)
    server.last_reload = Reload(is_successful=True)
    log.info("reloaded: %s", changes_between(old, server.config))


def announce(config: Config, server: Server) -> None:
    """Log the addresses to open, and how many streams are served."""
    settings = config.server
    host = settings.host
    if host in EVERYWHERE:
        host = lan_host(host)
    elif ":" in host:
        host = f"[{host}]"
    own_url = f"http://{host}:{server.port}"
    url = (settings.public_url or own_url).rstrip("/")
    log.info("open %s/ in a browser", url)
    log.info("players: %s/playlist.m3u", url)
    if DEMO_STREAM in config.streams:
        log.info("the test card: %s/%s", url, DEMO_STREAM)
    if settings.token:
        log.info("a token is required: browsers ask for it as the password, "
                 "players need ?token=... at the end of the address")  # fmt: skip
    if not config.streams and not config.playlists:
        log.warning(NO_STREAMS)
    count = _many(len(config.streams), "stream")
    if config.playlists:
        count += f" and {_many(len(config.playlists), 'list')}"
    where = f"{settings.host} port {server.port}"
    log.info("StreamPipe %s: %s, listening on %s", __version__, count, where)


def close(server: Server, channels: Channels) -> None:
    """Disconnect the viewers and stop everything.

    Blocks for about STOP_TIME at most.  If something hangs, the process ends DRAIN_TIME later.
    """
    last_resort = threading.Timer(STOP_TIME + DRAIN_TIME, os._exit, (EXIT_OK,))
    last_resort.daemon = True
    with contextlib.suppress(RuntimeError):  # the system has no threads left
        last_resort.start()
    log.info("shutting down")
    began = time.monotonic()
    server.lists.stop(0.0)
    if not channels.stop(timeout=STOP_TIME):
        log.warning("an upstream did not end in time")
    # For DRAIN_TIME, a load balancer can still learn from /health that the server is stopping.
    time.sleep(max(0.0, began + DRAIN_TIME - time.monotonic()))
    server.shutdown()
    server.hang_up()
    last_resort.cancel()


def check_or_serve(
    arguments: argparse.Namespace, given: Given, demo: str | None, formatter: LogFormatter
) -> int:
    """Read the configuration, then check or serve; returns the exit status.

    `demo` is the address of the demo's stream.  Raises PipeError.
    """
    config = Config()  # the newest one that was read

    def learn(new: Config) -> None:
        formatter.secrets = secrets_of(new)

    def read() -> Config:
        nonlocal config
        new = read_settings(arguments, given, demo)
        had_streams = bool(config.streams or config.playlists)
        has_streams = bool(new.streams or new.playlists)
        if had_streams and not has_streams:  # an editor may empty a file before writing it
            raise ConfigError(["the file no longer has any streams"])
        config = new
        return new

    read()
    learn(config)
    warn_of_unread_file(arguments, given)
    warm_up()
    raise_file_limit()
    if arguments.check:
        release_signals()
        return run_check(config, given.names)
    return serve(config, collect_signals(), read, learn)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    arguments = build_parser().parse_args(argv)
    log_level = arguments.log_level
    if arguments.check:
        log_level = "error"
    formatter = set_up_logging(log_level)
    try:
        check_engine()
        given = read_words(arguments.addresses, arguments.check)
        if not arguments.demo:
            return check_or_serve(arguments, given, None, formatter)
        with demo_origin() as demo:
            return check_or_serve(arguments, given, demo, formatter)
    except ConfigError as error:
        prefix = ""
        if is_journal(sys.stderr):
            prefix = journal_priority(logging.ERROR)
        for mistake in error.mistakes:
            print(prefix + mistake, file=sys.stderr)  # noqa: T201
        return EXIT_USAGE
    except PipeError as error:
        log.error("%s", error)
        return EXIT_FAILED
    except (KeyboardInterrupt, BrokenPipeError):  # a check was interrupted, or its reader left
        return EXIT_FAILED


if __name__ == "__main__":
    status = main()
    logging.shutdown()  # waits for the log's thread, LOG_TIME at most
    with contextlib.suppress(OSError, AttributeError):  # stdout has no reader, or was closed
        sys.stdout.flush()
    os._exit(status)  # sys.exit() would wait for download threads that hang
