"""usage: warm_client.py ADDRESS ADDRESS PYTHON-ARGUMENT...

Has one of the parents at the addresses fork a process, which runs what the arguments ask Python for, and behaves as
that process would. Where both say that a fork would not do the same, it becomes an interpreter.
"""

import array
import contextlib
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
pid, early = 0, []


def forward(number, _=None):
    if not pid:
        return early.append(number)
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def handle(how):
    for number in FORWARDED:
        signal.signal(number, how)


handle(forward)
arguments = sys.argv[3:]
asked = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
for address in sys.argv[1:3]:
    parent, streams = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), array.array("i", [0, 1, 2])
    with contextlib.suppress(OSError):  # there is no parent any more
        parent.connect(address)
        parent.sendmsg([len(asked).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        parent.sendall(asked)
        answers = parent.makefile("rb")  # the id of the process, or 0; then its exit code
        pid = int(answers.readline() or 0)
    if pid:
        break
else:
    handle(signal.SIG_DFL)
    for number in early:
        os.kill(os.getpid(), number)
    os.execv(sys.executable, [sys.executable, *arguments])
for number in early:
    forward(number)
nowhere = os.open(os.devnull, os.O_RDWR)
for stream in range(3):  # whoever reads and writes them is to meet the process alone
    os.dup2(nowhere, stream)
code = int(answers.readline() or 1)
handle(signal.SIG_IGN)  # the process has ended, so they change nothing
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
