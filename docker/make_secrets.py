"""Make the secrets of compose.yaml as files, once: `python docker/make_secrets.py [FOLDER]`. What exists is kept.

The folder (docker/secrets, not in git) is closed to other users of the host; the files in it can be read by the users of the
containers, into which each is mounted only where it is needed.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path

USER = "harness"


def make(folder: Path) -> list[Path]:
    """Write what is missing; returns the files written."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    password, key_id, key = (
        secrets.token_urlsafe(32),
        secrets.token_hex(10),
        secrets.token_urlsafe(32),
    )
    actions = ["Admin", "Read", "Write", "List"]
    identity = {
        "name": USER,
        "credentials": [{"accessKey": key_id, "secretKey": key}],
        "actions": actions,
    }
    # Files of one group name the same secret, so they are made together or not at all.
    groups = (
        {"postgres_password": secrets.token_urlsafe(32)},
        {"mlflow_key": secrets.token_urlsafe(48)},
        {"ray_token": secrets.token_urlsafe(32)},
        {
            "mlflow_password": password,
            "mlflow_credentials": f"[mlflow]\nmlflow_tracking_username = {USER}\nmlflow_tracking_password = {password}\n",
        },
        {
            "objects.json": json.dumps({"identities": [identity]}, indent=2) + "\n",
            "aws_credentials": f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {key}\nregion = us-east-1\n",
        },
    )
    written = []
    for group in groups:
        if all((folder / name).exists() for name in group):
            continue
        for name, text in group.items():
            path = folder / name
            path.unlink(missing_ok=True)
            path.write_text(text, encoding="utf-8")
            path.chmod(0o444)
            written.append(path)
    return written


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "secrets"
    for made in make(place):
        print(made)
