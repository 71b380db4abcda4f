# SPDX-License-Identifier: Apache-2.0

"""Steps that are run one after another, each once: what is done stays done, over kills and over processes."""

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..utils.files import differences, is_disk_error, write_json


class GridError(ValueError):
    """What the user has to mend before any step like it can run: no data, no model, an option with a wrong value."""


@dataclass
class Step:
    """
    One step of a grid. Its folder holds `<kind>.json` once it is done, with the settings it was made with and its result.

    Parameters:
        folder (`Path`): Where its files are.
        kind (`str`): Names the step within its folder, such as `"train"`.
        settings (`dict[str, Any]`): All that its result depends on, as JSON takes it.
        run (`Callable[[], dict[str, Any]]`): Does it. Must stand being run again after it was killed. Returns its result.
        needs (`tuple[Step, ...]`): Steps that must be done before.
        state (`str`): `"waiting"`, `"running"`, `"done"`, `"elsewhere"` (another process runs it) or `"failed"`.
        result (`dict[str, Any]`, *optional*): What `run` has returned.
        seconds (`float`, *optional*): How long it took.
        error (`str`, *optional*): Why it failed. `None` where it was not run since it needs one that failed.
    """

    folder: Path
    kind: str
    settings: dict[str, Any]
    run: Callable[[], dict[str, Any]] = field(repr=False)
    needs: tuple["Step", ...] = ()
    state: str = "waiting"
    result: dict[str, Any] | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / f"{self.kind}.json"

    def read(self) -> bool:
        """
        Read the result if it is there.

        Raises:
            `ValueError`: It was made with other settings; the message says which differ.
        """
        if not self.path.is_file():
            return False
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(self.settings))
        differing = differences(kept["settings"], wanted)
        if differing:
            raise ValueError(
                f"{self.path} was made with other settings: {'; '.join(differing)}. Choose another `output_dir`, or remove "
                f"{self.folder} to make it anew."
            )
        self.state, self.result, self.seconds = "done", kept["result"], kept["seconds"]
        return True

    def do(self) -> None:
        """Run it and write its result."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.time()
        self.result = self.run()
        self.seconds = round(time.time() - started, 1)
        content = {"settings": self.settings, "result": self.result, "seconds": self.seconds}
        write_json(self.path, content)
        self.state = "done"


def run_steps(steps: Iterable[Step], changed: Callable[[Step], None], wait: float = 5.0) -> list[Step]:
    """
    Run all steps that are not done. Several processes may do so at the same time in the same folders: each step is done by one
    of them. A step that fails leaves its traceback in `<kind>.error` and does not hold up those that do not need it.

    Args:
        steps (`Iterable[Step]`): In the order in which they shall run; a step stands behind those that it needs.
        changed (`Callable[[Step], None]`): Called when a step has changed its state.
        wait (`float`, *optional*, defaults to `5.0`): Seconds between looks at the steps of other processes.

    Returns:
        `list[Step]`: The steps that failed, or that need one that failed.

    Raises:
        [`GridError`]: A step cannot run for a reason that would hit others alike.
        `OSError`: The disk takes no more.
    """
    steps = [*steps]
    pending = [step for step in steps if step.state != "done"]
    while pending:
        moved = False
        for step in pending:
            for need in step.needs:
                if need.state == "elsewhere":  # it may be done by now
                    _try(need, changed)
            if any(need.state == "failed" for need in step.needs):
                step.state = "failed"
            elif all(need.state == "done" for need in step.needs):
                _try(step, changed)
            moved |= step.state in ("done", "failed")
        pending = [step for step in pending if step.state not in ("done", "failed")]
        if pending and not moved:
            time.sleep(wait)
    return [step for step in steps if step.state == "failed"]


def _try(step: Step, changed: Callable[[Step], None]) -> None:
    """Run a step, unless another process has done it or is at it."""
    step.folder.mkdir(parents=True, exist_ok=True)
    error_path = step.folder / f"{step.kind}.error"
    try:
        with FileLock(step.folder / f".{step.kind}.lock", blocking=False):  # the system frees it when a process dies
            if not step.read():
                step.state = "running"
                changed(step)
                error_path.unlink(missing_ok=True)
                step.do()
    except Timeout:
        step.state = "elsewhere"
    except Exception as error:  # a run out of memory, say, is no reason not to try the others
        step.state, step.error = "failed", f"{type(error).__name__}: {error}"
        if isinstance(error, GridError) or is_disk_error(error):
            raise
        error_path.write_text(traceback.format_exc(), encoding="utf-8")
    changed(step)
