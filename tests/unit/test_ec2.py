"""The signature of S3 requests, against the example in AWS's own documentation."""

from __future__ import annotations

from datetime import UTC, datetime

from labctl.cloud import ec2

#: "Examples: Signature Calculations", GET Bucket (List Objects), of the S3 API reference; its key is the published one.
ACCESS, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SIGNATURE = "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"


def test_a_signature_that_differs_from_amazons_would_open_no_store() -> None:
    url = "https://examplebucket.s3.amazonaws.com/?max-keys=2&prefix=J"
    headers = ec2.signed(url, ACCESS, SECRET, datetime(2013, 5, 24, tzinfo=UTC))
    assert headers["Authorization"].endswith(f"Signature={SIGNATURE}")
    assert headers["Authorization"].startswith(
        f"AWS4-HMAC-SHA256 Credential={ACCESS}/20130524/us-east-1/s3/aws4_request"
    )
