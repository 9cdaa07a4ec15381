"""A real S3 server on loopback (moto's), for tests here and, through the environment, in processes started here."""

import json
import logging
import uuid
from collections.abc import Iterator

import pytest

from sims_ray.storage.stores import open_store

BUCKET = "sims-tests"
REGION = "us-east-1"
UNWANTED = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_PROFILE")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
ALLOWED = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URI of an empty bucket; the environment says where it is, in this process and in those it starts."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import S3FileSystem

    logger = logging.getLogger("werkzeug")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in UNWANTED:
            patch.delenv(name, raising=False)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        open_store.cache_clear()
        S3FileSystem(endpoint_override=endpoint, region=REGION, allow_bucket_creation=True).create_dir(BUCKET)
        yield f"s3://{BUCKET}"
    open_store.cache_clear()
    server.stop()
    logger.setLevel(level)


@pytest.fixture
def s3_folder(s3: str) -> str:
    """URI of a folder of its own in that bucket."""
    return f"{s3}/{uuid.uuid4().hex}"


@pytest.fixture
def s3_checks_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the server check credentials for one test; the environment holds right ones."""
    import boto3
    from botocore.config import Config
    from moto import settings

    iam, user = boto3.client("iam", config=Config(proxies={})), uuid.uuid4().hex
    iam.create_user(UserName=user)
    iam.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=json.dumps(ALLOWED))
    key = iam.create_access_key(UserName=user)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    monkeypatch.setattr(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    open_store.cache_clear()
    yield
    open_store.cache_clear()
