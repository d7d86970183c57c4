"""Where the texts come from: packages of Debian 12 and sources from PyPI, fetched by apt and pip.

Debian's are fetched with a state of their own, below the folder given: the machine's own lists of sources and
of installed packages are neither read nor changed, and any Debian or Ubuntu gives the same files.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stack import StackError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_CONFIGURATION = """\
Dir::State "{state}";
Dir::State::lists "{state}/lists";
Dir::State::status "{state}/status";
Dir::Cache "{state}/cache";
Dir::Etc::sourcelist "{state}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "/dev/null";
APT::Architecture "amd64";
APT::Architectures {{"amd64";}};
APT::Sandbox::User "root";
Acquire::Languages {{"en"; "de";}};
Debug::NoLocking "true";
"""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A package, under which licence it comes, and what is taken from it."""

    name: str
    licence: str
    what: str


DEBIAN = (
    Origin(name="doc-rfc-std", licence="IETF Trust: BCP 78, unmodified copies (non-free)", what="standards"),
    Origin(
        name="doc-rfc-informational",
        licence="IETF Trust: BCP 78, unmodified copies (non-free)",
        what="informational RFCs",
    ),
    Origin(name="libpython3.11-stdlib", licence="PSF-2.0", what="functions with docstrings"),
    Origin(name="libpython3.11-minimal", licence="PSF-2.0", what="functions with docstrings"),
    Origin(name="python3.11-doc", licence="PSF-2.0", what="pages, to pretrain on"),
    Origin(name="dict-foldoc", licence="GFDL-1.1+", what="entries, to pretrain on"),
    Origin(name="dict-gcide", licence="GPL-2+", what="entries, to pretrain on"),
)
LISTS = (
    Origin(
        name="Packages, Translation-en, Translation-de of main",
        licence="each description as its package; DDTP translations: GPL-2",
        what="descriptions, sections, debtags, German descriptions",
    ),
)
PYPI = (
    Origin(
        name="vaderSentiment==3.3.2",
        licence="MIT; the sentences are of Rotten Tomatoes, the New York Times, Amazon and Twitter",
        what="sentences with the mean of 20 readers' ratings",
    ),
    Origin(name="probablepeople==0.5.6", licence="MIT", what="names, labelled by hand"),
    Origin(name="usaddress==0.5.16", licence="MIT", what="addresses, labelled by hand"),
)


def fetch(folder: Path) -> list[dict[str, str]]:
    """Downloads and unpacks every package, or does nothing where that has been done.

    Args:
        folder: Gets `debian/` (files as they would be installed), `lists/` (apt's lists) and a folder for
            each package of PyPI.

    Returns:
        What was fetched: name, version, SHA-256, licence and use of each package.

    Raises:
        StackError: If apt, dpkg-deb, Debian's keyring or a package is missing.
    """
    record = folder / "packages.json"
    if record.exists():
        return json.loads(record.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*_debian(folder.resolve()), *_pypi(folder.resolve())]
    record.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _debian(folder: Path) -> list[dict[str, str]]:
    if not KEYRING.exists():
        raise StackError(
            f"{KEYRING} is missing: install debian-archive-keyring on a Debian or Ubuntu machine"
        )
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "sources.list").write_text(
        f"deb [signed-by={KEYRING}] http://deb.debian.org/debian bookworm main non-free\n"
    )
    configuration = state / "apt.conf"
    configuration.write_text(_CONFIGURATION.format(state=state))
    archives = state / "cache"
    _run(["apt-get", "-q", "update"], configuration, archives)
    _run(["apt-get", "-q", "download", *(origin.name for origin in DEBIAN)], configuration, archives)
    rows = []
    for origin in DEBIAN:
        (path,) = archives.glob(f"{origin.name}_*.deb")
        _run(["dpkg-deb", "-x", str(path), str(folder / "debian")], configuration, archives)
        rows.append(_row(origin, path.name.split("_")[1], path))
    lists = folder / "lists"
    lists.mkdir(exist_ok=True)
    for name in ("binary-amd64_Packages", "i18n_Translation-en", "i18n_Translation-de"):
        (path,) = (state / "lists").glob(f"*_main_{name}")
        kept = path.rename(lists / name)
        rows.append(_row(LISTS[0], f"bookworm {name}", kept))
    return rows


def _pypi(folder: Path) -> list[dict[str, str]]:
    sources = folder / "pypi"
    rows = []
    for origin in PYPI:
        name, version = origin.name.split("==")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name]
        _run([*pip, "-d", str(sources), origin.name], None, folder)
        (path,) = (
            path for path in sources.iterdir() if path.name.lower() == f"{name}-{version}.tar.gz".lower()
        )
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        (folder / f"{name}-{version}").rename(folder / name)
        rows.append(_row(origin, version, path))
    return rows


def _row(origin: Origin, version: str, path: Path) -> dict[str, str]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return asdict(origin) | {"name": origin.name.split("==")[0], "version": version, "sha256": digest}


def _run(command: Sequence[str], configuration: Path | None, folder: Path) -> None:
    env = (
        None
        if configuration is None
        else {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "APT_CONFIG": str(configuration)}
    )
    try:
        subprocess.run(command, check=True, env=env, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise StackError(f"{command[0]} is missing: the sets are made on Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise StackError(f"{' '.join(command)}: {lines[-1]}") from None
