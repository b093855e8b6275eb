"""Files that a command is to write are looked at before its work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetrace.cli import options
from finetrace.errors import FinetraceError


def test_a_folder_that_takes_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options.new_files({"--out": (tmp_path / "new" / "folder" / "x.json", (".json",))})
    (tmp_path / "file").write_text("")
    with pytest.raises(FinetraceError, match=r"--out .*file.x\.json: cannot be written \(.*file: not a folder\)"):
        options.new_files({"--out": (tmp_path / "file" / "x.json", (".json",))})
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(
        FinetraceError, match=r"--report .*page\.html: cannot be written .*nothing may be written there"
    ):
        options.new_files({"--report": (tmp_path / "new" / "page.html", (".html",))})
