"""Google's own Firestore emulator, from the Google Cloud SDK; tests are kept apart by project."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import missing
from tests.helpers.servers import Command, answers, free_port, shared_server

_JAR = Path("platform/cloud-firestore-emulator/cloud-firestore-emulator.jar")
_MAIN = "com.google.cloud.datastore.emulator.firestore.CloudFirestore"


def jar() -> Path:
    """Where the emulator is; the test is skipped, or fails where everything is required, if it is nowhere."""
    gcloud = shutil.which("gcloud")
    roots = [Path(gcloud).resolve().parent.parent] if gcloud else []
    if gcloud and not (roots[0] / _JAR).exists():
        command = [gcloud, "info", "--format=value(installation.sdk_root)"]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        roots.append(Path(asked.stdout.strip()))
    for root in roots:
        if (root / _JAR).exists():
            return root / _JAR
    missing(
        "Google's Firestore emulator",
        "install the Google Cloud SDK with its component cloud-firestore-emulator, and Java 11 or later",
    )


def java() -> str:
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=str(Path(home) / "bin")) if home else shutil.which("java")
    return found or missing("Java, for Google's Firestore emulator", "install a Java 11 runtime or later")


def command(port: int) -> list[str]:
    """How the emulator is started: the program itself, since the SDK's wrapper takes seconds."""
    # One tier of compilation: the emulator lives for minutes, in which optimising its code costs more than it saves.
    options = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xss4m", "-Xmx1500m", "-Duser.language=en"]
    return [java(), *options, "-cp", str(jar()), _MAIN, "--host=127.0.0.1", f"--port={port}"]


def _prepare(folder: Path) -> Command:
    port = free_port()
    return Command(command(port), {"port": port})


def _ready(facts: Mapping[str, Any]) -> bool:
    return answers(facts["port"])


def start(request: pytest.FixtureRequest) -> str:
    """`host:port` of the run's emulator."""
    return f"127.0.0.1:{shared_server(request, 'firestore', _prepare, _ready)['port']}"


def urls(emulator: str) -> Callable[[], str]:
    """Gives, each time, the URL of a new and empty store: a project of its own."""
    run, numbers = secrets.token_hex(4), itertools.count()
    return lambda: f"firestore://p-{run}-{next(numbers)}/(default)?emulator={emulator}"
