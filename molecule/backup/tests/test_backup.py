"""What is lost if one of these fails: the backup that was counted on. The tests are one story, in their order."""

from __future__ import annotations

import json
import time
from typing import Any

from conftest import PROGRAM, Lab

#: Of a process that SIGKILL ended, as a shell says it.
KILLED = 137
BIG = "mlflow-artifacts/big.bin"


def put_object(lab: Lab, name: str, size: int = 3000) -> None:
    """One new object in the lab's bucket."""
    lab.shell(f"head -c {size} /dev/urandom > /root/one.bin")
    lab.s3(f"copyto /root/one.bin 's3:mlflow-artifacts/{name}'")


def stored(lab: Lab) -> set[str]:
    """Hashes of the objects in the container."""
    return {line.rpartition("/")[2] for line in lab.s3("lsf -R --files-only store:objects").split()}


def with_manifest(lab: Lab) -> set[str]:
    """Ids of the sets that have a manifest."""
    return {
        line.partition("/")[0] for line in lab.s3("lsf -R --files-only --include '*/manifest.json' store:sets").split()
    }


# -- making ----------------------------------------------------------------------------------------------------------


def test_a_backup_is_whole(lab: Lab) -> None:
    done = lab.run("backup")
    assert done.code == 0, done.error
    assert lab.complete()[0] == done.result["id"]
    named = {line.split()[0] for line in (lab.held()["objects"] + "\n" + lab.held()["files"]).splitlines()}
    assert named <= stored(lab)
    verified = lab.run("verify", done.result["id"])
    assert verified.code == 0, verified.error
    assert verified.result["verified_objects"] >= len(named)


def test_the_next_one_sends_only_what_differs(lab: Lab) -> None:
    again = lab.run("backup")
    assert (again.result["read"], again.result["sent"]) == (0, 0)
    put_object(lab, "new/one.bin")
    lab.shell("date +%N >> '/mnt/block/workspace/my work/sub/naïve.py'")
    changed = lab.run("backup")
    assert (changed.result["read"], changed.result["sent"]) == (1, 2)
    assert changed.result["objects"] == again.result["objects"] + 1
    lab.shell("touch /mnt/block/workspace/data.npy")
    lab.s3("copyto s3:mlflow-artifacts/new/one.bin s3:mlflow-artifacts/new/copy.bin")
    same = lab.run("backup")
    assert (same.result["read"], same.result["sent"]) == (1, 0), "what the container has isn't sent under another name"
    assert lab.run("verify", same.result["id"]).code == 0


def test_killed_at_each_step_it_is_never_complete_and_the_next_one_is_fine(lab: Lab) -> None:
    put_object(lab, "killed/one.bin")
    before = with_manifest(lab)
    lab.shell("rm -f /root/killed")
    while lab.run("backup", kill=True).code:
        # killed after the manifest, all of the set is there; before, there is nothing that it could be listed by
        late = with_manifest(lab) - before
        assert not late or lab.killed_at()[-1].startswith("giving the lease back")
        assert all(lab.run("verify", one).code == 0 for one in late)
        before |= late
        if late:
            put_object(lab, "killed/late.bin")
    assert set(lab.complete()) == with_manifest(lab)
    assert len(lab.killed_at()) >= 10, lab.killed_at()
    assert not [word for word in lab.killed_at() if lab.killed_at().count(word) > 1]
    assert lab.shell("ls /run/labctl-backup | grep -c secret-", check=False).strip() in ("0", "1")
    after = lab.run("backup")
    assert after.code == 0, after.error
    assert after.result["sent"] == 0, "what killed runs sent isn't sent again"
    assert lab.run("verify", "latest").code == 0


def test_a_job_that_is_killed_says_so(lab: Lab) -> None:
    put_object(lab, "big.bin", 12_000_000)
    before = lab.complete()
    started = json.loads(lab.shell(f"python3 {PROGRAM} start backup"))
    deadline = time.monotonic() + 60
    while "sending objects" not in (now := lab.shell(f"cat /run/labctl-backup/job-{started['job']}.json")):
        assert time.monotonic() < deadline, now
    lab.shell("systemctl kill -s KILL labctl-backup-job.service")
    said = json.loads(lab.shell(f"python3 {PROGRAM} wait --job {started['job']} --seen 999 --seconds 20"))
    assert said["state"] == "failed"
    assert "killed" in said["error"]["msg"]
    assert lab.complete() == before


def test_no_secret_shows_anywhere_while_it_runs(lab: Lab) -> None:
    key = lab.shell("cat /mnt/block/.labctl/secrets/backup_key").strip()
    values = [*(v for k, v in lab.secrets().items() if k.endswith(("password", "token"))), key]
    assert all(len(value) > 20 for value in values)
    started = json.loads(lab.shell(f"python3 {PROGRAM} start backup"))
    seen = lab.shell(f"""while systemctl is-active --quiet labctl-backup-job; do
        cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'; done
        journalctl --no-pager -u labctl-backup-job; cat /run/labctl-backup/job-{started["job"]}.json""")
    assert "lsjson" in seen, "the run has to be seen"
    lab.s3("copy store:sets /root/sets")
    kept = lab.shell(f"cd /root/sets && grep -rlaF -e {' -e '.join(values)} . || true; rm -rf /root/sets")
    assert kept.strip() == ""
    assert not [number for number, value in enumerate(values) if value in seen]
    open_to_others = "find /run/labctl-backup /root/test.conf -perm /077 | grep -v '^/run/labctl-backup$' || true"
    assert lab.shell(open_to_others) == ""


# -- damage ----------------------------------------------------------------------------------------------------------


def spoil(lab: Lab, where: str, how: str) -> None:
    """Put something else in an object's place, of the same size."""
    lab.s3(f"cat {where} | {how} > /root/bad")
    lab.s3(f"rcat {where} < /root/bad")


def newest_set(lab: Lab) -> str:
    return lab.complete()[0]


def listing(lab: Lab) -> str:
    """Every name on the volume that a restore could have made."""
    return lab.shell(
        "ls -la --time-style=full-iso /mnt/block /mnt/block/.labctl /mnt/block/workspace | grep -v backup.lock"
    )


def test_objects_that_went_bad_are_found_and_sent_again(lab: Lab) -> None:
    hashes = [lab.s3(f"hashsum sha256 --download s3:{name}").split()[0] for name in ("second-bucket/seven", BIG)]
    differs, gone = (f"store:objects/{sha[:2]}/{sha}" for sha in hashes)
    spoil(lab, differs, r"tr '\000-\377' '\001-\377\000'")
    lab.s3(f"deletefile {gone}")
    before = listing(lab)
    verified = lab.run("verify", "latest")
    assert verified.code == 6
    assert "2 are missing or differ" in verified.error["found"]
    assert BIG in verified.error["found"]
    refused = lab.run("restore", "latest", "--beside")
    assert refused.code == 6
    assert "damaged" in refused.error["msg"]
    assert listing(lab) == before
    mended = lab.run("backup")
    assert mended.result["sent"] == 2
    assert lab.run("verify", "latest").code == 0


def test_a_bad_dump_is_found_before_anything_is_written(lab: Lab) -> None:
    set_id = newest_set(lab)
    where = f"store:sets/{set_id}/postgres.dump"
    spoil(lab, where, r"tr '\001' '\002'")
    before = listing(lab)
    assert lab.run("verify", set_id).code == 6
    assert lab.run("restore", set_id, "--beside").code == 6
    assert listing(lab) == before


def test_in_doubt_about_a_set_no_object_is_removed(lab: Lab) -> None:
    set_id = newest_set(lab)
    where = f"store:sets/{set_id}/manifest.json"
    spoil(lab, where, "sed s/molecule/molecula/")
    assert set_id not in lab.complete()
    assert lab.run("restore", set_id, "--beside").code == 6
    before = stored(lab)
    done = lab.run("backup", "--keep", "2")
    assert done.code == 0
    assert len(done.result["removed_sets"]) >= 2
    assert done.result["removed_objects"] == 0
    assert any("can't be known" in note for note in done.notes)
    assert before <= stored(lab)
    assert set_id in [one["id"] for one in lab.run("list").result["sets"]]
    assert lab.run("delete", set_id).code == 0


def test_keep_removes_what_no_set_needs_and_nothing_else(lab: Lab) -> None:
    put_object(lab, "passing.bin")
    lab.run("backup")
    sha = lab.s3("hashsum sha256 --download s3:mlflow-artifacts/passing.bin").split()[0]
    lab.s3("deletefile s3:mlflow-artifacts/passing.bin")
    lab.run("backup", "--keep", "2")
    assert sha in stored(lab), "the older of the two kept sets names it"
    lab.run("backup", "--keep", "2")
    assert sha not in stored(lab)
    kept = lab.complete()
    assert len(kept) == 2
    assert all(lab.run("verify", one).code == 0 for one in kept)
    assert lab.s3("lsf store:").split() == ["big.bin", "objects/", "sets/", "training/", "with", "space/"], (
        "what else was in the container stays, and the lease is given back"
    )


def test_another_hosts_backup_is_not_run_into(lab: Lab) -> None:
    lease = json.dumps({"volume_id": "another", "host": "elsewhere", "renewed": time.time()})
    lab.shell("rclone --config /root/test.conf rcat store:lease.json", data=lease.encode())
    refused = lab.run("backup")
    assert (refused.code, "elsewhere" in refused.error["found"]) == (3, True)
    assert lab.run("backup", "--force").code == 0


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_the_timer_runs_the_same_program(lab: Lab) -> None:
    lab.play("job.yml", entry="main", backup_schedule="Mon *-*-* 03:00", backup_keep=2, backup_check_schedule=True)
    assert lab.shell("systemctl is-active labctl-backup.timer").strip() == "active"
    assert "changed=0" in lab.play("job.yml", entry="main", backup_schedule="Mon *-*-* 03:00", backup_keep=2)
    before = lab.complete()
    lab.shell("systemctl start labctl-backup.service")
    now = lab.complete()
    assert now[0] not in before
    assert len(now) == 2
    last = json.loads(lab.shell("cat /var/lib/labctl/backup-last.json"))
    assert (last["ok"], last["id"]) == (True, now[0])
    lab.play("job.yml", entry="main", backup_schedule="off")
    assert lab.shell("systemctl is-active labctl-backup.timer", check=False).strip() == "inactive"
    assert lab.shell("ls /etc/systemd/system/labctl-backup.*", check=False) == ""
    lab.play("job.yml", entry="main")


def test_a_store_that_does_not_answer_is_said_and_the_next_run_is_fine(lab: Lab) -> None:
    lab.shell("sed -i.kept 's#^auth = .*#auth = http://127.0.0.1:9/v3#' /etc/rclone/rclone.conf")
    try:
        failed = lab.run("backup")
    finally:
        lab.shell("mv /etc/rclone/rclone.conf.kept /etc/rclone/rclone.conf")
    assert (failed.code, failed.error["kind"]) == (3, "refused")
    assert "answer" in failed.error["msg"]
    assert json.loads(lab.shell("cat /var/lib/labctl/backup-last.json"))["ok"] is False
    assert lab.run("backup").code == 0


# -- the way back ------------------------------------------------------------------------------------------------------


def test_a_restore_never_writes_over_data(lab: Lab) -> None:
    before = listing(lab)
    refused = lab.run("restore", "latest")
    assert (refused.code, refused.error["kind"]) == (6, "safety_stop")
    assert "--beside" in refused.error["next_step"]
    assert listing(lab) == before
    assert set(lab.shell("docker inspect -f '{{.State.Running}}' postgres s3 mlflow").split()) == {"true"}


def restored(lab: Lab, *arguments: str) -> dict[str, Any]:
    """A restore that is killed at each of its steps, and then runs to its end; its result."""
    lab.shell("rm -f /root/killed")
    before = lab.marker().get("stack")
    while (done := lab.run("restore", *arguments, kill=True)).code:
        assert done.code == KILLED, done.error
        stack = lab.marker().get("stack")
        assert stack == before or (
            lab.killed_at()[-1].startswith("cleaning up") and "restored-" in stack["postgres_dir"]
        )
    assert len(lab.killed_at()) >= 10, lab.killed_at()
    assert lab.shell("docker ps -a --format '{{.Names}}' | grep restore || true") == ""
    return done.result


def test_beside_into_a_newer_postgres_killed_at_each_step(lab: Lab) -> None:
    lab.log_run()
    lab.run("backup")
    held, runs, stack = lab.held(), lab.probe(), lab.marker()["stack"]
    assert stack["postgres_major"] == "15"
    result = restored(lab, "latest", "--into-new-major")
    assert result["stack"]["postgres_major"] != "15"
    lab.play("converge.yml")
    now = lab.held()
    assert now.pop("modes") and now == {key: held[key] for key in now}
    assert lab.probe()["previous_runs"] == runs["previous_runs"]
    assert lab.probe()["previous_runs_ok"] is True
    version = lab.shell("docker exec postgres postgres --version")
    assert version.split()[2].startswith(result["stack"]["postgres_major"])
    copy = result["workspace"]
    assert lab.shell(f"cd '{copy}' && find . -type f -print0 | sort -z | xargs -0 sha256sum") == held["files"]


def test_undo_serves_the_data_of_before(lab: Lab) -> None:
    held = lab.held()
    done = lab.run("undo")
    assert done.code == 0, done.error
    assert lab.marker()["stack"]["postgres_major"] == "15"
    lab.play("converge.yml")
    assert lab.held()["rows"] == held["rows"]
    assert lab.held()["objects"] == held["objects"]
    assert lab.run("undo").code == 2


def test_an_empty_volume_becomes_the_lab_killed_at_each_step(lab: Lab) -> None:
    assert lab.run("backup").code == 0
    held, runs, secrets = lab.held(), lab.probe(), lab.secrets()
    key = json.loads(lab.shell(f"python3 {PROGRAM} key"))
    lab.play("unmount.yml")
    refused = lab.run("backup")
    assert (refused.code, refused.error["kind"]) == (6, "safety_stop")
    lab.play("converge.yml", volume_number=1, roles_left_out=["mlflow_stack"])
    without = lab.run("restore", "latest")
    assert without.code == 2
    assert key["key_id"] in without.error["expected"]
    lab.shell("umask 077; cat > /run/labctl-backup/keys.json", data=json.dumps([key["key"]]).encode())
    restored(lab, "latest")
    assert lab.shell("ls /run/labctl-backup/keys.json", check=False) == ""
    assert lab.run("restore", "latest").result["already"] is True
    assert lab.secrets() == secrets
    lab.play("converge.yml", volume_number=1)
    assert lab.held() == held
    assert lab.probe()["previous_runs"] == runs["previous_runs"]
    assert lab.probe()["previous_runs_ok"] is True
    following = lab.run("backup")
    assert following.code == 0
    assert following.result["key_id"] == key["key_id"]
