"""A dataset from where it is into a container of the object store, on the lab's host: read once, checked, and shown
to readers when all of it is there.

`python3 /usr/local/lib/labctl/labctl_etl COMMAND`; `__main__` has the commands. Python's standard library, rclone and,
for the packed layout, mksquashfs are all that it needs.
"""
