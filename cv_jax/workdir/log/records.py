"""Opens metrics.jsonl, a file of JSON lines that a resumed run continues."""

import json
from typing import Any

from etils.epath import Path

from cv_jax.workdir.bucket import open_to_append
from cv_jax.workdir.files import write_atomically


def open_jsonl(path: Path, start_step: int, total: int, val_is_due: bool = False) -> Any:
    """Opens metrics.jsonl for more lines. Removes the lines that will be written again.

    Args:
        path: of the file.
        start_step: steps already made.
        total: steps of the whole training; its final evaluation comes again.
        val_is_due: whether the evaluation on val at `start_step` comes again, and with it a final
            evaluation there.
    """
    if path.exists():
        kept = []
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                final = record["step"] == total and record["split"].startswith("final_")
                again = val_is_due and record["step"] == start_step and record["split"] != "train"
                if record["step"] <= start_step and not final and not again:
                    kept.append(line.decode())
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line that a kill cut off
        if kept:
            write_atomically(path, "\n".join(kept))
        else:
            path.unlink()
    return open_to_append(path)


def json_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
