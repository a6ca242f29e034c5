"""Backup and restore of a lab's volume, on the lab's host: the same program for a person, a timer and a test.

`python3 /usr/local/lib/labctl/labctl_backup COMMAND`; `__main__` has the commands. Python's standard library, rclone
and docker are all that it needs.
"""
