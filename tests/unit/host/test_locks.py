# SPDX-License-Identifier: Apache-2.0
"""Locks of directories, and those who would keep one for ever."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from chaos.linux.flock import lock, locked


def test_one_at_a_time_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(BlockingIOError):
        lock(tmp_path)
    with pytest.raises(TimeoutError, match=r"kept it locked for 0\.02 s") as late, locked(tmp_path, within=0.02):
        pass
    assert (late.value.errno, late.value.filename) == (errno.ETIMEDOUT, str(tmp_path))
    held.close()
    with locked(tmp_path), pytest.raises(BlockingIOError):
        lock(tmp_path)
    lock(tmp_path).close()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "gone"):
        pass
