"""Downloads that break, from a real server on this machine."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from dichroic.benchmark.problems.download import Patience, download
from dichroic.benchmark.problems.remote import DATA_VARIABLE, RemoteFile, fetch
from dichroic.errors import DataError, RunError

CONTENT = np.random.default_rng(0).bytes(300_000)
QUICK = Patience(tries=3, wait=0.0, silence=20.0)


class Server(ThreadingHTTPServer):
    """Serves `content` at any address; the answers of the first requests are cut after `cuts` bytes of a body.

    `ranges` says whether it sends parts; `chunked`, whether it leaves out the length. `refusals` are answered
    first. A negative cut is that of a server that falls silent instead. `asked` holds the ranges asked for.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.ranges, self.chunked = CONTENT, [], True, False
        self.refusals, self.asked, self.over = [], [], threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if server.refusals:
            self.send_error(server.refusals.pop(0))
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        size = len(server.content)
        if start >= size:
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        head = f"{len(body):x}\r\n".encode() if server.chunked else b""
        self.wfile.write(head + body[: None if cut is None else abs(cut)])
        if cut is None and server.chunked:
            self.wfile.write(b"\r\n0\r\n\r\n")
        if cut is not None:
            self.wfile.flush()
            if cut < 0:
                server.over.wait(60)
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "file.bin"


def go(server, target, content=CONTENT, patience=QUICK):
    digest = hashlib.sha256(content).hexdigest()
    download(server.url, target, size=len(content), sha256=digest, patience=patience)


def part(target):
    return target.with_name(".file.bin.part")


def bare(target):
    """What is in the folder besides the file that a process holds while it fetches."""
    return sorted(p.name for p in target.parent.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_whole_file_takes_one_request(server, target, chunked):
    server.chunked = chunked
    go(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None]
    assert bare(target) == ["file.bin"]
    go(server, target)
    assert len(server.asked) == 1, "what is there is not fetched again"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("cuts", [[0], [1], [65_536, 100_000], [299_999]])
def test_a_connection_that_is_cut_goes_on_where_it_was(server, target, cuts, chunked):
    server.cuts, server.chunked = list(cuts), chunked
    go(server, target)
    assert target.read_bytes() == CONTENT
    ends = [int(n) for n in np.cumsum(cuts)]
    assert server.asked == [None, *(f"bytes={n}-" if n else None for n in ends)]


@pytest.mark.parametrize("cuts", [[1], [65_536, 100_000], [299_999, 299_998]])
def test_a_server_without_ranges_is_asked_for_all_of_it(server, target, cuts):
    server.cuts, server.ranges = list(cuts), False
    go(server, target)
    assert target.read_bytes() == CONTENT
    assert len(server.asked) == 1 + len(cuts)


def test_a_file_that_keeps_breaking_off_says_how_much_came_and_the_next_call_goes_on(
    server, target
):
    server.cuts = [100_000, 50_000, 25_000]
    said = r"^175,000 of 300,000 bytes came from http:.* in 3 tries \(the connection was cut\); .*goes on"
    with pytest.raises(DataError, match=said):
        go(server, target)
    assert bare(target) == [".file.bin.part"]
    assert part(target).read_bytes() == CONTENT[:175_000]
    go(server, target)
    assert server.asked[3:] == ["bytes=175000-"]
    assert target.read_bytes() == CONTENT
    assert bare(target) == ["file.bin"]


def test_a_server_that_falls_silent_is_asked_again(server, target):
    server.cuts = [-100_000, -50_000]
    go(server, target, patience=Patience(3, 0.0, silence=0.3))
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_waits_between_tries_double(server, target, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.cuts = [1, 1, 1]
    go(server, target, patience=Patience(tries=4, wait=0.5))
    assert waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("cuts", [[], [100_000]])
def test_wrong_bytes_are_an_error_and_are_not_kept(server, target, cuts):
    server.content, server.cuts = CONTENT[:-1] + b"?", cuts
    assert server.content != CONTENT
    with pytest.raises(DataError, match="is not what it was: 300,000 bytes with SHA-256.*nothing"):
        go(server, target)
    assert bare(target) == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_an_error(server, target, change, chunked):
    """Without a stated length, one that is too short looks like one that breaks off."""
    server.content = (CONTENT + b"?")[: len(CONTENT) + change]
    server.chunked = chunked
    said = "bytes came" if chunked and change < 0 else "is not what it was"
    with pytest.raises(DataError, match=said):
        go(server, target)
    assert not target.exists()


def test_the_page_of_a_network_that_wants_a_password_takes_nothing_away(server, target):
    server.cuts = [100_000] * 3
    server.ranges = False
    with pytest.raises(DataError):
        go(server, target)
    server.content = b"<html>please log in</html>"
    with pytest.raises(DataError, match="is not what it was: 26 bytes, expected 300,000"):
        go(server, target)
    assert part(target).read_bytes() == CONTENT[:100_000]


def test_a_part_that_is_damaged_is_found_out_and_gone(server, target):
    target.parent.mkdir()
    part(target).write_bytes(b"?" + CONTENT[1:200_000])
    with pytest.raises(DataError, match="is not what it was"):
        go(server, target)
    assert bare(target) == []
    go(server, target)
    assert target.read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_no_request_and_one_too_long_is_let_go(server, target):
    target.parent.mkdir()
    part(target).write_bytes(CONTENT)
    go(server, target)
    assert (server.asked, target.read_bytes()) == ([], CONTENT)
    target.unlink()
    part(target).write_bytes(CONTENT + b"?")
    go(server, target)
    assert (server.asked, target.read_bytes()) == ([None], CONTENT)


def test_a_server_that_has_no_more_is_asked_for_all_of_it(server, target):
    server.refusals = [416]
    target.parent.mkdir()
    part(target).write_bytes(CONTENT[:1000])
    go(server, target)
    assert server.asked == ["bytes=1000-", None]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(("code", "requests"), [(503, 3), (404, 1), (403, 1)])
def test_only_passing_troubles_of_a_server_are_worth_another_try(server, target, code, requests):
    server.refusals = [code] * 9
    with pytest.raises(DataError, match=f"it could not be fetched from http.*{code}"):
        go(server, target)
    assert len(server.asked) == requests
    assert bare(target) == []


def test_a_full_disk_is_an_error_that_is_not_tried_again(server, target, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*\.part: No space left"):
        go(server, target)
    assert len(server.asked) == 1


ONE = """
import sys
from pathlib import Path
from dichroic.benchmark.problems.download import Patience, download
url, target, size, sha256 = sys.argv[1:]
download(url, Path(target), size=int(size), sha256=sha256, patience=Patience(wait=0.0))
"""


def process(server, target, **options):
    digest = hashlib.sha256(CONTENT).hexdigest()
    words = [server.url, str(target), str(len(CONTENT)), digest]
    return subprocess.Popen([sys.executable, "-c", ONE, *words], **options)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def length(target):
    return part(target).stat().st_size if part(target).exists() else 0


def test_a_process_that_is_killed_leaves_its_part_to_the_next(server, target):
    server.cuts = [-150_000]
    first = process(server, target)
    try:
        wait_for(lambda: length(target) == 150_000)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not target.exists()
    assert process(server, target).wait(60) == 0
    assert server.asked == [None, "bytes=150000-"]
    assert target.read_bytes() == CONTENT
    assert bare(target) == ["file.bin"]


def test_ctrl_c_leaves_the_part(server, target, monkeypatch):
    server.cuts = [150_000]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(server, target)
    assert part(target).read_bytes() == CONTENT[:150_000]


def test_two_processes_fetch_once(server, target):
    """The second waits for the first, which waits for a server that is silent, and takes what it left."""
    server.cuts = [-150_000]
    first = process(server, target)
    second = None
    try:
        wait_for(lambda: length(target) == 150_000)
        second = process(server, target)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1.5)
        assert server.asked == [None], "the second asks for nothing while the first fetches"
        server.over.set()
        assert (first.wait(60), second.wait(60)) == (0, 0)
    finally:
        for each in filter(None, (first, second)):
            each.kill()
            each.wait()
    assert server.asked == [None, "bytes=150000-"]
    assert target.read_bytes() == CONTENT


def test_the_error_of_a_data_set_says_where_to_put_the_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    server.cuts = [100_000]
    file = RemoteFile("x.bin", server.url, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    with pytest.raises(
        DataError,
        match=r"x\.bin is not in .*: 100,000 of 300,000 bytes came.*--data-dir.*DICHROIC_DATA",
    ):
        fetch(file, patience=Patience(tries=1))
    assert fetch(file).read_bytes() == CONTENT
