"""Loop devices of volumes. A device is known by its backing file's device and inode number: the path that the
kernel shows depends on who looks, and another file of the same name may be on a loop device of the machine's own."""
import fcntl
import os
import stat
import struct
import subprocess
import time

LOOP_CTL_GET_FREE = 0x4C82
LOOP_GET_STATUS64 = 0x4C05


def node(name):
    """/dev/NAME; a container has only the nodes that it makes."""
    path = '/dev/' + name
    if not os.path.exists(path):
        with open('/sys/block/%s/dev' % name) as f:
            major, minor = map(int, f.read().split(':'))
        os.mknod(path, 0o660 | stat.S_IFBLK, os.makedev(major, minor))
    return path


def backing(name):
    """((major, minor), inode) of what is behind a loop device, or None."""
    if not os.path.exists('/sys/block/%s/loop/backing_file' % name):
        return None
    try:
        fd = os.open(node(name), os.O_RDONLY)
    except OSError:
        return None
    try:
        info = bytearray(232)               # struct loop_info64: lo_device, lo_inode, …
        fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
    except OSError:
        return None
    finally:
        os.close(fd)
    dev, inode = struct.unpack_from('QQ', info)     # dev as the kernel's huge_encode_dev writes it
    return ((dev & 0xfff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xfff00)), inode


def find(path):
    """The name of the loop device whose backing file is path, or None."""
    try:
        st = os.stat(path)
    except FileNotFoundError:
        return None
    mine = ((os.major(st.st_dev), os.minor(st.st_dev)), st.st_ino)
    return next((n for n in os.listdir('/sys/block') if n.startswith('loop') and backing(n) == mine), None)


def attach(path):
    """The name of the loop device for path, made if there is none."""
    name = find(path)
    for _ in range(20):
        if name:
            return name
        with open('/dev/loop-control') as ctl:
            n = fcntl.ioctl(ctl, LOOP_CTL_GET_FREE)
        # it may be taken by somebody else before we are: losetup fails then, and another one is free
        if subprocess.run(['losetup', '-P', node('loop%d' % n), path], capture_output=True).returncode == 0:
            return 'loop%d' % n
        time.sleep(0.2)
        name = find(path)
    raise OSError('no free loop device for %s' % path)


def detach(path):
    """True once no loop device has path as its backing file; False if it is still in use after 5 s."""
    for _ in range(50):
        name = find(path)
        if not name:
            return True
        subprocess.run(['losetup', '-d', node(name)], capture_output=True)
        time.sleep(0.1)
    return find(path) is None


def resized(path):
    """The kernel learns the new size of path."""
    name = find(path)
    if name:
        subprocess.run(['losetup', '-c', node(name)], check=True, capture_output=True)
