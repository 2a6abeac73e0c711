"""Start MLflow's server from secret files: passwords stand neither in an environment file nor on a command line.

    MLFLOW_SECRETS               folder with postgres_password, mlflow_password and mlflow_key (/run/secrets)
    MLFLOW_POSTGRES              user@host:port/database; the login of MLflow's own users is kept in <database>_auth beside it
    MLFLOW_ARTIFACTS             where artifacts go, s3://bucket/path or a folder; the server hands them on, workers need no key
    MLFLOW_S3_ENDPOINT_URL, AWS_SHARED_CREDENTIALS_FILE     the object store, where it is not Amazon's
    MLFLOW_ALLOWED_HOSTS         names by which the server may be asked for, with ports, comma-separated
    MLFLOW_ADMIN                 the user of mlflow_password (harness)

The arguments (--host, --port) go on to `mlflow server`. Standard library and the server's own packages only.
"""

from __future__ import annotations

import os
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path


def secret(folder: Path, name: str) -> str:
    """The content of a secret file. Ends the program where it is missing or empty: a server without a password must not start."""
    try:
        value = (folder / name).read_text(encoding="utf-8").strip()
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); make it with docker/make_secrets.py"
        raise SystemExit(f"secret {folder / name} {reason}") from error
    if not value:
        raise SystemExit(f"secret {folder / name} is empty; make it with docker/make_secrets.py")
    return value


def database_uris(place: str, password: str) -> tuple[str, str]:
    """(of the runs, of the users), from user@host:port/database and the password.

    >>> database_uris("mlflow@postgres:5432/mlflow", "a/b")[0]
    'postgresql+psycopg2://mlflow:a%2Fb@postgres:5432/mlflow'
    """
    user, _, rest = place.partition("@")
    if not user or "/" not in rest:
        raise SystemExit(f'MLFLOW_POSTGRES is user@host:port/database, not "{place}"')
    runs = f"postgresql+psycopg2://{user}:{urllib.parse.quote(password, safe='')}@{rest}"
    return runs, f"{runs}_auth"


def write_private(path: Path, text: str) -> None:
    """A file that only this user can read, from its first byte on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def make_database(uri: str) -> None:
    """Create the database of a URI where it does not exist."""
    import sqlalchemy

    base, _, name = uri.rpartition("/")
    engine = sqlalchemy.create_engine(f"{base}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        query = sqlalchemy.text("SELECT 1 FROM pg_database WHERE datname = :name")
        if connection.execute(query, {"name": name}).scalar() is None:
            connection.execute(sqlalchemy.text(f'CREATE DATABASE "{name}"'))
    engine.dispose()


def make_bucket(place: str, endpoint: str | None) -> None:
    """Create the bucket of s3://bucket/path where it does not exist."""
    import boto3
    from botocore.exceptions import ClientError

    bucket = urllib.parse.urlsplit(place).netloc
    client = boto3.client("s3", endpoint_url=endpoint)
    try:
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        client.create_bucket(Bucket=bucket)


def prepare(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Write the login's settings into `folder` and return the environment of the server."""
    secrets = Path(environment.get("MLFLOW_SECRETS", "/run/secrets"))
    place = environment.get("MLFLOW_POSTGRES", "mlflow@postgres:5432/mlflow")
    runs, users = database_uris(place, secret(secrets, "postgres_password"))
    settings = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": users,
        "admin_username": environment.get("MLFLOW_ADMIN", "harness"),
        "admin_password": secret(secrets, "mlflow_password"),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    # configparser reads % as the start of a reference.
    lines = [f"{name} = {value.replace('%', '%%')}" for name, value in settings.items()]
    write_private(folder / "auth.ini", "\n".join(["[mlflow]", *lines, ""]))
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes and 1.8 GB that nothing here uses
        **environment,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret(secrets, "mlflow_key"),
        "MLFLOW_BACKEND_STORE_URI": runs,  # here and not as an argument, which every user of the machine could read
    }


def command(environment: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """The words of `mlflow server`; none of them is secret."""
    hosts = environment.get("MLFLOW_ALLOWED_HOSTS", "localhost:*,127.0.0.1:*,mlflow:*")
    place = environment.get("MLFLOW_ARTIFACTS", "s3://mlflow/artifacts")
    words = [
        "-m",
        "mlflow",
        "server",
        "--app-name",
        "basic-auth",
        "--serve-artifacts",
        "--artifacts-destination",
        place,
    ]
    return [sys.executable, *words, "--allowed-hosts", hosts, "--workers", "2", *arguments]


def main() -> None:
    """Prepare, then become the server."""
    environment = prepare(dict(os.environ), Path.cwd())
    uri, place = (
        environment["MLFLOW_BACKEND_STORE_URI"],
        environment.get("MLFLOW_ARTIFACTS", "s3://mlflow/artifacts"),
    )
    make_database(uri)
    make_database(f"{uri}_auth")
    if place.startswith("s3://"):
        make_bucket(place, environment.get("MLFLOW_S3_ENDPOINT_URL"))
    words = command(environment, sys.argv[1:])
    os.execve(words[0], words, environment)


if __name__ == "__main__":
    main()
