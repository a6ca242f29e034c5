"""Proves that runs persist: logs a run with a known metric and artifact, and reads all such runs back by MLflow's API.

Arguments: the server's URL, then `write` to log a run first or `read`. Prints JSON. Needs Python's standard library
only, so it runs in a container (by the compose name, as notebooks do) and on the host (by the published address).
A probe run states what it holds in its own tags: `labctl.artifact_sha256` and `labctl.metric`.
"""

import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

EXPERIMENT, ARTIFACT, METRIC = "labctl-verify", "probe.bin", "probe"
#: Big enough for PostgreSQL and the S3 server to write blocks, small enough to be read back by the hundred.
ARTIFACT_BYTES = 256 * 1024
PAGE = 1000


class Api:
    """MLflow's REST API at one address."""

    def __init__(self, url):
        self.url = url.rstrip("/")

    def request(self, method, path, data=None, content_type="application/json"):
        """The raw answer; HTTPError unless it is a success."""
        request = urllib.request.Request(self.url + path, data, {"Content-Type": content_type}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def call(self, method, endpoint, /, **arguments):
        """One call of the tracking API with its JSON answer."""
        path, data = f"/api/2.0/mlflow/{endpoint}", None
        if method == "GET":
            path += "?" + urllib.parse.urlencode(arguments)
        else:
            data = json.dumps(arguments).encode()
        return json.loads(self.request(method, path, data) or b"{}")

    def experiment(self):
        """The probe experiment's id, or None."""
        try:
            found = self.call("GET", "experiments/get-by-name", experiment_name=EXPERIMENT)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return found["experiment"]["experiment_id"]


def artifact_path(run):
    """Where the proxy serves a run's artifacts; ValueError if the run keeps them elsewhere."""
    uri = run["info"]["artifact_uri"]
    if not uri.startswith("mlflow-artifacts:/"):
        raise ValueError(f"run {run['info']['run_id']} keeps its artifacts at {uri}, not with the server")
    return f"/api/2.0/mlflow-artifacts/artifacts/{uri.partition(':')[2].strip('/')}/{ARTIFACT}"


def write(api):
    """Log one probe run; its id."""
    experiment = api.experiment() or api.call("POST", "experiments/create", name=EXPERIMENT)["experiment_id"]
    content = os.urandom(ARTIFACT_BYTES)
    metric = int.from_bytes(content[:4], "big") / 2**32
    tags = {"labctl.artifact_sha256": hashlib.sha256(content).hexdigest(), "labctl.metric": repr(metric)}
    now = int(time.time() * 1000)
    run = api.call(
        "POST",
        "runs/create",
        experiment_id=experiment,
        run_name=time.strftime("probe %Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        start_time=now,
        tags=[{"key": key, "value": value} for key, value in tags.items()],
    )["run"]
    run_id = run["info"]["run_id"]
    api.call("POST", "runs/log-metric", run_id=run_id, key=METRIC, value=metric, timestamp=now)
    api.request("PUT", artifact_path(run), content, "application/octet-stream")
    # Only a finished run counts: one that was cut off here promised nothing.
    api.call("POST", "runs/update", run_id=run_id, status="FINISHED", end_time=int(time.time() * 1000))
    return run_id


def runs(api):
    """All finished probe runs, newest first."""
    experiment, token, found = api.experiment(), None, []
    while experiment is not None:
        more = {"page_token": token} if token else {}
        page = api.call(
            "POST",
            "runs/search",
            experiment_ids=[experiment],
            filter="attributes.status = 'FINISHED'",
            max_results=PAGE,
            order_by=["attributes.start_time DESC"],
            **more,
        )
        found += page.get("runs", [])
        token = page.get("next_page_token")
        if not token:
            break
    return found


def check(api, run):
    """What a run's tags promise against what the server gives back; "" in `wrong` if they are the same."""
    data = run["data"]
    tags = {tag["key"]: tag["value"] for tag in data.get("tags", [])}
    metrics = {metric["key"]: metric["value"] for metric in data.get("metrics", [])}
    result = {"run_id": run["info"]["run_id"], "metric": metrics.get(METRIC), "artifact_sha256": "", "wrong": ""}
    try:
        result["artifact_sha256"] = hashlib.sha256(api.request("GET", artifact_path(run))).hexdigest()
    except (OSError, ValueError) as error:
        result["wrong"] = f"artifact can't be read: {error}"
        return result
    if result["artifact_sha256"] != tags.get("labctl.artifact_sha256"):
        result["wrong"] = (
            f"artifact has SHA-256 {result['artifact_sha256']}, logged was {tags.get('labctl.artifact_sha256')}"
        )
    elif result["metric"] is None or repr(float(result["metric"])) != tags.get("labctl.metric"):
        result["wrong"] = f"metric is {result['metric']}, logged was {tags.get('labctl.metric')}"
    return result


def main():
    """Log if told to, read everything back, print what was found."""
    api, writing = Api(sys.argv[1]), sys.argv[2] == "write"
    started = time.monotonic()
    new = write(api) if writing else ""
    checked = [check(api, run) for run in runs(api)]
    wrong = [item for item in checked if item["wrong"]]
    if new and new not in [item["run_id"] for item in checked]:
        wrong.append({"run_id": new, "wrong": "the run that was just logged isn't listed"})
    latest = checked[0] if checked else {}
    own = next((item for item in checked if item["run_id"] == new), latest)
    print(
        json.dumps(
            {
                "url": api.url,
                "run_id": own.get("run_id", ""),
                "metric": own.get("metric"),
                "artifact_sha256": own.get("artifact_sha256", ""),
                "previous_runs": len(checked) - bool(new),
                "previous_runs_ok": not wrong,
                "wrong": wrong[:10],
                "seconds": round(time.monotonic() - started, 2),
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.url} answered {error.code}: {error.read()[:500].decode(errors='replace')}")
    except OSError as error:
        sys.exit(f"{sys.argv[1]} doesn't answer: {error}")
