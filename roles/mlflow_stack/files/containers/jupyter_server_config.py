"""Jupyter's settings: the token comes from a file of the volume, so it survives the machine and shows in no listing."""

from pathlib import Path

c = get_config()  # noqa: F821  (Jupyter puts it there)
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.port = 8888
c.ServerApp.open_browser = False
c.ServerApp.root_dir = "/home/jovyan/work"
c.ServerApp.terminals_enabled = True
c.IdentityProvider.token = Path("/run/secrets/jupyter_token").read_text().strip()
