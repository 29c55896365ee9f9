"""Split inference between an edge device and a cloud."""

from neurosurgeon.utils.machine import set_waiting_policy

__version__ = "0.2.0"

set_waiting_policy()  # before any module of this project imports torch
