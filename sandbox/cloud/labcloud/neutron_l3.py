"""The in-tree L3 plugin, minus the L3 agent: an associated floating IP is ACTIVE at once.

(The agent would report that; labcloud-net plugs the address within a second.)
"""
from neutron_lib import constants
from neutron.services.l3_router import l3_router_plugin


class Plugin(l3_router_plugin.L3RouterPlugin):
    def _status(self, context, fip):
        status = (constants.FLOATINGIP_STATUS_ACTIVE if fip.get('port_id')
                  else constants.FLOATINGIP_STATUS_DOWN)
        if fip.get('status') != status:
            self.update_floatingip_status(context.elevated(), fip['id'], status)
            fip['status'] = status
        return fip

    def create_floatingip(self, context, floatingip, **kwargs):
        return self._status(context, super().create_floatingip(context, floatingip, **kwargs))

    def update_floatingip(self, context, id, floatingip):
        return self._status(context, super().update_floatingip(context, id, floatingip))
