"""Starts the MLflow server once its bucket is there. Arguments: the server's command line.

Docker restarts containers after a reboot in any order, so the S3 server may come up later than this one.
"""

import os
import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

WAIT_SECONDS = 60


def ensure_bucket(name):
    """Create the bucket unless it exists; ClientError if the credentials aren't accepted."""
    s3 = boto3.client(
        "s3",
        endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"],
        config=Config(connect_timeout=3, read_timeout=10, retries={"max_attempts": 1}, s3={"addressing_style": "path"}),
    )
    if name not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
        s3.create_bucket(Bucket=name)
        print(f"labctl: created the bucket {name}", flush=True)


def main():
    """Wait for the S3 server, then become the MLflow server."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            ensure_bucket(os.environ["LABCTL_BUCKET"])
            break
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"labctl: the S3 server at {os.environ['MLFLOW_S3_ENDPOINT_URL']} doesn't serve: {error}")
            time.sleep(1)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
