"""The files of `infra/`: Prometheus accepts the alerts, they fire at their thresholds, and each metric exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.helpers.issuer import Issuer
from tests.helpers.paths import ROOT
from tests.helpers.server_process import running

ALERTS = ROOT / "infra" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "infra" / "grafana" / "strongroom.json"
_METRIC = re.compile(r"\bstrongroom_\w+")


def promtool(*arguments: str, folder: Path = ALERTS.parent) -> subprocess.CompletedProcess[str]:
    command = shutil.which("promtool")
    if command is None:
        missing("promtool", "install Debian's package prometheus")
    return subprocess.run([command, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_prometheus_accepts_the_alerts() -> None:
    checked = promtool("check", "rules", ALERTS.name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_above_its_threshold_and_not_below() -> None:
    tested = promtool("test", "rules", "alerts_test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_an_alert_with_another_threshold_fails_its_test(tmp_path: Path) -> None:
    """So that the test above is known to be able to fail."""
    text = ALERTS.read_text()
    assert "> 0.5" in text
    (tmp_path / "alerts.yml").write_text(text.replace("> 0.5", "> 5"))
    shutil.copy(ALERTS.with_name("alerts_test.yml"), tmp_path)
    assert promtool("test", "rules", "alerts_test.yml", folder=tmp_path).returncode == 1


@pytest.mark.parametrize("path", [ALERTS, DASHBOARD], ids=lambda path: path.name)
def test_each_metric_that_is_named_is_in_a_scrape(path: Path, tmp_path: Path) -> None:
    named = {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in _METRIC.findall(_expressions(path))}
    assert named
    issuer = Issuer(url=str(tmp_path / "jwks.json"))
    Path(issuer.url).write_text(json.dumps({"keys": issuer.keys}))
    with running(tmp_path, **issuer.environment()) as server, server.client() as client:
        scraped = client.get("/metrics").text
    known = {line.split()[2] for line in scraped.splitlines() if line.startswith("# TYPE")}
    assert named - known == set()


def _expressions(path: Path) -> str:
    if path == ALERTS:
        return path.read_text()
    panels = json.loads(path.read_text())["panels"]
    return "\n".join(target["expr"] for panel in panels for target in panel["targets"])
