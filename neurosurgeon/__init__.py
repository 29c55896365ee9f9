"""Split inference between an edge device and a cloud."""

from neurosurgeon.utils.machine import set_waiting_policy

set_waiting_policy()  # before any module of this project imports torch
