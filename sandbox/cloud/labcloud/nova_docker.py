"""Nova virt driver: a server is a systemd+sshd container on the host's Docker.

Installed as nova/virt/labcloud_driver.py; compute_driver = labcloud_driver.DockerDriver
The inside of a "server" is in ../node (device nodes, host keys, resolv.conf).
"""
import contextlib
import json
import os
import re

import os_resource_classes as orc
from oslo_log import log as logging
from oslo_serialization import jsonutils
from oslo_utils import versionutils

import nova.conf
from nova import exception
from nova import utils
from nova.compute import power_state
from nova.objects import fields as obj_fields
from nova.virt import driver
from nova.virt import hardware

from labcloud import loops
from labcloud import nodes
from labcloud.nodes import put_volumes, serial_of, tar_of, volume_entry

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

# What makes systemd and an inner Docker work without --privileged (see README).
RUN_FLAGS = [
    '--cap-add', 'ALL', '--cap-drop', 'SYS_RESOURCE',
    '--security-opt', 'seccomp=unconfined', '--security-opt', 'apparmor=unconfined',
    '--cgroupns=private', '-e', 'container=docker', '-v', '/var/lib/docker',
    '--device', '/dev/fuse', '--tmpfs', '/run', '--tmpfs', '/run/lock',
    '--restart', 'unless-stopped',      # "sudo reboot" inside ends the container
    # loop devices and their partitions: attached volumes
    '--device-cgroup-rule', 'b 7:* rmw', '--device-cgroup-rule', 'b 259:* rmw',
]
SANDBOX = os.environ.get('LABCLOUD_NAME', 'labctl-sandbox')     # label of everything that is this cloud's
NETWORK = os.environ.get('LABCLOUD_NETWORK', 'labctl-sandbox')
DNS = os.environ.get('LABCLOUD_DNS', '')
OVERLAY = '/opt/labcloud/overlay'          # files copied onto every new server
REPOSITORY = 'labctl-sandbox-node'               # image of a server: labctl-sandbox-node:<Glance image name>
DEFAULT_TAG = 'CC-Ubuntu24.04'


def docker(*args, **kw):
    try:
        return nodes.docker(*args, **kw)
    except OSError as e:
        raise exception.NovaException(str(e)) from e


def cname(instance):
    return 'inst-%s' % instance.uuid


class DockerDriver(driver.ComputeDriver):
    capabilities = dict(driver.ComputeDriver.capabilities, **{
        'has_imagecache': False,
        'supports_attach_interface': False,
        'supports_extend_volume': True,
        'supports_image_type_raw': True,
        'supports_image_type_qcow2': True,
        'supports_tagged_attach_volume': True,
        'supports_device_tagging': True,
    })
    vcpus, memory_mb, local_gb = 256, 512 * 1024, 20000

    def init_host(self, host):
        self._host = host
        docker('version')

    # -- what runs here -------------------------------------------------
    def _inspect(self, instance):
        p = docker('inspect', cname(instance), check=False)
        return json.loads(p.stdout)[0] if p.returncode == 0 else None

    def list_instances(self):
        return ['inst-' + u for u in self.list_instance_uuids()]

    def list_instance_uuids(self):
        out = docker('ps', '-a', '--filter', 'label=labctl.sandbox.name=' + SANDBOX,
                     '--filter', 'label=labctl.instance', '--format',
                     '{{.Label "labctl.instance"}}').stdout.decode()
        return out.split()

    def instance_exists(self, instance):
        return self._inspect(instance) is not None

    def get_info(self, instance, use_cache=True):
        c = self._inspect(instance)
        if not c:
            raise exception.InstanceNotFound(instance_id=instance.uuid)
        state = (power_state.PAUSED if c['State'].get('Paused') else
                 power_state.RUNNING if c['State']['Running'] else power_state.SHUTDOWN)
        return hardware.InstanceInfo(state=state, internal_id=c['Id'])

    def get_num_instances(self):
        return len(self.list_instance_uuids())

    def get_available_nodes(self, refresh=False):
        return [self._host]

    def get_available_resource(self, nodename):
        return {
            'vcpus': self.vcpus, 'memory_mb': self.memory_mb, 'local_gb': self.local_gb,
            'vcpus_used': 0, 'memory_mb_used': 0, 'local_gb_used': 0,
            'hypervisor_type': 'docker', 'hypervisor_hostname': nodename,
            'hypervisor_version': versionutils.convert_version_to_int('1.0'),
            'cpu_info': jsonutils.dumps({'arch': 'x86_64', 'model': 'host', 'vendor': 'host',
                                         'features': [], 'topology': {}}),
            'disk_available_least': 0, 'numa_topology': None,
            'supported_instances': [(obj_fields.Architecture.X86_64, obj_fields.HVType.QEMU,
                                     obj_fields.VMMode.HVM),
                                    (obj_fields.Architecture.X86_64, obj_fields.HVType.DOCKER,
                                     obj_fields.VMMode.EXE)],
        }

    def update_provider_tree(self, provider_tree, nodename, allocations=None):
        ratios = self._get_allocation_ratios(provider_tree.data(nodename).inventory)
        inventory = {}
        for rc, total in ((orc.VCPU, self.vcpus), (orc.MEMORY_MB, self.memory_mb),
                          (orc.DISK_GB, self.local_gb)):
            inventory[rc] = {'total': total, 'min_unit': 1, 'max_unit': total, 'step_size': 1,
                             'allocation_ratio': ratios[rc], 'reserved': 0}
        provider_tree.update_inventory(nodename, inventory)

    # -- life of a server -----------------------------------------------
    def spawn(self, context, instance, image_meta, injected_files, admin_password,
              allocations, network_info=None, block_device_info=None, power_on=True,
              accel_info=None):
        if len(network_info or []) > 1:
            raise exception.NovaException('this driver plugs one network only')
        tag = re.sub(r'[^A-Za-z0-9_.-]', '_', getattr(image_meta, 'name', '') or DEFAULT_TAG)
        image = '%s:%s' % (REPOSITORY, tag)
        if docker('image', 'inspect', image, check=False).returncode:
            image = '%s:%s' % (REPOSITORY, DEFAULT_TAG)
        net = ['--network', 'none']
        for vif in network_info or []:
            ips = [ip['address'] for ip in vif.fixed_ips() if ':' not in ip['address']]
            net = ['--network', NETWORK]     # labnode-boot sets the port's MAC address
            net += ['--ip', ips[0]] if ips else []
        docker('create', '--name', cname(instance), '--hostname', instance.hostname or instance.uuid,
               '--label', 'labctl.sandbox=1', '--label', 'labctl.sandbox.name=' + SANDBOX,
               '--label', 'labctl.instance=%s' % instance.uuid,
               '--label', 'labctl.project=%s' % instance.project_id,
               '--label', 'labctl.server=%s' % instance.display_name,
               *net, *RUN_FLAGS, image)
        try:
            docker('cp', '-', cname(instance) + ':/',
                   data=self._files(instance, image_meta, injected_files, network_info))
            if power_on:
                docker('start', cname(instance))
            for bdm in driver.block_device_info_get_mapping(block_device_info):
                self.attach_volume(context, bdm['connection_info'], instance, bdm['mount_device'])
        except Exception:
            with contextlib.suppress(Exception):
                docker('rm', '-f', '-v', cname(instance))
            raise

    def _files(self, instance, image_meta, injected_files, network_info):
        """What cloud-init would have put there, as a tar stream for docker cp."""
        files = {'/home/cc/.ssh/': (None, 0o700, 1000),
                 '/home/cc/.ssh/authorized_keys': ((instance.key_data or '').strip() + '\n', 0o600, 1000),
                 '/var/lib/labnode/': (None, 0o755, 0)}

        def add(name, data, mode=0o644, uid=0):
            files[name] = (data, mode, uid)

        meta = {'uuid': instance.uuid, 'name': instance.display_name, 'hostname': instance.hostname,
                'project_id': instance.project_id, 'availability_zone': instance.availability_zone,
                'meta': dict(instance.metadata or {}), 'image': getattr(image_meta, 'name', None),
                'flavor': instance.flavor.name if instance.flavor else None,
                'keys': [{'name': instance.key_name, 'type': 'ssh', 'data': instance.key_data}],
                'devices': []}
        add('/var/lib/labnode/meta_data.json', json.dumps(meta, indent=1))
        for vif in network_info or []:
            add('/var/lib/labnode/mac', vif['address'] + '\n')
        if DNS:
            add('/var/lib/labnode/resolv.conf', ''.join('nameserver %s\n' % d for d in DNS.split(',')))
        if instance.user_data:
            from oslo_serialization import base64
            data = base64.decode_as_bytes(instance.user_data)
            add('/var/lib/labnode/user-data', data, 0o700 if data[:2] == b'#!' else 0o600)
        for root, _dirs, names in os.walk(OVERLAY):
            for n in names:
                with open(os.path.join(root, n), 'rb') as f:
                    add(os.path.relpath(os.path.join(root, n), OVERLAY), f.read())
        for path, content in injected_files or []:
            add(path, content)
        return tar_of(files)

    def destroy(self, context, instance, network_info, block_device_info=None,
                destroy_disks=True, destroy_secrets=True):
        docker('rm', '-f', '-v', cname(instance), check=False)
        for bdm in driver.block_device_info_get_mapping(block_device_info):
            self._loop_detach(bdm['connection_info'])

    def cleanup(self, context, instance, network_info, block_device_info=None,
                destroy_disks=True, migrate_data=None, destroy_vifs=True, destroy_secrets=True):
        docker('rm', '-f', '-v', cname(instance), check=False)

    def power_off(self, instance, timeout=0, retry_interval=0):
        docker('stop', '-t', str(min(timeout or 10, 10)), cname(instance))

    def power_on(self, context, instance, network_info, block_device_info=None,
                 accel_info=None, share_info=None):
        put_volumes(cname(instance), [volume_entry(bdm['connection_info'], bdm['mount_device'])
                                      for bdm in driver.block_device_info_get_mapping(block_device_info)])
        docker('start', cname(instance))

    def reboot(self, context, instance, network_info, reboot_type, block_device_info=None,
               bad_volumes_callback=None, accel_info=None, share_info=None):
        docker('stop', '-t', '10' if reboot_type == 'SOFT' else '0', cname(instance), check=False)
        self.power_on(context, instance, network_info, block_device_info)

    def pause(self, instance):
        docker('pause', cname(instance))

    def unpause(self, instance):
        docker('unpause', cname(instance))

    def suspend(self, context, instance):
        self.power_off(instance, 10)

    def resume(self, context, instance, network_info, block_device_info=None, share_info=None):
        self.power_on(context, instance, network_info, block_device_info)

    def resume_state_on_host_boot(self, context, instance, network_info, share_info,
                                  block_device_info=None):
        self.power_on(context, instance, network_info, block_device_info)

    def soft_delete(self, instance):
        self.power_off(instance)

    def restore(self, instance):
        docker('start', cname(instance))

    def set_admin_password(self, instance, new_pass):
        docker('exec', '-i', cname(instance), 'chpasswd', data=b'cc:%s\n' % new_pass.encode())

    def snapshot(self, context, instance, image_id, update_task_state):
        raise NotImplementedError()

    def get_console_output(self, context, instance):
        p = docker('exec', cname(instance), 'journalctl', '-b', '--no-pager', '-n', '200', check=False)
        return p.stdout + p.stderr

    # -- network: labcloud-net does floating IPs and security groups ---------
    def plug_vifs(self, instance, network_info):
        pass

    def unplug_vifs(self, instance, network_info):
        pass

    # -- volumes ----------------------------------------------------------
    def get_volume_connector(self, instance):
        return {'ip': CONF.my_ip, 'host': self._host, 'initiator': 'local', 'platform': 'x86_64',
                'os_type': 'linux', 'multipath': False, 'do_local_attach': True}

    def default_root_device_name(self, instance, image_meta, root_bdm):
        return '/dev/vda'

    def get_device_name_for_instance(self, instance, bdms, block_device_obj):
        used = {'/dev/vda'} | {b.device_name for b in bdms if b.device_name}
        wanted = block_device_obj.get('device_name') if block_device_obj else None
        if wanted and re.fullmatch(r'/dev/vd[b-z]', wanted) and wanted not in used:
            return wanted
        return next('/dev/vd' + c for c in 'bcdefghijklmnopqrstuvwxyz' if '/dev/vd' + c not in used)

    def default_device_names_for_instance(self, instance, root_device_name, *block_device_lists):
        used = {root_device_name}
        bdms = [b for group in block_device_lists for b in group]
        used |= {b.device_name for b in bdms if b.device_name}
        for b in bdms:
            if not b.device_name:
                b.device_name = next('/dev/vd' + c for c in 'bcdefghijklmnopqrstuvwxyz'
                                     if '/dev/vd' + c not in used)
                used.add(b.device_name)
                b.save()

    def _loop_detach(self, connection_info):
        path = connection_info['data']['device_path']
        if not loops.detach(path):
            LOG.warning('the loop device of %s is still in use', path)

    def attach_volume(self, context, connection_info, instance, mountpoint, disk_bus=None,
                      device_type=None, encryption=None):
        entry = self._entry(connection_info, mountpoint)
        c = self._inspect(instance)
        if c and c['State']['Running']:
            docker('exec', cname(instance), 'labnode-blockdev', 'attach', entry['loop'], entry['dev'],
                   entry['serial'], entry['file'])

    @utils.synchronized('labcloud-loop')
    def _entry(self, connection_info, mountpoint):
        return volume_entry(connection_info, mountpoint)

    def detach_volume(self, context, connection_info, instance, mountpoint, encryption=None):
        c = self._inspect(instance)
        if c and c['State']['Running']:
            loop = loops.find(connection_info['data']['device_path'])
            # A KVM guest loses an unplugged disk even if it is mounted; the kind version of that.
            docker('exec', cname(instance), 'sh', '-c',
                   'for m in $(sed -n "s#^/dev/%s\\(p[0-9]*\\)\\? \\([^ ]*\\) .*#\\2#p" /proc/self/mounts); do '
                   'umount -l "$m"; done' % loop, check=False)
            docker('exec', cname(instance), 'labnode-blockdev', 'detach', serial_of(connection_info))
        self._loop_detach(connection_info)

    def extend_volume(self, context, connection_info, instance, requested_size):
        loops.resized(connection_info['data']['device_path'])
