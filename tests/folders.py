"""What lies in a folder, for tests that compare what two runs have made."""

import hashlib
from pathlib import Path


def contents(root) -> dict[str, str]:
    """Digest of every file but the lock, by path."""
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(root).rglob("*")) if p.is_file() and p.name != ".lock"}
