"""What the Nova driver and labcloud-servers both do to a server's container."""
import io
import json
import os
import subprocess
import tarfile
import time

from labcloud import loops


def docker(*args, check=True, data=None):
    p = subprocess.run(('docker', *args), input=data, capture_output=True, check=False)
    if check and p.returncode:
        said = p.stderr.decode(errors='replace')[-800:]
        raise OSError('docker %s: rc %s: %s' % (' '.join(args[:5]), p.returncode, said))
    return p


def tar_of(files):
    """{path: (data, mode, uid)} as a tar stream for docker cp; a path ending in / is a directory."""
    buf = io.BytesIO()
    with tarfile.open(fileobj=buf, mode='w') as tar:
        for path, (data, mode, uid) in files.items():
            ti = tarfile.TarInfo(path.strip('/'))
            ti.mode, ti.uid, ti.gid, ti.mtime = mode, uid, uid, int(time.time())
            if path.endswith('/'):
                ti.type = tarfile.DIRTYPE
                tar.addfile(ti)
            else:
                data = data.encode() if isinstance(data, str) else data
                ti.size = len(data)
                tar.addfile(ti, io.BytesIO(data))
    return buf.getvalue()


def serial_of(connection_info):
    return (connection_info.get('serial') or connection_info['data'].get('volume_id')
            or os.path.basename(connection_info['data']['device_path']).replace('volume-', ''))


def volume_entry(connection_info, device):
    """A line of the server's volumes.json; the volume gets its loop device if it has none.

    `file` lets the server see that loopN is still this volume: after a reboot of the machine it may be another's."""
    path = connection_info['data']['device_path']
    return {'loop': loops.attach(path), 'dev': os.path.basename(device), 'serial': serial_of(connection_info),
            'file': os.path.basename(path)}


def put_volumes(container, entries):
    """What labnode-blockdev shows at the server's next boot."""
    docker('cp', '-', container + ':/var/lib/labnode', data=tar_of({'volumes.json': (json.dumps(entries), 0o644, 0)}))
