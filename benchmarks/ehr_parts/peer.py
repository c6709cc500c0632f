"""Peers live in environments of their own: their requirements clash with ours and with one another's."""

import subprocess
import sys
from pathlib import Path

MEDS_TORCH_DATA = ("torch==2.13.0", "meds-torch-data==0.9.0", "MEDS_transforms==0.6.7", "nested_ragged_tensors==0.3.0")


def peer_python(folder: Path, name: str, requirements: tuple[str, ...]) -> Path | str:
    """The interpreter of a peer's environment in ``folder/name``, made when it is missing; or the reason why there is none."""
    python = folder / name / "bin" / "python"
    ready = folder / name / "requirements.txt"
    wanted = "\n".join(requirements)
    if ready.is_file() and ready.read_text() == wanted:
        return python
    for command in (
        [sys.executable, "-m", "venv", "--clear", folder / name],
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
    ):
        print(f"making the environment of {name}: {' '.join(map(str, command))}", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [text for text in done.stderr.splitlines() if text.strip() and "WARNING" not in text]
            return f"{' '.join(map(str, command[1:4]))} ended with {done.returncode}: {said[-1] if said else ''}"
    ready.write_text(wanted)
    return python
