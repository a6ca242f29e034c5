"""Proves the credentials of an adopted volume: a login over the network that asks for the password, a signed request.

Arguments: PostgreSQL's user and database. Prints JSON: {"postgres": "" or why not, "s3": "" or why not, "buckets"}.
"""

import json
import os
import sys
import time

import boto3
import psycopg2
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

WAIT_SECONDS = 90
#: One limit for both servers.
DEADLINE = time.monotonic() + WAIT_SECONDS
#: What a server that is only starting, or isn't there yet, answers.
STARTING = ("starting up", "recovery", "could not connect", "connection refused", "could not translate", "not accept")


def postgres(user, database):
    """ "" once the server has taken the password; its words otherwise. A server that asks for none proves nothing."""
    while True:
        try:
            psycopg2.connect(
                host="postgres", user=user, dbname=database, connect_timeout=5, require_auth="scram-sha-256,md5"
            ).close()
        except psycopg2.OperationalError as error:
            words = str(error).strip()
            waiting = any(word in words.lower() for word in STARTING)
            if not waiting or time.monotonic() > DEADLINE:
                return words
            time.sleep(0.5)
        else:
            return ""


def s3():
    """The buckets by a signed request, or the server's refusal."""
    config = Config(connect_timeout=3, read_timeout=10, retries={"max_attempts": 1}, s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"], config=config)
    while True:
        try:
            return "", [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
        except ClientError as error:
            code = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code < 500 or time.monotonic() > DEADLINE:
                return str(error), []
        except BotoCoreError as error:
            if time.monotonic() > DEADLINE:
                return str(error), []
        time.sleep(0.5)


def main():
    """PostgreSQL, then the S3 server."""
    refused = postgres(sys.argv[1], sys.argv[2])
    # A server that has refused once is enough: no need to wait for the other.
    s3_refused, buckets = ("", []) if refused else s3()
    print(json.dumps({"postgres": refused, "s3": s3_refused, "buckets": buckets}))


if __name__ == "__main__":
    main()
