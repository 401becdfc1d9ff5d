"""Ctrl-C in the middle of a library's long computation."""

import signal
import subprocess
import sys
import threading

import pytest

from spiking_mlp_jax.utils.interrupt import prompt_interrupt

LONG = """if True:
    import hashlib, os, signal, threading
    from spiking_mlp_jax.utils.interrupt import prompt_interrupt
    with prompt_interrupt(0.2):
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # an hour, in which Python raises nothing
"""


def test_a_long_computation_ends():
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_what_ends_by_itself_does_so():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), prompt_interrupt(60):
        signal.raise_signal(signal.SIGINT)
    assert threading.active_count() == before
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with prompt_interrupt(0.0):
            signal.raise_signal(signal.SIGINT)  # somebody else's
    finally:
        signal.signal(signal.SIGINT, handler)
    assert signal.set_wakeup_fd(-1) == -1
