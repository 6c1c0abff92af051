# SPDX-License-Identifier: Apache-2.0
"""The file that the host keeps the firmware's state in. What needs a mount is tried in the lab."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from chaos.errors import Unsupported
from chaos.history.records import Done, Invoke, Record
from chaos.runner.operations import OperationLog
from chaos.runner.storage import SIZE, StateFile
from chaos.safety.survey import Paths, require_ccp


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "psp").mkdir()
    (tmp_path / "parameter").write_text(f"{tmp_path}/psp/state\n")
    return tmp_path / "psp"


def storage(folder: Path, written: list[Record]) -> StateFile:
    recorder = SimpleNamespace(now=lambda: len(written), write=written.append)
    return StateFile(OperationLog(recorder), folder.parent / "parameter")  # type: ignore[arg-type]


def test_a_folder_is_missing_until_it_is_mended_and_both_are_operations(folder: Path) -> None:
    (folder / "state").write_bytes(b"kept")
    written: list[Record] = []
    kept = storage(folder, written)
    assert kept.takes() is None
    kept.spoil("missing")
    assert isinstance(kept.takes(), FileNotFoundError)
    kept.mend()
    kept.mend()  # once is enough
    assert kept.takes() is None
    assert (folder / "state").read_bytes() == b"kept"
    assert [path.name for path in folder.iterdir()] == ["state"]
    assert [r.args["state"] for r in written if isinstance(r, Invoke)] == ["missing", "well"]
    assert [r.outcome for r in written if isinstance(r, Done)] == ["ok", "ok"]


@pytest.mark.parametrize("written_meanwhile", [False, True])
def test_a_torn_file_is_half_there_until_somebody_writes_it(folder: Path, written_meanwhile: bool) -> None:
    whole, other = bytes(range(256)) * (SIZE // 256), bytes(SIZE)
    kept = storage(folder, [])
    assert not kept.torn
    (folder / "state").write_bytes(whole)
    assert not kept.torn
    kept.spoil("torn")
    assert kept.torn and (folder / "state").read_bytes() == whole[: SIZE // 2]
    if written_meanwhile:
        (folder / "state").write_bytes(other)
    kept.mend()
    assert not kept.torn
    assert (folder / "state").read_bytes() == (other if written_meanwhile else whole)


def test_what_cannot_be_spoiled_is_an_operation_that_failed(folder: Path) -> None:
    written: list[Record] = []
    kept = storage(folder, written)
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        kept.spoil("missing")
    assert [r.outcome for r in written if isinstance(r, Done)] == ["fail"]
    kept.mend()  # nothing was done, so nothing is undone
    assert len(written) == 2


@pytest.mark.parametrize("text", ["(null)\n", "", "/state\n"])
def test_a_firmware_that_keeps_its_state_by_itself_has_no_such_file(folder: Path, text: str) -> None:
    (folder.parent / "parameter").write_text(text)
    with pytest.raises(Unsupported, match="no folder to spoil"):
        _ = storage(folder, []).file


@pytest.mark.parametrize(
    ("have", "wanted", "fits"),
    [("Y", "1", True), ("N", "0", True), ("Y", "0", False), ("/run/a", "/run/a", True), ("/run/a", "/run/b", False)],
)
def test_a_driver_that_was_loaded_otherwise_is_no_host_for_it(
    tmp_path: Path, have: str, wanted: str, fits: bool
) -> None:
    parameters = tmp_path / "ccp" / "parameters"
    parameters.mkdir(parents=True)
    (parameters / "it").write_text(f"{have}\n")
    paths = Paths(modules=tmp_path)
    if fits:
        require_ccp(paths, {"it": wanted})
    else:
        with pytest.raises(Unsupported, match=f"it={have}, and {wanted} is wanted") as caught:
            require_ccp(paths, {"it": wanted})
        assert f"modprobe ccp it={wanted}" in caught.value.remedy
    with pytest.raises(Unsupported, match="nothing"):
        require_ccp(paths, {"another": "1"})
