"""Logs runs as a student's notebook did, with the MLflow of the time; prints what they hold, by experiment, as JSON.

One experiment's artifacts go through the server (mlflow-artifacts:/), the other's to the S3 server (s3://), as older
labs' did.
"""

import hashlib
import json
import os
import pathlib
import random
import time
import urllib.request

import boto3
import mlflow

BYTES = 300_000


class Doubler(mlflow.pyfunc.PythonModel):
    """A model that is small and can be asked."""

    def predict(self, context, model_input, params=None):  # noqa: ARG002 (MLflow's signature)
        return [2 * value for value in model_input]


def wait():
    """Until the server answers; it makes its tables first."""
    for _ in range(240):
        try:
            urllib.request.urlopen("http://mlflow:8000/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("MLflow doesn't answer")


def run(experiment, number):
    """One run with parameters, a metric's history and an artifact; what it holds."""
    content = random.randbytes(BYTES)
    pathlib.Path("/tmp/weights.bin").write_bytes(content)
    with mlflow.start_run(experiment_id=experiment, run_name=f"run {number}") as started:
        mlflow.log_params({"lr": 0.1 * number, "epochs": 3})
        for step in range(3):
            mlflow.log_metric("loss", 1 / (number + step + 1), step=step)
        mlflow.log_artifact("/tmp/weights.bin", "model")
    found = mlflow.get_run(started.info.run_id)
    return {
        "run_id": started.info.run_id,
        "sha256": hashlib.sha256(content).hexdigest(),
        "params": dict(found.data.params),
        "metrics": dict(found.data.metrics),
        "artifact_uri": found.info.artifact_uri,
    }


def main():
    """Two experiments and a registered model."""
    s3 = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    if "mlflow-artifacts" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
        s3.create_bucket(Bucket="mlflow-artifacts")
    wait()
    proxied = mlflow.create_experiment("food11-classifier")
    direct = mlflow.create_experiment("older", artifact_location="s3://mlflow-artifacts/older")
    logged = {"proxied": [run(proxied, n) for n in (1, 2)], "direct": [run(direct, n) for n in (1, 2)]}
    with mlflow.start_run(experiment_id=proxied):
        mlflow.pyfunc.log_model("doubler", python_model=Doubler(), registered_model_name="doubler", pip_requirements=[])
    print(json.dumps(logged))


if __name__ == "__main__":
    main()
