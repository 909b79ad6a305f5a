"""A study in PostgreSQL: shared, killed and resumed as in SQLite, with a server that the test starts and stops itself."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from tiny_studies import plain

from attunement.compare import records
from attunement.compare.database import Database
from attunement.compare.engine import Engine
from attunement.compare.study import made
from attunement.errors import AttunementError

PASSWORD = "s3cret/of {mine}@home"
WORK = """
import sys, yaml
from attunement.compare import report, trial
from attunement.compare.engine import Engine
from attunement.compare.study import made
report.write = lambda *_: None
real = trial.run
def run(ground, entry, rate, seed, stage, *more):
    print(entry.label, stage, rate, seed, flush=True)
    return real(ground, entry, rate, seed, stage, *more)
trial.run = run
Engine(made(yaml.safe_load(open(sys.argv[1])), "study")).work()
"""
BEGIN = """
import json, sys
from attunement.compare.database import Database
from attunement.compare.study import made
for line in sys.stdin:
    Database(made(json.loads(line), "study"))
    print("opened", flush=True)
"""


def _program(name: str) -> str | None:
    newest_first = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: -float(path.parts[4]))
    return str(newest_first[0]) if newest_first else shutil.which(name)


def _user() -> str | None:
    """Who runs the server, which refuses to be run by root."""
    if os.geteuid():
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), "")


INITDB, PG_CTL, USER = _program("initdb"), _program("pg_ctl"), _user()
LACKING = [
    *([] if INITDB and PG_CTL else ["initdb and pg_ctl of PostgreSQL (apt-get install postgresql)"]),
    *([] if importlib.util.find_spec("psycopg") else ["its driver psycopg (pip install 'attunement[postgres]')"]),
    *([] if USER != "" else ["a user other than root to run the server"]),
]
pytestmark = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.skipif(bool(LACKING), reason=f"there is no PostgreSQL to test with: {' and '.join(LACKING)} not found"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a database on a server of its own, without the name of the user and the password."""
    folder = Path(tempfile.mkdtemp(prefix="attunement-postgres-"))
    (folder / "password").write_text(PASSWORD)
    if USER:
        shutil.chown(folder, USER)
    folder.chmod(0o755)
    how: dict[str, Any] = {"user": USER, "cwd": folder, "check": True, "timeout": 120}
    how |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    data = ("-D", str(folder / "data"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off -p {port}"
    try:
        login = ("-U", "attune", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}")
        subprocess.run([str(INITDB), *data, *login, "-E", "UTF8", "--locale=C", "--no-sync"], **how)
        subprocess.run([str(PG_CTL), *data, "-w", "-l", str(folder / "log"), "-o", settings, "start"], **how)
        try:
            yield f"127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([str(PG_CTL), *data, "-w", "-m", "immediate", "stop"], **how)
    finally:
        shutil.rmtree(folder)


def figures(folder: Path) -> list[tuple[Any, ...]]:
    found = sorted(records.read(folder).trials, key=lambda one: one.id)
    return [(one.id, one.state, one.rate, one.seed, one.quality, one.calibration, one.curve) for one in found]


def test_it_is_shared_killed_and_resumed_as_in_sqlite(server: str, tmp_path: Path, bert: Path) -> None:
    search = {"trials": 2, "spread": 1, "evaluations": 2, "low": 1e-3, "high": 1e-1, "known": False}
    url = f"postgresql://attune:{quote(PASSWORD, safe='')}@{server}"
    values = plain(tmp_path, bert, search=search, storage=url, output=str(tmp_path / "shared"))
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", WORK, str(file)]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ran, logs = [], ""

    killed = subprocess.Popen(command, **how)
    assert killed.stdout is not None
    for line in killed.stdout:
        ran.append(line)
        if len(ran) == 5:
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait()
    before = {one.id: one.seconds for one in records.read(tmp_path / "shared").trials}
    assert before, "nothing was finished when it was killed"

    both = [subprocess.Popen(command, **how) for _ in range(2)]
    said = [one.communicate(timeout=280)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    logs = "".join([*ran, *said])

    study = made(values, "study")
    after = {one.id: one.seconds for one in records.read(study.folder).trials}
    assert len(after) == 3 * (2 + 2) + 2
    assert {name: after[name] for name in before} == before, "a finished trial was run again"
    alone = study.model_copy(update={"storage": None, "output": str(tmp_path / "alone")})
    Engine(alone).work()
    assert figures(study.folder) == figures(alone.folder)

    Engine(study).end()
    assert "postgresql://attune:***@" in (study.folder / "report.html").read_text(encoding="utf-8")
    written = [path for path in study.folder.rglob("*") if path.is_file()]
    texts = {path.name: path.read_bytes().decode(errors="replace") for path in written} | {"log": logs}
    assert {"study.yaml", "trials.csv", "report.html", "table.csv"} <= set(texts)
    assert [name for name, text in texts.items() if "s3cret" in text] == []


def test_two_processes_may_begin_at_once(server: str, tiny: Any) -> None:
    import psycopg

    study = tiny()
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen([sys.executable, "-c", BEGIN], text=True, **pipes) for _ in range(2)]
    where, _, _ = server.partition("/")
    host, _, port = where.partition(":")
    try:
        with psycopg.connect(host=host, port=port, dbname="postgres", user="attune", password=PASSWORD) as one:
            one.autocommit = True
            for turn in range(4):
                one.execute(f"CREATE DATABASE fresh{turn}")
                url = f"postgresql://attune:{quote(PASSWORD, safe='')}@{where}/fresh{turn}"
                line = json.dumps(study.plain() | {"storage": url})
                for process in both:
                    process.stdin.write(f"{line}\n")
                    process.stdin.flush()
                assert [process.stdout.readline() for process in both] == ["opened\n"] * 2
    finally:
        said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said


def test_the_password_may_stay_out_of_the_address(server: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    base = Database(tiny(name="quiet", storage=f"postgresql://attune@{server}"))
    assert base.head.user_attrs["settings"]["storage"] == f"postgresql://attune@{server}"


@pytest.mark.parametrize(
    ("user", "where", "said"),
    [
        ("attune:s3cret-of-another@", "", "password authentication failed"),
        ("attune:" + quote(PASSWORD, safe="") + "@", "/nothing", 'database "nothing" does not exist'),
        ("attune:s3cret@", "x", "cannot be opened"),
        ("", "?user=attune&password=s3cret", "password authentication failed"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence_without_the_password(
    server: str, tiny: Any, user: str, where: str, said: str
) -> None:
    place = server.replace("/postgres", where) if where.startswith("/") else server + where
    place = place.replace("/postgresx", "x/postgres")  # a port that is no number
    with pytest.raises(AttunementError, match=said) as caught:
        Database(tiny(storage=f"postgresql://{user}{place}"))
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "***" in str(caught.value)
