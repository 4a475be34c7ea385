"""The lease log: the usage of a killed process is known exactly, and no other process's log is touched."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from strongroom.limits import lease_log as spendlog
from strongroom.limits.lease_log import MIN_COMPACTED, DeadLeaseLog, LeaseLog, dead_logs, folder_for
from tests.helpers.paths import HELPERS

WORKER = HELPERS / "lease_log_worker.py"


def found_in(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """What the logs of dead processes say; the logs stay."""
    found = {}
    for dead in list(dead_logs(folder)):
        found.update(dead.found)
        dead.leave()
    return found


def dead(folder: Path) -> DeadLeaseLog:
    (only,) = list(dead_logs(folder))
    return only


@pytest.mark.parametrize("lines", [1, 50, 2_000])
def test_the_lease_log_of_a_killed_process_is_exact_within_one_call(tmp_path: Path, lines: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(WORKER), str(tmp_path), "lse_1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(lines)]
        assert list(dead_logs(tmp_path)) == [], "its process lives"
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    log = dead(tmp_path)
    spent = [log.found[id]["tokens|total"] for id in ("key_1", "key_2")]
    assert max(spent)[0] in (said[-1], said[-1] + 1)
    assert abs(spent[0][0] - spent[1][0]) <= 1
    assert all(moment in (units, units + 2) for units, moment in spent)  # the moment is written first
    assert log.lease == "lse_1"
    log.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_lease_log_of_a_live_process_is_left_alone(tmp_path: Path) -> None:
    log = LeaseLog("lse_1", tmp_path)
    log.cells[log.slot("a", "l")] = 5
    assert found_in(tmp_path) == {}
    log.abandon()
    assert found_in(tmp_path) == {"a": {"l": (5, 0)}}


def test_a_dead_processs_lease_log_is_claimed_by_one_node(tmp_path: Path) -> None:
    LeaseLog("lse_1", tmp_path).abandon()
    first = dead(tmp_path)
    assert list(dead_logs(tmp_path)) == []
    first.leave()
    second = dead(tmp_path)
    second.remove()
    assert list(dead_logs(tmp_path)) == []


def test_a_reused_slot_starts_at_zero(tmp_path: Path) -> None:
    log = LeaseLog("lse_1", tmp_path)
    slot = log.slot("a", "l")
    log.moment(slot, 9)
    log.cells[slot] = 700
    log.free(slot)
    assert log.slot("b", "l") == slot
    log.abandon()
    assert found_in(tmp_path)["b"] == {"l": (0, 0)}


def test_of_two_leases_of_one_subject_the_last_counts(tmp_path: Path) -> None:
    log = LeaseLog("lse_1", tmp_path)
    first = log.slot("a", "l")
    log.cells[first] = 3
    log.free(first)
    other = log.slot("b", "l")
    log.cells[other] = 8
    log.cells[log.slot("a", "l")] = 4
    log.abandon()
    assert found_in(tmp_path) == {"a": {"l": (4, 0)}, "b": {"l": (8, 0)}}


def test_a_lease_log_of_another_boot_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not on the disk when the machine went down is lost; its leases count as spent."""
    log = LeaseLog("lse_1", tmp_path)
    log.cells[log.slot("a", "l")] = 5
    log.abandon()
    monkeypatch.setattr(spendlog, "boot_id", lambda: "another")
    assert dead(tmp_path).found == {}


@pytest.mark.parametrize("torn", [b'["b", "l', b"[", b'["b", "l", "x"]', b"\xff", b"7"])
def test_a_partial_write_hides_no_other_line(tmp_path: Path, torn: bytes) -> None:
    log = LeaseLog("lse_1", tmp_path)
    log.cells[log.slot("a", "l")] = 5
    log.abandon()
    with (tmp_path / "lse_1.names").open("ab") as names:
        names.write(torn)
    assert found_in(tmp_path) == {"a": {"l": (5, 0)}}


@pytest.mark.parametrize("damage", ["empty names", "no cells", "short cells", "other cells", "index"])
def test_a_damaged_lease_log_is_ignored(tmp_path: Path, damage: str) -> None:
    log = LeaseLog("lse_1", tmp_path)
    log.cells[log.slot("a", "l")] = 5
    log.abandon()
    names, spent = tmp_path / "lse_1.names", tmp_path / "lse_1.spent"
    match damage:
        case "empty names":
            names.write_bytes(b"")
        case "no cells":
            spent.unlink()
        case "short cells":
            spent.write_bytes(spent.read_bytes()[:11])
        case "other cells":
            spent.write_bytes(bytes(64))
        case "index":
            names.write_bytes(names.read_bytes().split(b"\n")[0] + b'\n["a", "l", 99999999]\n')
    assert found_in(tmp_path) == {}


def test_a_growing_lease_log_keeps_every_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spendlog, "FIRST_SLOTS", 2)
    for folder in (tmp_path, None):
        log = LeaseLog("lse_1", folder)
        slots = {}
        for number in range(40):
            slots[number] = log.slot(f"a{number}", "l")
            log.cells[slots[number]] = number + 1
        assert [log.cells[slots[number]] for number in range(40)] == list(range(1, 41))
        log.abandon()
    assert found_in(tmp_path) == {f"a{number}": {"l": (number + 1, 0)} for number in range(40)}


def test_leases_that_come_and_go_do_not_fill_the_disk(tmp_path: Path) -> None:
    log = LeaseLog("lse_1", tmp_path)
    kept = log.slot("kept", "l")
    log.cells[kept] = 17
    line = len(json.dumps(["account-00000", "l", 10_000])) + 1
    for number in range(3 * MIN_COMPACTED):
        log.free(log.slot(f"account-{number:05}", "l"))
        if number % 1_000 == 0:
            assert list(dead_logs(tmp_path)) == [], "locked all the time"
    assert (tmp_path / "lse_1.names").stat().st_size <= (MIN_COMPACTED + 10) * line
    log.abandon()
    assert found_in(tmp_path)["kept"] == {"l": (17, 0)}
    dead(tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_a_replaced_lease_log_does_not_take_its_process_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LeaseLog("lse_1", tmp_path)
    opened = os.open

    def then_compacted(path: Path, flags: int, *more: int) -> int:
        descriptor = opened(path, flags, *more)
        monkeypatch.setattr(os, "open", opened)
        log.compact()
        return descriptor

    monkeypatch.setattr(os, "open", then_compacted)
    assert list(dead_logs(tmp_path)) == []
    log.close()


def test_a_graceful_stop_leaves_no_lease_log(tmp_path: Path) -> None:
    log = LeaseLog("lse_1", tmp_path / "new")
    log.slot("a", "l")
    log.close()
    assert list((tmp_path / "new").iterdir()) == []


def test_lease_logs_are_private_to_their_user(tmp_path: Path) -> None:
    log = LeaseLog("lse_1", tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o600}
    log.close()


def test_an_unwritable_folder_is_logged_and_leases_work_without_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    log = LeaseLog("lse_1", tmp_path / "file" / "leases")
    assert "come back late" in caplog.text
    slot = log.slot("a", "l")
    log.cells[slot] = 3
    assert log.cells[slot] == 3
    log.close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [("sqlite:///data/s.db", "data/s.db.leases"), ("json:////abs/a%20b.json", "/abs/a b.json.leases")],
)
def test_the_lease_log_of_an_embedded_store_is_beside_its_file(url: str, expected: str) -> None:
    assert folder_for(url) == Path(expected)


def test_the_lease_log_of_a_server_store_does_not_contain_its_password() -> None:
    here = folder_for("postgresql://u:one@h/db")
    assert here == folder_for("postgresql://u:two@h/db") != folder_for("postgresql://u:one@h/other")
    assert "one" not in str(here).split("/")[-1]
    assert folder_for("json://:memory:") is None
    assert folder_for("json://:memory:", "x") == Path("x")


@pytest.mark.parametrize("what", ["names", "cells"])
def test_a_lease_log_that_can_no_longer_be_written_never_understates_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    log = spendlog.LeaseLog("lse_full", tmp_path)
    first = log.slot("key_1", "tokens|total")
    log.cells[first] = 70

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(*((spendlog, "_write") if what == "names" else (os, "posix_fallocate")), full)
    slots = [log.slot("key_2", f"r{number}|total") for number in range(spendlog.FIRST_SLOTS + 1)]
    log.cells[slots[-1]] = 5
    assert (log.cells[first], log.cells[slots[-1]]) == (70, 5), "the process goes on, with what it knows"
    log.abandon()
    assert list(spendlog.dead_logs(tmp_path)) == []


# --- Whose folder it is ---------------------------------------------------------------------------------------


def killed(folder: Path) -> None:
    """Leave the log of a process that is dead."""
    log = LeaseLog("lse_1", folder)
    log.cells[log.slot("key_a", "tokens")] = 7
    log.abandon()


def test_a_folder_of_the_own_user_is_trusted(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)  # as /tmp is
    killed(shared / "ours")
    (tmp_path / "link").symlink_to(shared)
    assert found_in(tmp_path / "link" / "ours") == {"key_a": {"tokens": (7, 0)}}


@pytest.mark.parametrize("mode", [0o777, 0o757])
@pytest.mark.parametrize("which", ["", "a", "a/b"])
def test_a_folder_is_not_trusted_if_others_can_write_on_its_path(
    mode: int, which: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    top = tmp_path / "top"
    folder = top / "a" / "b"
    killed(folder)
    (top / which).chmod(mode)
    assert found_in(folder) == {}
    log = LeaseLog("lse_2", folder)
    assert "others may write" in caplog.text
    log.cells[log.slot("key_b", "tokens")] = 1  # it does without
    log.close()


def test_a_folder_of_another_user_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    killed(folder)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert found_in(folder) == {}
    LeaseLog("lse_2", folder).close()
    assert "another user" in caplog.text


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("which", ["top", "top/link", "top/link/a"])
def test_a_folder_below_another_users_folder_is_not_trusted(which: str, tmp_path: Path) -> None:
    top = tmp_path / "top"
    killed(top / "real" / "a" / "b")
    (top / "link").symlink_to(top / "real")
    os.chown(tmp_path / which, 4_242, -1, follow_symlinks=False)
    assert found_in(top / "link" / "a" / "b") == {}
