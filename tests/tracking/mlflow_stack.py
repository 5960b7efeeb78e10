"""MLflow as a team has it: `mlflow server` on PostgreSQL, with its artifacts in S3. All of it real."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.conftest import missing
from tests.s3_server import S3Server
from tests.tracking.conftest import MlflowServer, free_port

# PostgreSQL refuses to run as root.
_USER = "nobody"


class Postgres:
    """A PostgreSQL server with one empty database. Use as a context manager.

    Attributes:
        uri: the database, as MLflow wants it.
    """

    def __enter__(self) -> Postgres:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not programs:
            missing("PostgreSQL left out: there are no programs in /usr/lib/postgresql/*/bin")
        self._programs = programs[-1]
        # Not in a test's own folder: those are closed to other users.
        self._folder = tempfile.TemporaryDirectory(prefix="postgres-")
        self._as_user: dict[str, object] = {}
        if os.geteuid() == 0:
            entry = pwd.getpwnam(_USER)
            os.chown(self._folder.name, entry.pw_uid, entry.pw_gid)
            self._as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        port, data = free_port(), Path(self._folder.name, "data")
        # Nothing in it outlives the test: no flushing to the disk.
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._run("initdb", "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync", "-E", "UTF8")
        self._run("pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", settings, "start")
        self._run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "mlflow", "mlflow")
        self.uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
        return self

    def __exit__(self, *_: object) -> None:
        self._run("pg_ctl", "-D", Path(self._folder.name, "data"), "-w", "-m", "immediate", "stop")
        self._folder.cleanup()

    def _run(self, program: str, *args: object) -> None:
        command = [str(self._programs / program), *map(str, args)]
        # A file and no pipe: the server keeps it open.
        with tempfile.TemporaryFile() as log:
            done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as_user)  # type: ignore[call-overload]
            log.seek(0)
            if done.returncode:
                missing(f"PostgreSQL: {program} failed: {log.read().decode(errors='replace')[-1000:]}")


class Stack(MlflowServer):
    """The server with all behind it; `stop` and `start` leave the database and the artifacts alone."""

    def __enter__(self) -> Stack:
        with ExitStack() as services:
            self._database = services.enter_context(Postgres()).uri
            s3 = services.enter_context(S3Server(self.folder))
            self.s3_port = s3.port
            services.callback(self.stop)
            self.start()
            self._services = services.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._services.close()

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--workers", "1", "--backend-store-uri", self._database),
            *("--artifacts-destination", "s3://bucket/mlflow"),
        ]

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
