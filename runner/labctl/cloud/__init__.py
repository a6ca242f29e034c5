"""The only place that knows OpenStack: what a lab needs is found there, or made, or taken down.

Every function finds what exists (made by labctl, by hand, or by the tutorial) before it makes anything, so an
interrupted command is mended by running it again. What the cloud refuses arrives as `CloudRefused` with the
cloud's own words; what it doesn't answer, too.
"""

#: Metadata key (server, volume, container) with the lab's name: tells whose it is in a shared project.
META_LAB = "labctl_lab"
#: Server metadata key with the id of the credential that the server reads the object store with.
META_CREDENTIAL = "labctl_credential_id"
#: Server metadata key with the dialect that the credential is for, `swift` (also where there is none) or `s3`.
META_DIALECT = "labctl_object_dialect"
#: Server metadata key with the end of that credential (ISO 8601, UTC); empty for one without an end.
META_CREDENTIAL_ENDS = "labctl_credential_ends"
#: Container metadata key with the access key that labctl made for reading it: EC2 keys have no name and no end, and a
#: server may be gone (with its lease) before its key is.
META_S3_KEY = "labctl_s3_key"
#: Volume metadata keys with the schedule of backups and how many to keep: a new server gets the timer by them.
META_BACKUP_SCHEDULE, META_BACKUP_KEEP = "labctl_backup_schedule", "labctl_backup_keep"
#: Server metadata keys with the id of the lease that the server lives in and its end (ISO 8601, UTC).
META_LEASE, META_LEASE_ENDS = "labctl_lease_id", "labctl_lease_ends"
#: Volume and server metadata key with the SSH host key (`type base64`) that lies on the volume; a server has it once it
#: shows that key to who logs in. So every machine that can ask the cloud knows the lab's host.
META_HOST_KEY = "labctl_host_key"
#: Server metadata key that a rebuild sets on the server it makes: UNFINISHED until everything was read back.
META_REBUILD = "labctl_rebuild"
#: The same for a `volume extend` that had to stop the services: UNFINISHED until they run again.
META_EXTEND = "labctl_extend"
UNFINISHED, FINISHED = "unfinished", "finished"
