"""Running a playbook must tell the truth about its end, and leave no secret anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from labctl import ansible
from labctl.ansible import Run, Step
from labctl.errors import ConvergeFailed, HostUnreachable, SafetyStop

CANARY = "canary-9c1f4e27d7"


def run(tmp_path: Path, tasks: str, **options: Any) -> tuple[ansible.Outcome, list[Step]]:
    playbook = tmp_path / "play.yml"
    playbook.write_text(f"- hosts: labctl\n  gather_facts: false\n  tasks:\n{tasks}")
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    inventory = {"_meta": {"hostvars": {"here": host}}, "labctl": {"hosts": ["here"]}}
    steps: list[Step] = []
    what = Run(str(playbook), inventory, tmp_path / "logs", **options)
    return ansible.run(what, steps.append), steps


def files_with(text: str, *folders: Path) -> list[Path]:
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and text in path.read_bytes().decode(errors="replace")
    ]


def test_a_run_counts_what_changed_and_which_tasks_cost_a_round_trip(tmp_path: Path) -> None:
    outcome, steps = run(
        tmp_path,
        f"""    - name: one
      ansible.builtin.copy: {{dest: {tmp_path}/made, content: x}}
    - name: two
      ansible.builtin.assert: {{that: true}}
    - name: three
      ansible.builtin.command: {{cmd: "true"}}
      changed_when: false
""",
    )
    assert (outcome.ok, outcome.changed, outcome.remote_tasks) == (3, 1, 2)
    assert outcome.changed_tasks == ["one"]
    assert [step.name for step in steps] == ["one", "three"]
    assert (tmp_path / "made").read_text() == "x"


def test_what_a_killed_run_left_is_removed_by_the_next_and_a_living_ones_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    killed = subprocess.Popen(["true"])
    killed.wait()
    dead, alive, strange = (tmp_path / f"labctl-run-{name}" for name in (f"{killed.pid}-x", f"{os.getppid()}-x", "a-b"))
    for folder in (dead, alive, strange):
        folder.mkdir()
        (folder / "variables.json").write_text(CANARY)
    run(tmp_path, "    - ansible.builtin.assert: {that: true}\n")
    assert (dead.exists(), alive.exists(), strange.exists()) == (False, True, True)


def test_check_mode_changes_nothing_and_shows_the_difference(tmp_path: Path) -> None:
    task = f"    - ansible.builtin.copy: {{dest: {tmp_path}/made, content: new}}\n"
    outcome, _ = run(tmp_path, task, check=True)
    assert outcome.changed == 1
    assert any("+new" in diff for diff in outcome.diffs)
    assert not (tmp_path / "made").exists()


def test_a_failing_task_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ConvergeFailed) as caught:
        run(tmp_path, "    - name: break\n      ansible.builtin.fail: {msg: the disk is on fire}\n")
    assert caught.value.exit_code == 5
    assert caught.value.what == "break: the disk is on fire"


def test_a_command_that_fails_shows_its_stderr_once(tmp_path: Path) -> None:
    with pytest.raises(ConvergeFailed) as caught:
        run(tmp_path, "    - ansible.builtin.command: {cmd: ls /nowhere}\n")
    assert caught.value.detail.count("/nowhere") == 1


def test_a_module_that_stops_for_safety_is_exit_6() -> None:
    result = {"msg": "not blank", "safety_stop": True, "expected": "a blank disk", "found": "ext4", "next_step": "look"}
    error = ansible.failure_of({"res": result, "role": "block_volume", "task": "Mount", "host": "node"})
    assert isinstance(error, SafetyStop) and error.exit_code == 6
    assert (error.what, error.expected, error.found, error.next_step) == ("not blank", "a blank disk", "ext4", "look")


def test_the_item_of_a_loop_that_failed_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConvergeFailed) as caught:
        run(tmp_path, "    - ansible.builtin.fail: {msg: 'no {{ item }}'}\n      loop: [bread, milk]\n")
    assert "no " in caught.value.what and "items failed" not in caught.value.what


def test_settings_hold_whatever_the_callers_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_ROLES_PATH", ansible.environment(tmp_path)["ANSIBLE_ROLES_PATH"])
    monkeypatch.setenv("ANSIBLE_STRATEGY", "no-such-strategy")
    outcome, _ = run(tmp_path, "    - ansible.builtin.include_role: {name: common}\n")
    assert outcome.ok >= 1


def test_an_ignored_failure_is_none(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "    - ansible.builtin.command: {cmd: 'false'}\n      ignore_errors: true\n")
    assert outcome.remote_tasks >= 0


def test_a_playbook_that_is_not_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConvergeFailed) as caught:
        run(tmp_path, "    - no_such_module: {}\n")
    assert "no_such_module" in f"{caught.value.what} {caught.value.detail}"


def test_an_unreachable_host_is_exit_4() -> None:
    error = ansible.unreachable({"host": "node", "res": {"msg": "Connection timed out"}})
    assert isinstance(error, HostUnreachable) and error.exit_code == 4 and "timed out" in error.found


def test_no_secret_is_left_by_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("OS_PASSWORD", CANARY)
    seen = tmp_path / "seen"
    tasks = f"""    - name: What the run itself can see
      ansible.builtin.shell: |
        (env; cat /proc/*/cmdline; find {runtime} -type f | xargs cat) 2>/dev/null | tr -cd '[:print:]'
      register: found
      no_log: true
    - ansible.builtin.copy:
        dest: {seen}
        content: "{{{{ 'leaked' if '{CANARY}' in found.stdout else 'clean' }}}}, {{{{ secret | length }}}}"
      no_log: true
"""
    # the play itself names the canary, so what is looked for is written in two parts there
    outcome, _ = run(
        tmp_path, tasks.replace(f"'{CANARY}'", f"'{CANARY[:6]}' ~ '{CANARY[6:]}'"), secrets={"secret": CANARY}
    )
    assert seen.read_text() == f"clean, {len(CANARY)}"
    assert files_with(CANARY, tmp_path) == []
    assert outcome.log is not None and outcome.log.stat().st_mode & 0o777 == 0o600
    assert list(runtime.iterdir()) == []
    assert os.environ["OS_PASSWORD"] == CANARY
