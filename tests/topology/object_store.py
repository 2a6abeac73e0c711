"""An S3 server from PyPI, until it is ended: `python object_store.py FOLDER ADDRESS PORT objects.json`.

It is OpenStack Swift in a folder, whose S3 interface checks the signature of every request and knows conditional writes (not of
requests in the same moment, of which several may win). One device, one copy, without the daemons that look
after many; only the S3 interface listens beyond the loopback interface. Who may come in stands in the file of keys that
docker/make_secrets.py makes for SeaweedFS; no key is copied into a configuration or an argument.
"""

from __future__ import annotations

import array
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

INNER = {"account": 6202, "container": 6201, "object": 6200}
SERVER = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
disable_fallocate = true
log_level = WARNING

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
node_timeout = 120
container_update_timeout = 120
"""
# Updates of a container wait as long as it takes: after a second they would come later, and listings would lack what was written.
PROXY = """\
[DEFAULT]
bind_ip = {address}
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
log_level = WARNING

[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats bulk s3api tempauth slo dlo versioned_writes symlink proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
node_timeout = 120
recoverable_node_timeout = 120
conn_timeout = 30

[filter:tempauth]
paste.filter_factory = object_store:login
identities = {keys}

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

"""


def login(global_conf: dict[str, str], **conf: str) -> Any:
    """Swift's `tempauth` with the users of a file as SeaweedFS reads it, instead of users in its configuration."""
    from swift.common.middleware.tempauth import TempAuth

    pairs = [
        (pair["accessKey"], pair["secretKey"])
        for identity in json.loads(Path(conf["identities"]).read_text())["identities"]
        for pair in identity["credentials"]
    ]

    def wrap(app: Any) -> Any:
        inside = TempAuth(app, {**global_conf, **conf})
        inside.users = {
            name: {"key": key, "url": "$HOST/v1/AUTH_harness", "groups": [".admin"]}
            for name, key in pairs
        }
        return inside

    return wrap


def configure(
    folder: Path, address: str, port: int, keys: Path, user: str
) -> list[tuple[str, Path]]:
    """Write what is missing of configurations and rings; returns (program, configuration) of each server."""
    from swift.common.ring import RingData

    (folder / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = harness\n[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    programs = []
    for kind, inner in INNER.items():
        ring = folder / f"{kind}.ring.gz"
        if not ring.exists():
            device = {
                "id": 0,
                "region": 1,
                "zone": 1,
                "ip": "127.0.0.1",
                "port": inner,
                "replication_ip": "127.0.0.1",
                "replication_port": inner,
                "device": "disk",
                "weight": 1.0,
                "meta": "",
            }
            RingData([array.array("H", [0] * 16)], [device], 28).save(str(ring))
        path = folder / f"{kind}.conf"
        path.write_text(SERVER.format(kind=kind, port=inner, folder=folder, user=user))
        programs.append((f"swift-{kind}-server", path))
    plain = (
        "catch_errors",
        "gatekeeper",
        "healthcheck",
        "listing_formats",
        "bulk",
        "slo",
        "dlo",
        "versioned_writes",
        "symlink",
    )
    filters = "\n".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in plain)
    path = folder / "proxy.conf"
    path.write_text(
        PROXY.format(address=address, port=port, folder=folder, keys=keys, user=user) + filters
    )
    return [*programs, ("swift-proxy-server", path)]


def main() -> int:
    import getpass

    folder, address, port, keys = (
        Path(sys.argv[1]).absolute(),
        sys.argv[2],
        int(sys.argv[3]),
        Path(sys.argv[4]).absolute(),
    )
    programs = str(Path(sys.executable).parent)
    words = [
        [sys.executable, shutil.which(name, path=programs) or name, str(path), "--verbose"]
        for name, path in configure(folder, address, port, keys, getpass.getuser())
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    servers = [subprocess.Popen(each) for each in words]
    try:
        while all(server.poll() is None for server in servers):
            time.sleep(0.5)
        return 1  # one of them ended; the log says why
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
