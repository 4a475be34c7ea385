"""The client is a distribution of its own that needs only httpx and msgspec."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import strongroom
from strongroom import client as library
from tests.helpers.paths import ROOT

ALONE = """
import sys, sysconfig
from importlib.abc import MetaPathFinder

ALLOWED = {"strongroom_client", "httpx", "httpcore", "msgspec", "h11", "anyio", "idna", "certifi", "sniffio",
           "typing_extensions"}  # httpx and msgspec, and what these need
SITE = sysconfig.get_paths()["purelib"]

class Only(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Only())
sys.path.insert(0, sys.argv[1])
import strongroom_client
from strongroom_client import AsyncClient, Client, InvalidInput, StrongroomError
with Client("http://127.0.0.1:9", "sr_key") as client:
    assert client.keys and client.usage and client.reservations and client.webhooks and client.quotas
AsyncClient("http://127.0.0.1:9")
try:
    Client("ftp://nowhere")
except InvalidInput as error:
    assert isinstance(error, StrongroomError)
else:
    raise AssertionError
try:
    import strongroom
except ModuleNotFoundError:
    pass
print(strongroom_client.__version__, *sorted(strongroom_client.__all__))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="`make .venv/.dev` installs it")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    made = subprocess.run(command, cwd=ROOT / "client", capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    (path,) = folder.iterdir()
    return path


def test_the_client_wheel_needs_only_httpx_and_msgspec(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        told = Parser().parsestr(archive.read(metadata).decode())
    assert [need.partition(">")[0] for need in told.get_all("Requires-Dist", [])] == ["httpx", "msgspec"]
    assert (told["Name"], told["Version"]) == ("strongroom-client", strongroom.__version__)
    assert {name.split("/")[0] for name in names} == {
        "strongroom_client", f"strongroom_client-{strongroom.__version__}.dist-info"
    }  # nothing that the distribution `strongroom` has as well  # fmt: skip
    assert "strongroom_client/py.typed" in names
    assert not any("__pycache__" in name for name in names)


def test_the_client_works_where_nothing_else_is_installed(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    ran = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(installed)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    version, *names = ran.stdout.split()
    assert version == strongroom.__version__
    assert names == sorted(library.__all__)
