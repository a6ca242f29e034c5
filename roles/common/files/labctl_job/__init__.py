"""What the host's programs (labctl_etl, labctl_backup) share: a job that outlives whoever started it, and tells how far
it is. Each role that has such a program installs this beside it. Python's standard library is all that it needs.
"""
