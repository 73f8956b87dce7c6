"""Pins the dependencies of pyproject.toml with hashes, for every supported Python and platform.

- dev.lock: for `make install`: the service with all extras, and the development tools
- runtime.lock: for production images: the service with bearer tokens and search
- proto.lock: the generator of generated/, in an environment of its own
- docs.lock: the builder of the documentation site, in an environment of its own
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {
    "dev": [
        "pyproject.toml",
        "--extra",
        "auth",
        "--extra",
        "embedded",
        "--extra",
        "search",
        "--group",
        "dev",
    ],
    "runtime": [
        "pyproject.toml",
        "--extra",
        "auth",
        "--extra",
        "search",
        "--constraints",
        "requirements/dev.lock",
    ],
    "proto": ["--group", "proto"],
    "docs": ["--group", "docs"],
}


def main() -> None:
    """Write requirements/*.lock; arguments go to the resolver."""
    uv = Path(sys.executable).parent / "uv"
    for name, sources in LOCKS.items():
        command = [
            *(str(uv), "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"),
            *("--generate-hashes", "--only-binary", ":all:"),
            # The lock must not depend on this machine's package sources, nor name them.
            *("--no-config", "--no-emit-index-url", "--no-emit-find-links"),
            # A local path has no hash; `make install` adds the stubs.
            *("--no-emit-package", "chathistory-stubs"),
            *("--custom-compile-command", "make lock"),
            *("--output-file", f"requirements/{name}.lock"),
        ]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("UV_")
        }
        subprocess.run([*command, *sources, *sys.argv[1:]], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
