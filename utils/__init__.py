"""Small shared parts: errors, units, timing, command lines, reports, running halves of networks."""

from utils.machine import set_waiting_policy

set_waiting_policy()  # before any module of this project imports torch
