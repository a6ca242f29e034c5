"""Cinder backend: a volume is a sparse file in a directory shared with the compute host."""
import os
import subprocess

from oslo_config import cfg
from oslo_log import log as logging

from cinder import exception
from cinder import interface
from cinder.volume import configuration
from cinder.volume import driver
from cinder.image import image_utils

LOG = logging.getLogger(__name__)
opts = [cfg.StrOpt('labcloud_volumes_dir', default='/var/lib/labcloud/volumes'),
        cfg.IntOpt('labcloud_capacity_gb', default=2000)]
cfg.CONF.register_opts(opts, group=configuration.SHARED_CONF_GROUP)


@interface.volumedriver
class FileDriver(driver.VolumeDriver):
    VERSION = '1.0'

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(opts)

    @property
    def dir(self):
        return self.configuration.labcloud_volumes_dir

    def check_for_setup_error(self):
        if not os.path.isdir(self.dir):
            raise exception.VolumeBackendAPIException(data='%s is missing' % self.dir)

    def _update_volume_stats(self):
        total = self.configuration.labcloud_capacity_gb
        used = sum(os.stat(e.path).st_blocks * 512 for e in os.scandir(self.dir)) >> 30
        self._stats = {
            'volume_backend_name': self.configuration.safe_get('volume_backend_name') or 'files',
            'vendor_name': 'labcloud', 'driver_version': self.VERSION, 'storage_protocol': 'local',
            'pools': [{'pool_name': 'files', 'total_capacity_gb': total,
                       'free_capacity_gb': total - used, 'reserved_percentage': 0,
                       'thin_provisioning_support': True, 'max_over_subscription_ratio': '20.0',
                       'provisioned_capacity_gb': used, 'multiattach': False}]}

    def _path(self, obj):
        return os.path.join(self.dir, obj.name)

    def local_path(self, volume):
        return self._path(volume)

    def _resize(self, path, size_gb):
        with open(path, 'ab') as f:
            f.truncate(size_gb << 30)

    def _copy(self, src, dst):
        subprocess.run(['cp', '--reflink=auto', '--sparse=always', src, dst], check=True)

    def create_volume(self, volume):
        self._resize(self._path(volume), volume.size)

    def create_cloned_volume(self, volume, src_vref):
        self._copy(self._path(src_vref), self._path(volume))
        self._resize(self._path(volume), volume.size)

    def create_snapshot(self, snapshot):
        self._copy(self._path(snapshot.volume), self._path(snapshot))

    def create_volume_from_snapshot(self, volume, snapshot):
        self._copy(self._path(snapshot), self._path(volume))
        self._resize(self._path(volume), volume.size)

    def revert_to_snapshot(self, context, volume, snapshot):
        self._copy(self._path(snapshot), self._path(volume))

    def _unlink(self, obj):
        try:
            os.unlink(self._path(obj))
        except FileNotFoundError:
            LOG.warning('%s was already gone', self._path(obj))

    delete_volume = delete_snapshot = _unlink

    def extend_volume(self, volume, new_size):
        self._resize(self._path(volume), new_size)

    def copy_image_to_volume(self, context, volume, image_service, image_id,
                             disable_sparse=False):
        image_utils.fetch_to_raw(context, image_service, image_id, self._path(volume),
                                 self.configuration.volume_dd_blocksize, size=volume.size)
        self._resize(self._path(volume), volume.size)

    def ensure_export(self, context, volume):
        pass

    def create_export(self, context, volume, connector):
        pass

    def remove_export(self, context, volume):
        pass

    def initialize_connection(self, volume, connector, **kwargs):
        return {'driver_volume_type': 'local', 'data': {'device_path': self._path(volume)}}

    def terminate_connection(self, volume, connector, **kwargs):
        pass
