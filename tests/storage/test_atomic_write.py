"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.core.errors import StoreError
from harness.storage.atomic_write import share, write_aside
from harness.storage.json_files import write_json
from harness.storage.store import Store


def test_leftovers_and_failed_writes_leave_the_old_file(store: Store) -> None:
    path = store.root / "x.json"
    write_json(path, {"a": 1})
    (store.root / ".x.json.123456789abc").write_text("{half")

    def break_off(aside: Path) -> None:
        aside.write_text("{half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="the disk is full"):
        write_aside(path, break_off)
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(store.root.iterdir())) == 2


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_shared_files_have_the_permissions_of_the_umask(
    tmp_path: Path, umask: int, mode: int
) -> None:
    (tmp_path / "folder").mkdir()
    files = [tmp_path / "a", tmp_path / "folder" / "b"]
    for file in files:
        file.write_text("x")
        file.chmod(0o600)
    before = os.umask(umask)
    try:
        share(files[0])
        assert [file.stat().st_mode & 0o777 for file in files] == [mode, 0o600]
        share(tmp_path)
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in files] == [mode, mode]
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "folder", "b"}


def test_kill_while_writing_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from harness.storage.json_files import write_json\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    write_json(Path(sys.argv[1]), {'n': n, 'pad': ['x' * 100] * 2000}, durable=False)\n"
    )
    path = tmp_path / "big.json"
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", program, str(path)])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(json.loads(path.read_text())["pad"]) == 2000
