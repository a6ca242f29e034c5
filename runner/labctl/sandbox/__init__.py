"""The embedded cloud: a real OpenStack in one container on this machine's Docker, with an image registry."""

from labctl.sandbox.config import SandboxConfig
from labctl.sandbox.lifecycle import SandboxStatus, destroy, down, image, status, up
from labctl.sandbox.services import Source

__all__ = ["SandboxConfig", "SandboxStatus", "Source", "destroy", "down", "image", "status", "up"]
