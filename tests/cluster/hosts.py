"""Several hosts on this machine: each has its own network, processes, `/tmp`, home folder and a real sshd."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from tests.cluster.slurm_cluster import die_with_parent, wait_for
from tests.conftest import missing
from tests.train.commands import ROOT

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter")
_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
_NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")

# The first process of a host. Arguments: its folder, its name, the command of its sshd, and what it is to see even if
# that lies in /tmp. All that is mounted here, this host alone sees, and it ends with the host.
_INIT = """\
set -e
folder=$1; hostname "$2"; sshd=$3; shift 3
mount -t tmpfs tmpfs "$folder/tmp"
for kept in "$@"; do
  case $kept in /tmp/*) mkdir -p "$folder$kept"; mount --bind "$kept" "$folder$kept" ;; esac
done
for file in passwd shadow hosts resolv.conf; do mount --bind "$folder/$file" "/etc/$file"; done
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mount --move "$folder/tmp" /tmp
chmod 1777 /tmp
mount --bind "$folder/home" "${folder%/*}/home"
ip link set lo up
touch "$folder/ready"
exec $sshd
"""
_SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
"""


@contextmanager
def hosts_with_ssh(folder: Path, names: Sequence[str]) -> Iterator[Hosts]:
    """`Hosts`, or what is missing for them."""
    if os.geteuid() != 0:
        missing("hosts in network namespaces left out: they need root")
    absent = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if absent:
        missing(f"hosts left out: {', '.join(absent)} not installed (bash .ci/system-packages names the packages)")
    with Hosts(folder, names) as hosts:
        yield hosts


class Hosts:
    """Use as a context manager: every process in the hosts ends with it, and with them networks and mounts.

    Args:
        folder: for keys, logs, home folders.
        names: hosts that can be reached by SSH as root, with the key in `key`.

    Attributes:
        address: IP address by name. One more host, "desk", is where `run` calls commands.
        key: file of the private key.
        home: path of the home folder, the same in all hosts, and another folder in each.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.address = {name: f"10.231.0.{10 + i}" for i, name in enumerate(("desk", *names))}
        self.key = folder / "key"
        self.home = folder / "home"
        self._first: dict[str, int] = {}  # process id, as seen from outside, of the first process in each host
        self._stack = ExitStack()

    def __enter__(self) -> Hosts:
        with self._stack:
            self.home.mkdir()
            for key in ("key", "host_key"):
                _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
            (self.folder / "sshd_config").write_text(_SSHD.format(folder=self.folder))
            for name in self.address:
                self._start(name)
            for name in self.address:
                self._connect(name)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, name: str) -> None:
        own = self.folder / name
        for part in ("tmp", "home"):
            (own / part).mkdir(parents=True)
        users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
        (own / "home" / ".bashrc").touch()
        (own / "passwd").write_text("\n".join([f"root:x:0:0:root:{self.home}:/bin/bash", *users, ""]))
        (own / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        (own / "resolv.conf").touch()  # no name server: none would answer, which takes seconds for every name
        known = "".join(f"{address} {host}\n" for host, address in self.address.items())
        (own / "hosts").write_text("127.0.0.1 localhost\n" + known)
        # sshd, as the first process of a host, buries the orphans there.
        sshd = f"{shutil.which('sshd', path=_PATH)} -D -E {own}/sshd.log -f {self.folder}/sshd_config"
        seen = (self.folder, ROOT, sys.prefix, sys.base_prefix)
        host = subprocess.Popen(
            ["unshare", *_NAMESPACES, "--mount-proc", "--kill-child", "bash", "-c", _INIT, "init", own, name, sshd]
            + [str(path) for path in seen],
            stdin=subprocess.DEVNULL,
            env={"PATH": _PATH},
            preexec_fn=die_with_parent,
        )
        self._stack.callback(host.wait)
        self._stack.callback(host.kill)

        def first() -> int | None:
            assert host.poll() is None, f"{name} did not start"
            return psutil.Process(host.pid).children()[0].pid if (own / "ready").exists() else None

        self._first[name] = wait_for(first, f"{name} has started", self.logs, seconds=30) or 0

    def _connect(self, name: str) -> None:
        """A cable to the switch, which stands on the desk."""
        desk, net = self._inside("desk", "--net"), self._inside(name, "--net")
        if name == "desk":
            _run(*desk, "ip", "link", "add", "lan", "type", "bridge")
        else:
            peer = ("peer", "name", "lan", "netns", str(self._first[name]))
            _run(*desk, "ip", "link", "add", name, "type", "veth", *peer)
            _run(*desk, "ip", "link", "set", name, "master", "lan", "up")
        _run(*net, "ip", "address", "add", f"{self.address[name]}/24", "dev", "lan")
        _run(*net, "ip", "link", "set", "lan", "up")
        # Programs find their address by asking for the way to somewhere outside, though they send nothing there.
        _run(*net, "ip", "route", "add", "default", "via", self.address["desk"])

    def _inside(self, name: str, *namespaces: str) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self._first[name]), *namespaces)

    def run(self, *command: object, env: Mapping[str, str] | None = None, timeout: float = 300) -> str:
        """What a command prints that is called on the desk, in the checkout."""
        home = {"HOME": str(self.home), "PATH": _PATH, "USER": "root", "LANG": "C.UTF-8"}
        line = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(map(str, command))}"
        inside = self._inside("desk", *_NAMESPACES)
        try:
            done = subprocess.run(
                [*inside, "bash", "-c", line],
                env=home | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{line}: not within {timeout} s\n{error.stdout!r}\n{self.logs()}") from None
        assert done.returncode == 0, f"{line}: exit status {done.returncode}\n{done.stdout}\n{self.logs()}"
        return done.stdout

    def processes(self, name: str) -> list[str]:
        """Command lines of all processes of a host."""
        namespace = _pid_namespace(self._first[name])
        every = psutil.process_iter(["cmdline"])
        return [
            " ".join(process.info["cmdline"] or []) for process in every if _pid_namespace(process.pid) == namespace
        ]

    def logs(self) -> str:
        """The ends of the logs of all hosts."""
        found = []
        for name in self.address:
            seen = Path(f"/proc/{self._first.get(name, 0)}/root")
            files = [*seen.glob("tmp/ray/session_2*/logs/*.*"), self.folder / name / "sshd.log"]
            found += [(name, file) for file in files if file.is_file() and file.stat().st_size]
        return "\n".join(f"== {name} {file.name}\n{file.read_text(errors='replace')[-1500:]}" for name, file in found)


def _run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], env={"PATH": _PATH}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _pid_namespace(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink()
    except OSError:
        return None
